"""Loads a model repository in every way there is, in a fresh process, and stores what each gives.

Run as `python ways.py REPO OUTPUT.npz [REVISION]`; REPO is a folder or a Hub id. Whatever is
printed to standard error is a warning that a user would see.
"""

import sys
from pathlib import Path

import numpy as np

TEXTS = ["Tim Cook opened Apple's new store in Paris. I love it!", "so sad", ""]


def numpy(value):
    return value.detach().float().numpy()


def model_outputs(model, tokenizer, prefix):
    """Returns every output of a `MultiTaskModel` for each text alone."""
    found = {}
    for i, text in enumerate(TEXTS):
        out = model(**tokenizer(text, return_tensors="pt"))
        found[f"{prefix}/hidden/{i}"] = numpy(out.last_hidden_state)
        found[f"{prefix}/embedding/{i}"] = numpy(out.sentence_embedding)[0]
        found |= {f"{prefix}/logits.{name}/{i}": numpy(x)[0] for name, x in out.logits.items()}
    return found


def load_all_ways(repo, options):
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers import (
        AutoModel,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoTokenizer,
    )
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    trusted = {**options, "trust_remote_code": True}
    tokenizer = AutoTokenizer.from_pretrained(repo, **options)
    found = {}

    model, info = AutoModel.from_pretrained(repo, output_loading_info=True, **trusted)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    assert type(model).__name__ == "MultiTaskModel" and not model.training
    found |= model_outputs(model, tokenizer, "auto")
    if Path(repo).is_dir():
        sys.path.insert(0, str(repo))
        from modeling_multitask import MultiTaskModel  # the direct class

        found |= model_outputs(MultiTaskModel.from_pretrained(repo), tokenizer, "direct")

    plain, info = AutoModel.from_pretrained(repo, output_loading_info=True, **options)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    assert type(plain).__module__.startswith("transformers.models")
    inputs = [tokenizer(text, return_tensors="pt") for text in TEXTS]
    found |= {f"plain/hidden/{i}": numpy(plain(**x).last_hidden_state) for i, x in enumerate(inputs)}

    for name, kwargs in (("st", options), ("st_trusted", trusted)):
        sentence_model = SentenceTransformer(repo, device="cpu", **kwargs)
        found |= {f"{name}/embedding/{i}": x for i, x in enumerate(sentence_model.encode(TEXTS))}

    views = {
        "sequence_classification": AutoModelForSequenceClassification,
        "token_classification": AutoModelForTokenClassification,
    }
    first = {}
    for task, spec in model.config.tasks.items():
        view, info = views[spec["kind"]].from_pretrained(repo, task=task, output_loading_info=True, **trusted)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
        assert list(view.config.id2label.values()) == spec["labels"]
        found |= {f"view/logits.{task}/{i}": numpy(view(**x).logits)[0] for i, x in enumerate(inputs)}
        first.setdefault(spec["kind"], view)
    return found | load_pipelines(repo, options, tokenizer, first)


def load_pipelines(repo, options, tokenizer, first):
    """Returns what each pipeline gives; `first` holds a view of the first task of each kind."""
    from transformers import pipeline

    trusted, found = {**options, "trust_remote_code": True}, {}
    multitask = pipeline("multitask", model=repo, device="cpu", **trusted)
    found |= {f"pipeline/embedding/{i}": x["sentence_embedding"] for i, x in enumerate(multitask(TEXTS))}
    for kind, standard in (
        ("sequence_classification", "text-classification"),
        ("token_classification", "token-classification"),
    ):
        if kind not in first:
            continue
        named = {"model": first[kind], "tokenizer": tokenizer}
        for name, kwargs in (("default", {"model": repo, **trusted}), ("named", named)):
            standard_pipe = pipeline(standard, device="cpu", **kwargs)
            answer = standard_pipe(TEXTS[0])
            found[f"{standard}/{name}"] = np.array([x["score"] for x in answer])
            found[f"{standard}/{name}/label"] = np.array([x.get("label", x.get("entity")) for x in answer])
    features = pipeline("feature-extraction", model=repo, device="cpu", **options)
    found |= {f"features/hidden/{i}": np.array(features(text)) for i, text in enumerate(TEXTS)}
    return found


if __name__ == "__main__":
    repo, output = sys.argv[1:3]
    options = {"revision": sys.argv[3]} if len(sys.argv) > 3 else {}
    found = load_all_ways(repo, options)
    for i in range(len(TEXTS)):
        agree = np.allclose(found[f"st/embedding/{i}"], found[f"pipeline/embedding/{i}"], atol=1e-5)
        assert agree, "SentenceTransformer gives other embeddings than the multitask pipeline"
    np.savez(output, **found)
