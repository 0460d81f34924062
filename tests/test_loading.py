"""Every way of loading a repository agrees with every other, says nothing, and never leaves a random head."""

import json
import logging
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    pipeline,
)

from modeling_multitask import MultiTaskForTokenClassification, MultiTaskModel, WeightsError
from release import ways as ways_script
from release.export import export
from tasks_multitask import POOLING_MODES
from tests.conftest import ENCODERS, ROOT, TASKS, TEXTS, write_release
from tests.loopback_hub import LoopbackHub

WAYS = Path(ways_script.__file__)


def outputs_in_a_fresh_process(
    repo: str, folder: Path, environment: dict[str, str], *revision: str
) -> dict[str, np.ndarray]:
    """Runs `ways.py` elsewhere; fails on anything that is printed, and returns what each way gave."""
    command = [sys.executable, str(WAYS), repo, str(folder / "outputs.npz"), *revision]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and done.stdout == "", f"loading must be silent, but printed:\n{done.stdout}{done.stderr}"
    with np.load(folder / "outputs.npz") as stored:
        return dict(stored)


def assert_all_ways_agree(found: dict[str, np.ndarray]) -> None:
    """Compares each output across ways, to 1e-6 (relative where values exceed 1)."""
    groups: dict[str, dict[str, np.ndarray]] = {}
    for key, value in found.items():
        way, output = key.split("/", 1)
        if output.startswith(("hidden", "embedding", "logits")):
            groups.setdefault(output, {})[way] = value
    for output, ways in groups.items():
        for way, value in ways.items():
            np.testing.assert_allclose(value, ways["auto"], atol=1e-6, rtol=1e-6, err_msg=f"{output} of {way}")
    assert set(groups["embedding/0"]) >= {"auto", "st", "st_trusted", "pipeline"}
    assert set(groups["hidden/0"]) >= {"auto", "plain", "features"}
    for standard in ("text-classification", "token-classification"):
        if f"{standard}/default" in found:
            np.testing.assert_array_equal(found[f"{standard}/default"], found[f"{standard}/named"])
            assert list(found[f"{standard}/default/label"]) == list(found[f"{standard}/named/label"])


@pytest.fixture(scope="module")
def local_outputs(release, tmp_path_factory):
    return outputs_in_a_fresh_process(str(release), tmp_path_factory.mktemp("local"), dict(os.environ))


def test_all_ways_agree_on_a_local_release(local_outputs):
    assert_all_ways_agree(local_outputs)
    assert set(local_outputs) >= {f"direct/logits.{task}/0" for task in TASKS} | {f"view/logits.{task}/0" for task in TASKS}


def test_all_ways_agree_on_the_shipped_repository(tmp_path):
    assert_all_ways_agree(outputs_in_a_fresh_process(str(ROOT), tmp_path, dict(os.environ)))


def test_a_release_made_from_a_saved_model_is_the_same(release, tmp_path):
    model = AutoModel.from_pretrained(release, trust_remote_code=True)
    model.save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(release).save_pretrained(tmp_path / "saved")
    export(tmp_path / "saved", tmp_path / "again", release, dtype=torch.float32)
    for name in ("config.json", "model.safetensors", "2_Dense/model.safetensors", HEADS):
        assert (tmp_path / "again" / name).read_bytes() == (release / name).read_bytes(), name


@pytest.mark.parametrize("saved_by", ["model", "view", "pipeline"])
def test_a_saved_checkpoint_reloads_whole(release, saved_by, tmp_path):
    original = AutoModel.from_pretrained(release, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(release)
    if saved_by == "pipeline":
        pipeline("multitask", model=str(release), trust_remote_code=True, device="cpu").save_pretrained(str(tmp_path))
    else:
        view = AutoModelForTokenClassification.from_pretrained(release, trust_remote_code=True, task="pos")
        (original if saved_by == "model" else view).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["architectures"] == ["BertModel"] and fields["model_type"] == "bert"
    assert "multitask_weights" not in fields
    assert list(fields["tasks"]) == (["pos", *(x for x in TASKS if x != "pos")] if saved_by == "view" else list(TASKS))
    inputs = tokenizer(TEXTS[0], return_tensors="pt", truncation=True)
    same = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)  # last bits depend on where the weights lie in memory
    with torch.no_grad():
        expected = original(**inputs)
        for model in (MultiTaskModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path, trust_remote_code=True)):
            saved = model.state_dict()
            assert all(torch.equal(saved[name], value) for name, value in original.state_dict().items())
            out = model(**inputs)
            same(out.sentence_embedding, expected.sentence_embedding)
            for name in TASKS:
                same(out.logits[name], expected.logits[name])
        view = AutoModelForSequenceClassification.from_pretrained(tmp_path, trust_remote_code=True, task="topics")
        same(view(**inputs).logits, expected.logits["topics"])
        view = AutoModelForTokenClassification.from_pretrained(tmp_path, trust_remote_code=True)
        first = "pos" if saved_by == "view" else "ner"
        same(view(**inputs).logits, expected.logits[first])  # a saved view opens on the same head
    tokenizer.save_pretrained(tmp_path)
    record = pipeline("multitask", model=str(tmp_path), trust_remote_code=True, device="cpu")(TEXTS[0])
    assert set(record["labels"]) == {"sentiment", "topics", "rating"}


def test_a_configuration_saved_into_its_release_goes_on_loading(release, tmp_path):
    copy = Path(shutil.copytree(release, tmp_path / "copy"))
    config = AutoConfig.from_pretrained(copy, trust_remote_code=True)
    config.tasks["sentiment"]["temperature"] = 2.0
    config.save_pretrained(copy)
    before, after = (AutoModel.from_pretrained(x, trust_remote_code=True) for x in (release, copy))
    inputs = AutoTokenizer.from_pretrained(release)(TEXTS[0], return_tensors="pt", truncation=True)
    with torch.no_grad():
        torch.testing.assert_close(after(**inputs).logits["sentiment"] * 2, before(**inputs).logits["sentiment"])


def test_another_number_of_labels_is_refused_and_not_ignored(release):
    for options in ({"num_labels": 5}, {"num_labels": 2}, {"id2label": {0: "a", 1: "b", 2: "c"}}):
        with pytest.raises(ValueError, match=r"the head 'sentiment' has \['negative'.*add_task"):
            AutoModelForSequenceClassification.from_pretrained(release, trust_remote_code=True, **options)


def test_tuples_asked_for_while_loading(release):
    inputs = AutoTokenizer.from_pretrained(release)("so sad", return_tensors="pt")
    with torch.no_grad():
        out = AutoModel.from_pretrained(release, trust_remote_code=True, return_dict=False)(**inputs)
        view = AutoModelForSequenceClassification.from_pretrained(release, trust_remote_code=True, return_dict=False)(
            **inputs
        )
    assert isinstance(out, tuple) and isinstance(view, tuple) and view[0].shape == (1, 3)


@pytest.mark.parametrize("model_type", ENCODERS)
def test_a_release_of_any_encoder_is_a_sentence_transformer(model_type, tmp_path, caplog):
    release = write_release(tmp_path, model_type)
    with caplog.at_level(logging.WARNING):
        vectors = SentenceTransformer(str(release), device="cpu").encode(["so sad", ""])
        records = pipeline("multitask", model=str(release), trust_remote_code=True, device="cpu")(["so sad", ""])
    np.testing.assert_allclose([record["sentence_embedding"] for record in records], vectors, atol=1e-6)
    assert caplog.text == ""


@pytest.mark.parametrize(("mode", "dim"), [*((mode, 8) for mode in POOLING_MODES), ("mean", None)])
def test_every_pooling_mode_and_no_projection_mean_the_same_to_sentence_transformers(mode, dim, tmp_path):
    release = write_release(tmp_path, pooling_mode=mode, embedding_dim=dim)
    model = AutoModel.from_pretrained(release, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(release)
    vectors = SentenceTransformer(str(release), device="cpu").encode(TEXTS)
    with torch.no_grad():
        expected = [
            model(**tokenizer(text, truncation=True, return_tensors="pt")).sentence_embedding[0].numpy() for text in TEXTS
        ]
    np.testing.assert_allclose(vectors, np.stack(expected), atol=1e-6)


# The Hub


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as hub:
        yield hub


UPLOAD = """
import sys
from huggingface_hub import HfApi
folder, repo = sys.argv[1:3]
HfApi().create_repo(repo, exist_ok=True)
print(HfApi().upload_folder(folder_path=folder, repo_id=repo).oid)
"""


def upload(hub: LoopbackHub, folder: Path, home: Path) -> str:
    """Uploads a folder with the real client and returns the commit."""
    command = [sys.executable, "-c", UPLOAD, str(folder), "user/tiny"]
    done = subprocess.run(command, env=hub.env(home), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


@pytest.mark.slow
def test_all_ways_agree_through_a_hub_with_an_empty_cache_and_a_pinned_revision(hub, release, local_outputs, tmp_path):
    commit = upload(hub, release, tmp_path / "uploader")
    other = write_release(tmp_path, seed=1)
    assert upload(hub, other, tmp_path / "uploader") != commit, "a later commit must not touch the pinned one"
    found = outputs_in_a_fresh_process("user/tiny", tmp_path, hub.env(tmp_path / "reader"), commit)
    assert_all_ways_agree(found)
    for key, value in found.items():
        if value.dtype.kind == "f":
            np.testing.assert_allclose(value, local_outputs[key], atol=1e-6, rtol=1e-6, err_msg=key)


BACKEND = """
import sys
from huggingface_hub import HfApi
from transformers import pipeline
options = {"model": "user/tiny", "trust_remote_code": True, "device": "cpu", "backend": "onnx"}
print(pipeline("multitask", revision=sys.argv[1], **options)("so sad")["sentence_embedding"].tolist())
HfApi().delete_file("onnx/model.onnx", "user/tiny")
pipeline("multitask", **options)
"""


def test_an_export_comes_from_the_pinned_revision(hub, exported_release, tmp_path, pipe):
    commit = upload(hub, exported_release, tmp_path / "uploader")
    command = [sys.executable, "-c", BACKEND, commit]
    done = subprocess.run(
        command, env=hub.env(tmp_path / "reader"), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout, done.stderr
    np.testing.assert_allclose(json.loads(done.stdout), pipe("so sad")["sentence_embedding"], atol=1e-4)
    assert done.returncode and "user/tiny holds no onnx/model.onnx. Write it with" in done.stderr


PUSH = """
import sys
from transformers import AutoModel
AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).push_to_hub("user/pushed")
"""


def test_pushing_a_checkpoint_says_that_it_is_no_release(hub, release, tmp_path):
    command = [sys.executable, "-c", PUSH, str(release)]
    done = subprocess.run(command, env=hub.env(tmp_path), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and "user/pushed gets a checkpoint" in done.stderr
    assert "python -m release.publish" in done.stderr


# Without trust


def test_without_trust_the_embedding_and_the_encoder_are_whole(release, caplog):
    with caplog.at_level(logging.WARNING):
        _, info = AutoModel.from_pretrained(release, output_loading_info=True)
        SentenceTransformer(str(release), device="cpu").encode("x")
    assert not info["missing_keys"] and not info["unexpected_keys"] and caplog.text == ""


@pytest.mark.parametrize("auto_class", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_without_trust_a_new_random_head_is_announced_by_transformers(release, auto_class, caplog):
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        auto_class.from_pretrained(release)
    finally:
        logger.removeHandler(caplog.handler)
    assert "classifier.weight" in caplog.text and "MISSING" in caplog.text


def test_without_trust_there_is_no_multitask_pipeline(release):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        pipeline("multitask", model=str(release))


# Broken repositories


def edit_json(path: Path, change) -> None:
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def edit_weights(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


INDEX, HEADS = "multitask.safetensors.index.json", "heads/model.safetensors"
DAMAGE = {
    "heads file missing": (lambda r: (r / HEADS).unlink(), HEADS),
    "projection file missing": (lambda r: (r / "2_Dense/model.safetensors").unlink(), "2_Dense/model.safetensors"),
    "encoder file missing": (lambda r: (r / "model.safetensors").unlink(), "model.safetensors"),
    "heads cut short": (lambda r: os.truncate(r / HEADS, 900), HEADS),
    "encoder cut short": (lambda r: os.truncate(r / "model.safetensors", 20_000), "model.safetensors"),
    "empty file": (lambda r: (r / HEADS).write_bytes(b""), HEADS),
    "index missing": (lambda r: (r / INDEX).unlink(), f"{INDEX}, which config.json names in 'multitask_weights'"),
    "index no json": (lambda r: (r / INDEX).write_text("{"), INDEX),
    "index without metadata": (lambda r: edit_json(r / INDEX, lambda x: x.pop("metadata")), f"{INDEX}.*'metadata'"),
    "index without map": (lambda r: edit_json(r / INDEX, lambda x: x.pop("weight_map")), f"{INDEX}.*'weight_map'"),
    "index points outside": (
        lambda r: edit_json(r / INDEX, lambda x: x["weight_map"].update({"linear.weight": "../evil.safetensors"})),
        r"weight_map\['linear.weight'\] is '../evil.safetensors'; allowed:",
    ),
    "index points to the root": (
        lambda r: edit_json(r / INDEX, lambda x: x["weight_map"].update({"linear.weight": "/etc/evil.safetensors"})),
        r"weight_map\['linear.weight'\] is '/etc/evil.safetensors'",
    ),
    "index points to a pickle": (
        lambda r: edit_json(r / INDEX, lambda x: x["weight_map"].update({"linear.weight": "pytorch_model.bin"})),
        r"weight_map\['linear.weight'\] is 'pytorch_model.bin'",
    ),
    "index with a number": (
        lambda r: edit_json(r / INDEX, lambda x: x["weight_map"].update({"linear.weight": 3})),
        r"weight_map\['linear.weight'\] is 3",
    ),
    "weight missing": (
        lambda r: edit_weights(r / HEADS, lambda x: x.pop("heads.ner.classifier.bias")),
        f"heads.ner.classifier.bias: missing in {HEADS}",
    ),
    "encoder weight missing": (
        lambda r: edit_weights(r / "model.safetensors", lambda x: x.pop("embeddings.LayerNorm.bias")),
        "embeddings.LayerNorm.bias: missing in model.safetensors",
    ),
    "weight too many": (
        lambda r: edit_weights(r / HEADS, lambda x: x.update(other=torch.zeros(2))),
        "other: stored in heads/model.safetensors, but the index does not name it there",
    ),
    "a second projection where the encoder lies": (
        lambda r: edit_weights(r / "model.safetensors", lambda x: x.update({"linear.weight": -torch.eye(8, 32)})),
        "linear.weight: stored in model.safetensors, but the index does not name it there",
    ),
    "an encoder weight under the model's prefix too": (
        lambda r: edit_weights(r / "model.safetensors", lambda x: x.update({"bert.pooler.dense.bias": torch.zeros(32)})),
        "bert.pooler.dense.bias: stored in model.safetensors, but the index does not name it there",
    ),
    "integers in place of weights": (
        lambda r: edit_weights(r / HEADS, lambda x: x.update({"heads.pos.classifier.bias": torch.zeros(3).long()})),
        "heads.pos.classifier.bias: heads/model.safetensors has dtype I64; weights must be floating-point",
    ),
    "heads of another release": (
        lambda r: edit_weights(r / HEADS, lambda x: x["heads.pos.classifier.bias"].add_(1)),
        "heads/model.safetensors is not the file of this release: its sha256",
    ),
    "more task layers than stored": (
        lambda r: edit_json(r / "config.json", lambda x: x.update(num_task_layers=2)),
        r"task_branch.layers.1.* \(num_task_layers is 2\)",
    ),
    "fewer task layers than stored": (
        lambda r: edit_json(r / "config.json", lambda x: x.update(num_task_layers=0)),
        r"task_branch.casing.weight: stored, but config.json describes no such weight \(num_task_layers is 0\)",
    ),
    "label too many": (
        lambda r: edit_json(r / "config.json", lambda x: x["tasks"]["sentiment"]["labels"].append("mixed")),
        r"heads.sentiment.classifier.weight: heads/model.safetensors holds shape \[3, 32\], config.json asks for \[4, 32\] "
        r"\(tasks.sentiment.labels has 4 labels\)",
    ),
    "task too many": (
        lambda r: edit_json(r / "config.json", lambda x: x["tasks"].update(extra=TASKS["pos"])),
        "heads.extra.classifier.weight: missing in",
    ),
    "other embedding_dim": (
        lambda r: edit_json(r / "config.json", lambda x: x.update(embedding_dim=16)),
        r"linear.weight: 2_Dense/model.safetensors holds shape \[8, 32\], config.json asks for \[16, 32\]",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_broken_repository_names_the_file_and_the_field(release, damage, tmp_path):
    broken = Path(shutil.copytree(release, tmp_path / "broken"))
    breaking, message = DAMAGE[damage]
    breaking(broken)
    with pytest.raises(WeightsError, match=message):
        MultiTaskModel.from_pretrained(broken)


@pytest.mark.parametrize("damage", ["heads file missing", "heads of another release", "label too many"])
def test_no_way_in_loads_a_broken_repository(release, damage, tmp_path):
    broken = Path(shutil.copytree(release, tmp_path / "broken"))
    breaking, message = DAMAGE[damage]
    breaking(broken)
    with pytest.raises(WeightsError, match=message):
        MultiTaskForTokenClassification.from_pretrained(broken)
    for load in (
        lambda: AutoModel.from_pretrained(broken, trust_remote_code=True),
        lambda: pipeline("multitask", model=str(broken), trust_remote_code=True),
        lambda: pipeline("text-classification", model=str(broken), trust_remote_code=True),
    ):
        with pytest.raises(Exception, match=message) as caught:  # the class is that of the repository's own copy of the code
            load()
        assert type(caught.value).__name__ == "WeightsError"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.update(tasks=["sentiment"]), "tasks is .* must be an object"),
        (lambda x: x["tasks"].update(sentiment="three labels"), "tasks.sentiment is 'three labels'"),
        (lambda x: x["tasks"]["ner"].pop("labels"), r"tasks.ner lacks the fields \['labels'\]"),
        (lambda x: x.update(pooling_mode="first"), "config.json: pooling_mode is 'first'"),
        (lambda x: x.update(num_task_layers=-1), "config.json: num_task_layers is -1"),
        (lambda x: x.update(num_task_layers=9), "config.json: num_task_layers is 9; allowed: an integer from 0 .* to 2"),
        (lambda x: x.update(multitask_weights="../x.safetensors.index.json"), "x.safetensors.index.json"),
    ],
)
def test_a_malformed_configuration_names_its_field(release, change, message, tmp_path):
    broken = Path(shutil.copytree(release, tmp_path / "broken"))
    edit_json(broken / "config.json", change)
    for load in (
        lambda: MultiTaskModel.from_pretrained(broken),
        lambda: AutoModel.from_pretrained(broken, trust_remote_code=True),
    ):
        with pytest.raises(Exception, match=message):
            load()


def test_mismatched_sizes_cannot_be_waved_through(release, tmp_path):
    broken = Path(shutil.copytree(release, tmp_path / "broken"))
    edit_json(broken / "config.json", lambda x: x.update(embedding_dim=16))
    with pytest.raises(WeightsError, match="embedding_dim|linear.weight"):
        MultiTaskModel.from_pretrained(broken, ignore_mismatched_sizes=True)


def test_a_plain_encoder_is_not_taken_for_a_multitask_model(release, tmp_path):
    AutoModel.from_pretrained(release).save_pretrained(tmp_path)  # keeps our fields, and not our weights
    with pytest.raises(WeightsError, match=INDEX):
        MultiTaskModel.from_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", lambda x: (x.pop("multitask_weights"), x.update(embedding_dim=None)))
    with pytest.raises(WeightsError, match="heads.ner.classifier.weight: missing in the stored weights"):
        MultiTaskModel.from_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"task_branch.casing.weight: missing .* \(num_task_layers is 1\)"):
        MultiTaskModel.from_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", lambda x: x.update(tasks={}, num_task_layers=0))
    assert len(MultiTaskModel.from_pretrained(tmp_path).heads) == 0  # asks for nothing that is not there


def test_saving_into_a_release_is_refused(release):
    model = MultiTaskModel.from_pretrained(release)
    with pytest.raises(ValueError, match="holds a release .* release.export"):
        model.save_pretrained(release)
