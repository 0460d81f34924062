"""The release layout and its lint, and this very repository: its weights, its quality, its answers."""

import json
import os
import pickle
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig, AutoModel, AutoTokenizer, pipeline

from annotator_multitask import group_scores
from common.data import token_spans
from configuration_multitask import WEIGHTS_INDEX
from evaluation.metrics import (
    classification,
    cosines,
    entities,
    entities_to_tags,
    neighbours_shared,
    rank_correlations,
)
from modeling_multitask import MultiTaskModel
from release import golden
from release.check import check
from release.export import export
from tests.conftest import ROOT, TASKS, TEXTS, tiny_model, write_checkpoint, write_release
from weights_multitask import WeightsError, sha256

# The layout


def test_each_weight_is_stored_once_under_the_name_its_readers_know(release):
    model = tiny_model(num_task_layers=1)
    encoder = load_file(release / "model.safetensors")
    assert set(encoder) == set(model.encoder.state_dict()), "unprefixed, as sentence-transformers would write it"
    assert set(load_file(release / "2_Dense/model.safetensors")) == {"linear.weight"}
    heads = load_file(release / "heads/model.safetensors")
    assert {key.split(".")[1] for key in heads if key.startswith("heads.")} == set(TASKS)
    assert {key for key in heads if not key.startswith("heads.")} == {
        f"task_branch.{key}" for key in model.task_branch.state_dict()
    }
    index = json.loads((release / "multitask.safetensors.index.json").read_text())
    assert len(index["weight_map"]) == len(encoder) + 1 + len(heads)


def test_the_encoders_files_are_copied_byte_for_byte_and_their_sums_are_kept(tmp_path):
    checkpoint, encoder = write_checkpoint(tmp_path, num_task_layers=1)
    weights = load_file(encoder / "model.safetensors")
    weights["embeddings.position_ids"] = torch.arange(32)[None]  # as in older checkpoints: a buffer that nobody reads
    save_file(weights, encoder / "model.safetensors", metadata={"format": "pt"})
    export(checkpoint, tmp_path / "release", encoder)
    digests = json.loads((tmp_path / "release" / WEIGHTS_INDEX).read_text())["metadata"]["sha256"]
    for name in ("model.safetensors", "tokenizer.json"):
        assert (encoder / name).read_bytes() == (tmp_path / "release" / name).read_bytes()
        assert digests[name] == sha256(encoder / name)
    assert {x.dtype for x in load_file(tmp_path / "release/heads/model.safetensors").values()} == {torch.float16}
    assert check(tmp_path / "release") == []


def test_an_encoder_that_differs_by_a_bit_or_is_not_named_is_refused(tmp_path):
    checkpoint, encoder = write_checkpoint(tmp_path, num_task_layers=1)
    with pytest.raises(WeightsError, match="num_task_layers is 1.*--encoder"):
        export(checkpoint, tmp_path / "release")
    weights = load_file(encoder / "model.safetensors")
    bits = weights["embeddings.LayerNorm.weight"].view(torch.int32)
    bits[0] ^= 1
    save_file(weights, encoder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match="1 weights of the encoder, embeddings.LayerNorm.weight first, are not those of"):
        export(checkpoint, tmp_path / "release", encoder)
    assert not (tmp_path / "release/config.json").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 70_000.0])
def test_weights_that_are_not_finite_are_refused_on_export_load_and_check(value, release, tmp_path):
    checkpoint, encoder = write_checkpoint(tmp_path, num_task_layers=1)
    weights = load_file(checkpoint / "model.safetensors")
    weights["heads.ner.classifier.bias"][0] = value
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match="heads.ner.classifier.bias"):
        export(checkpoint, tmp_path / "release", encoder)
    if value == 70_000.0:
        return  # too great for float16 alone
    broken = Path(shutil.copytree(release, tmp_path / "broken"))
    stored = load_file(broken / "heads/model.safetensors")
    stored["heads.ner.classifier.bias"][0] = value
    save_file(stored, broken / "heads/model.safetensors", metadata={"format": "pt"})
    index = json.loads((broken / WEIGHTS_INDEX).read_text())
    index["metadata"]["sha256"]["heads/model.safetensors"] = sha256(broken / "heads/model.safetensors")
    (broken / WEIGHTS_INDEX).write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="heads.ner.classifier.bias: holds values that are not finite"):
        MultiTaskModel.from_pretrained(broken)
    assert any("heads.ner.classifier.bias: holds values that are not finite" in x for x in check(broken))


def test_an_interrupted_export_leaves_nothing_that_loads(tmp_path, monkeypatch):
    checkpoint, encoder = write_checkpoint(tmp_path, num_task_layers=1)
    output = tmp_path / "release"
    export(checkpoint, output, encoder)
    moves = len([x for x in output.rglob("*") if x.is_file()])
    replace = Path.replace
    for stop in (0, 1, moves // 2, moves - 2, moves - 1):  # config.json and the index, which are the first to go, come last
        done = []

        def move(self, target, done=done, stop=stop):
            if len(done) == stop:
                raise KeyboardInterrupt
            done.append(target)
            return replace(self, target)

        monkeypatch.setattr(Path, "replace", move)
        with pytest.raises(KeyboardInterrupt):
            export(checkpoint, output, encoder)
        monkeypatch.setattr(Path, "replace", replace)
        missing = WEIGHTS_INDEX if stop == moves - 1 else "config.json"
        assert not (output / missing).exists()
        with pytest.raises((OSError, ValueError, WeightsError)):
            AutoConfig.from_pretrained(output, trust_remote_code=True)
            MultiTaskModel.from_pretrained(output)
    export(checkpoint, output, encoder)
    assert check(output) == [] and not list(output.glob(".export-*"))


def test_sentence_transformers_files_have_the_forms_that_old_readers_know(release):
    modules = json.loads((release / "modules.json").read_text())
    assert [x["type"] for x in modules] == [
        f"sentence_transformers.models.{name}" for name in ("Transformer", "Pooling", "Dense", "Normalize")
    ]
    assert [x["path"] for x in modules] == ["", "1_Pooling", "2_Dense", "3_Normalize"]
    dense = json.loads((release / "2_Dense/config.json").read_text())
    assert dense == {
        "in_features": 32,
        "out_features": 8,
        "bias": False,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    pooling = json.loads((release / "1_Pooling/config.json").read_text())
    assert pooling["word_embedding_dimension"] == 32
    assert [name for name, value in pooling.items() if value is True] == ["pooling_mode_mean_tokens"]
    assert json.loads((release / "sentence_bert_config.json").read_text()) == {"max_seq_length": 32, "do_lower_case": False}


def test_half_precision_weights_load_as_float32(release, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "checkpoint")
    AutoTokenizer.from_pretrained(release).save_pretrained(tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "half")
    stored = load_file(tmp_path / "half/model.safetensors")
    assert {x.dtype for x in stored.values() if x.is_floating_point()} == {torch.float16}
    loaded = AutoModel.from_pretrained(tmp_path / "half", trust_remote_code=True)
    assert {x.dtype for x in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.linear.weight, model.linear.weight.half().float())


def test_export_sets_a_missing_length_and_clears_what_an_earlier_release_left(release, tmp_path):
    model = tiny_model(tasks={}, embedding_dim=None)
    model.save_pretrained(tmp_path / "checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(release)
    tokenizer.model_max_length = 10**30
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    output = Path(shutil.copytree(release, tmp_path / "output"))
    (output / "onnx").mkdir()
    (output / "onnx/model.onnx").write_bytes(b"of earlier weights")
    export(tmp_path / "checkpoint", output)
    assert check(output) == [] and not (output / "heads/model.safetensors").exists()
    assert not (output / "onnx/model.onnx").exists(), "the pipeline would answer with the earlier weights"
    assert json.loads((output / "tokenizer_config.json").read_text())["model_max_length"] == 32


# The lint


def test_a_good_release_has_no_problems(release):
    assert check(release) == []


def save_other_heads(folder: Path) -> Path:
    """Changes one weight of the heads, as another release would."""
    path = folder / "heads/model.safetensors"
    stored = load_file(path)
    stored["heads.ner.classifier.bias"][0] += 1
    save_file(stored, path, metadata={"format": "pt"})
    return path


def edit(path: Path, **fields) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **fields}))


DAMAGE = {
    "a missing tokenizer": (lambda r: (r / "tokenizer.json").unlink(), "tokenizer.json: missing"),
    "another attention": (
        lambda r: edit(r / "config.json", attn_implementation="eager"),
        "config.json: attn_implementation",
    ),
    "a head of another release": (
        lambda r: os.utime(save_other_heads(r)),
        "heads/model.safetensors is not the file of this release",
    ),
    "a code file missing": (lambda r: (r / "modeling_multitask.py").unlink(), "modeling_multitask.py: missing"),
    "a pickle": (lambda r: (r / "onnx").mkdir() or (r / "onnx/x.bin").touch(), "onnx/x.bin: may hold pickled code"),
    "a pickle by another name": (lambda r: (r / "notes.txt").write_bytes(pickle.dumps({})), "notes.txt: may hold pickled"),
    "an archive of pickles": (lambda r: torch.save({}, r / "README.md"), "README.md: may hold pickled code"),
    "no configuration": (lambda r: (r / "config.json").unlink(), "config.json: cannot be read"),
    "a bad field": (lambda r: edit(r / "config.json", pooling_mode="sum"), "config.json: pooling_mode is 'sum'"),
    "another class": (lambda r: edit(r / "config.json", architectures=["MultiTaskModel"]), "config.json: architectures is"),
    "a foreign auto_map": (
        lambda r: edit(r / "config.json", auto_map={"AutoModel": "u/r--m.M"}),
        "config.json: auto_map is",
    ),
    "labels twice": (lambda r: edit(r / "config.json", id2label={"0": "a"}), "config.json: remove id2label and label2id"),
    "half dtype": (lambda r: edit(r / "config.json", dtype="float16"), "config.json: dtype is 'float16'"),
    "a new label": (
        lambda r: edit(r / "config.json", tasks={**TASKS, "pos": {**TASKS["pos"], "labels": ["A", "B"]}}),
        "heads.pos.classifier.bias: heads/model.safetensors holds shape [3], config.json asks for [2]",
    ),
    "new module names": (
        lambda r: (r / "modules.json").write_text((r / "modules.json").read_text().replace(".models.Dense", ".base.Dense")),
        "modules.json: holds",
    ),
    "another pooling": (
        lambda r: edit(r / "1_Pooling/config.json", pooling_mode_cls_token=True),
        "1_Pooling/config.json: holds",
    ),
    "an activation": (lambda r: edit(r / "2_Dense/config.json", activation_function="torch.nn.Tanh"), "2_Dense/config.json"),
    "another length": (lambda r: edit(r / "sentence_bert_config.json", max_seq_length=9), 'holds {"max_seq_length": 9'),
    "no index": (lambda r: (r / "multitask.safetensors.index.json").unlink(), "is unreadable"),
    "an index entry too few": (
        lambda r: (r / "multitask.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": {"linear.weight": "2_Dense/model.safetensors"}})
        ),
        "multitask.safetensors.index.json: embeddings.LayerNorm.bias should be in model.safetensors",
    ),
    "an index that points outside": (
        lambda r: edit(r / "multitask.safetensors.index.json", weight_map={"linear.weight": "../x.safetensors"}),
        "'../x.safetensors'; allowed",
    ),
    "weights beside the encoder": (
        lambda r: shutil.copy(r / "heads/model.safetensors", r / "heads.safetensors"),
        "heads.safetensors: servers load the weights of the root into the encoder",
    ),
    "heads cut short": (
        lambda r: os.truncate(r / "heads/model.safetensors", 99),
        "heads/model.safetensors is missing or broken",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_lint_names_what_is_wrong(release, damage, tmp_path):
    broken = Path(shutil.copytree(release, tmp_path / "broken"))
    breaking, message = DAMAGE[damage]
    breaking(broken)
    problems = check(broken)
    assert any(message in problem for problem in problems), problems


def test_the_lint_leaves_out_what_git_ignores_and_says_when_git_cannot_tell(release, tmp_path):
    checkout = Path(shutil.copytree(release, tmp_path / "checkout"))
    subprocess.run(["git", "init", "-q", str(checkout)], check=True)
    (checkout / ".gitignore").write_text("/runs/\n")
    (checkout / "runs").mkdir()
    (checkout / "runs/optimizer.pt").touch()
    assert check(checkout) == []
    (checkout / "optimizer.pt").touch()
    assert len(check(checkout)) == 1
    (checkout / ".git/HEAD").unlink()
    assert any("git cannot list its files" in problem for problem in check(checkout))


def test_the_lint_of_no_folder():
    assert check("/no/such/folder") == ["/no/such/folder: no such folder"]


def test_the_lint_accepts_other_shapes_of_model(tmp_path):
    assert check(write_release(tmp_path / "a", "modernbert", embedding_dim=None, pooling_mode="cls")) == []
    assert check(write_release(tmp_path / "b", "roberta", tasks={})) == []


# This repository

# A few points below what the released heads reach on the samples.
SENTIMENT_FLOOR, EMOTION_FLOOR, ENTITY_FLOOR = 0.6, 0.5, 0.7


@pytest.fixture(scope="module")
def shipped():
    return pipeline("multitask", model=str(ROOT), trust_remote_code=True, device="cpu")


def sample(name: str) -> list[dict]:
    return [json.loads(line) for line in (ROOT / f"tests/samples/{name}.jsonl").read_text("utf-8").splitlines()]


def test_this_repository_is_a_good_release():
    assert check(ROOT) == []


def test_golden_answers(shipped):
    assert golden.differences(golden.answers(shipped), json.loads(golden.GOLDEN.read_text("utf-8"))) == []


def test_the_vector_is_the_same_through_sentence_transformers(shipped):
    texts = [*golden.SENTENCES, *TEXTS]
    vectors = SentenceTransformer(str(ROOT), device="cpu").encode(texts)
    ours = np.stack([record["sentence_embedding"] for record in shipped(texts)])
    assert vectors.shape == (len(texts), 256)
    np.testing.assert_allclose(ours, vectors, atol=1e-6)


def test_quality_of_sentiment_does_not_fall(shipped):
    rows = sample("sentiment")
    records = shipped([row["text"] for row in rows], tasks=["sentiment"], embedding=False)
    labels = [record["labels"]["sentiment"]["label"] for record in records]
    found = classification([row["label"] for row in rows], labels).metrics()
    assert len(rows) == 200 and found["macro_recall"] >= SENTIMENT_FLOOR, found


def test_quality_of_emotions_in_ekmans_groups_does_not_fall(shipped):
    rows = sample("emotion")
    records = shipped([row["text"] for row in rows], tasks=["emotion"], embedding=False)
    grouped = [group_scores(record["labels"]["emotion"]["scores"]) for record in records]
    found = classification([row["label"] for row in rows], [max(x, key=x.get) for x in grouped]).metrics()
    assert len(rows) == 200 and found["macro_f1"] >= EMOTION_FLOOR, found


def test_quality_of_entities_does_not_fall(shipped):
    rows = sample("ner")
    records = shipped([" ".join(row["tokens"]) for row in rows], tasks=["ner"], embedding=False)
    predicted = [
        entities_to_tags(token_spans(row["tokens"]), record["entities"]["ner"])
        for row, record in zip(rows, records, strict=True)
    ]
    found = entities([row["tags"] for row in rows], predicted).metrics()
    assert len(rows) == 200 and found["f1"] >= ENTITY_FLOOR, found


def test_quality_of_embeddings_does_not_fall(shipped):
    rows = sample("similarity")
    first, second = (
        np.stack([record["sentence_embedding"] for record in shipped([row[side] for row in rows], tasks=[])])
        for side in ("sentence1", "sentence2")
    )
    scores = [row["score"] for row in rows]
    assert len(rows) == 200
    values = {"whole": cosines(first, second), "prefix": cosines(first[:, :64], second[:, :64])}
    found = rank_correlations(values, scores).metrics()
    assert found["whole"] >= 0.81
    assert found["prefix"] >= 0.75, "a prefix is a good embedding too"


def test_every_file_of_the_repository_deserves_its_place():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("no git checkout")
    files = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    large = {str(path.relative_to(ROOT)) for path in files if path.exists() and path.stat().st_size > 1_000_000}
    assert large == {"model.safetensors", "heads/model.safetensors"}


def test_the_encoder_and_its_tokenizer_are_upstreams_files():
    """People pin these sums of sentence-transformers/all-MiniLM-L6-v2 in production."""
    assert sha256(ROOT / "model.safetensors") == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert sha256(ROOT / "tokenizer.json") == "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
    assert json.loads((ROOT / WEIGHTS_INDEX).read_text())["metadata"]["encoder"] == "sentence-transformers/all-MiniLM-L6-v2"


# Metrics


def test_entities_become_tags_and_a_part_of_a_token_is_not_the_token():
    spans = [(0, 3), (4, 8), (9, 18)]  # "Tim Cook New-Yorker"
    whole = [{"start": 0, "end": 8, "entity_group": "PER"}]
    assert entities_to_tags(spans, whole) == ["B-PER", "I-PER", "O"]
    assert entities_to_tags(spans, [{"start": 13, "end": 18, "entity_group": "LOC"}]) == ["O", "O", "B-LOC-partial"]
    assert entities_to_tags(spans, [{"start": 9, "end": 12, "entity_group": "LOC"}]) == ["O", "O", "B-LOC-partial"]


def test_metrics_by_hand():
    found = classification(["a", "a", "b"], ["a", "b", "b"]).metrics()
    assert found["macro_recall"] == pytest.approx(0.75) and found["accuracy"] == pytest.approx(2 / 3)
    found = entities([["B-X", "I-X", "O", "B-Y"]], [["B-X", "I-X", "O", "O"]]).metrics()
    assert found == {"f1": pytest.approx(2 / 3), "precision": 1.0, "recall": 0.5, "f1_X": 1.0, "f1_Y": 0.0}
    vectors = np.array([[1.0, 0], [1, 0], [1, 0]]), np.array([[1.0, 0], [1, 1], [0, 1]])
    assert rank_correlations({"x": cosines(*vectors)}, [5.0, 2.0, 1.0]).metrics()["x"] == pytest.approx(1.0)


def test_neighbour_overlap_by_hand():
    angles = np.radians([0, 10, 30, 180, 190])
    before = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    rotated = before @ np.array([[0, 1], [-1, 0]])
    assert neighbours_shared(before, rotated, count=1).mean() == 1.0  # a rotation moves no neighbour
    after = before[[0, 1, 3, 2, 4]]
    assert neighbours_shared(before, after, count=1).mean() == pytest.approx(2 / 5)  # texts 0 and 1 keep each other
