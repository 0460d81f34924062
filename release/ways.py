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


def load(auto, repo, **options):
    """Returns what a class loads, with every weight in its place."""
    model, info = auto.from_pretrained(repo, output_loading_info=True, **options)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    assert not model.training
    return model


def model_outputs(model, inputs, prefix):
    """Returns every output of a `MultiTaskModel` for each text alone."""
    found = {}
    for i, out in enumerate(model(**x) for x in inputs):
        found[f"{prefix}/hidden/{i}"] = numpy(out.last_hidden_state)
        found[f"{prefix}/embedding/{i}"] = numpy(out.sentence_embedding)[0]
        found |= {f"{prefix}/logits.{name}/{i}": numpy(x)[0] for name, x in out.logits.items()}
    return found


def load_all_ways(repo, options):
    import torch
    import transformers
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoTokenizer, pipeline
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    trusted = {**options, "trust_remote_code": True}
    tokenizer = AutoTokenizer.from_pretrained(repo, **options)
    inputs = [tokenizer(text, return_tensors="pt") for text in TEXTS]

    model = load(AutoModel, repo, **trusted)
    assert type(model).__name__ == "MultiTaskModel"
    found = model_outputs(model, inputs, "auto")
    if Path(repo).is_dir():
        sys.path.insert(0, str(repo))
        from modeling_multitask import MultiTaskModel  # the direct class

        found |= model_outputs(MultiTaskModel.from_pretrained(repo), inputs, "direct")

    plain = load(AutoModel, repo, **options)
    assert type(plain).__module__.startswith("transformers.models")
    found |= {f"plain/hidden/{i}": numpy(plain(**x).last_hidden_state) for i, x in enumerate(inputs)}

    for name, kwargs in (("st", options), ("st_trusted", trusted)):
        vectors = SentenceTransformer(repo, device="cpu", **kwargs).encode(TEXTS)
        found |= {f"{name}/embedding/{i}": x for i, x in enumerate(vectors)}
    records = pipeline("multitask", model=repo, device="cpu", **trusted)(TEXTS)
    found |= {f"pipeline/embedding/{i}": x["sentence_embedding"] for i, x in enumerate(records)}
    features = pipeline("feature-extraction", model=repo, device="cpu", **options)
    found |= {f"features/hidden/{i}": np.array(features(text)) for i, text in enumerate(TEXTS)}

    views = {
        "sequence_classification": (transformers.AutoModelForSequenceClassification, "text-classification"),
        "token_classification": (transformers.AutoModelForTokenClassification, "token-classification"),
    }
    for task, spec in model.config.tasks.items():
        auto, standard = views[spec["kind"]]
        view = load(auto, repo, task=task, **trusted)
        assert list(view.config.id2label.values()) == spec["labels"]
        found |= {f"view/logits.{task}/{i}": numpy(view(**x).logits)[0] for i, x in enumerate(inputs)}
        if f"{standard}/default" in found:
            continue  # the pipelines open on the first task of their kind
        for name, kwargs in (("default", {"model": repo, **trusted}), ("named", {"model": view, "tokenizer": tokenizer})):
            answer = pipeline(standard, device="cpu", **kwargs)(TEXTS[0])
            found[f"{standard}/{name}"] = np.array([x["score"] for x in answer])
            found[f"{standard}/{name}/label"] = np.array([x.get("label", x.get("entity")) for x in answer])
    return found


if __name__ == "__main__":
    repo, output, *revision = sys.argv[1:]
    found = load_all_ways(repo, {"revision": revision[0]} if revision else {})
    for i in range(len(TEXTS)):
        agree = np.allclose(found[f"st/embedding/{i}"], found[f"pipeline/embedding/{i}"], atol=1e-5)
        assert agree, "SentenceTransformer gives other embeddings than the multitask pipeline"
    np.savez(output, **found)
