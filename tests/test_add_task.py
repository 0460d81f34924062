"""The command that adds a task: from a file, to a release or a checkpoint, with everything else left as it is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from safetensors.torch import load_file
from transformers import AutoModel

from modeling_multitask import MultiTaskModel
from release.export import export
from tests.conftest import TEXTS, tiny_model, tiny_tokenizer
from training import add_task

TASKS = {"sentiment": {"kind": "sequence_classification", "labels": ["negative", "neutral", "positive"]}}
CITIES = [f"{'paris' if i % 2 else 'love'} {'store ' * (i // 2 % 3)}{i // 2}" for i in range(40)]
LABELS = ["city" if i % 2 else "other" for i in range(40)]
TAGS = ["O", "B-LOC", "I-LOC"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny model with a task branch."""
    folder = tmp_path_factory.mktemp("models") / "checkpoint"
    tiny_model(tasks=TASKS, num_task_layers=1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source(checkpoint: Path) -> Path:
    """A release of it."""
    encoder = checkpoint.parent / "encoder"
    MultiTaskModel.from_pretrained(checkpoint).encoder.save_pretrained(encoder)
    tiny_tokenizer().save_pretrained(encoder)
    export(checkpoint, checkpoint.parent / "release", encoder)
    return checkpoint.parent / "release"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A csv file as a spreadsheet writes it, with a byte order mark, a missing label and a line break in a text."""
    rows = [f'"{text}",{label}' for text, label in zip(CITIES, LABELS, strict=True)]
    path = tmp_path / "mine.csv"
    path.write_text("\n".join(["message,intent", *rows, '"paris\nstore",', ",city"]), "utf-8-sig")
    return path


def command(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> None:
    monkeypatch.setattr("sys.argv", ["add_task", *map(str, arguments)])
    add_task.main()


def assert_only_the_head_is_new(source: Path, output: Path, name: str) -> None:
    before, after = (
        {key: x for path in sorted(folder.glob("**/*.safetensors")) for key, x in load_file(path).items()}
        for folder in (source, output)
    )
    assert all(torch.equal(x, after[key]) and x.dtype == after[key].dtype for key, x in before.items())
    assert {key.split(".")[1] for key in set(after) - set(before)} == {name}
    model, grown = (AutoModel.from_pretrained(x, trust_remote_code=True) for x in (source, output))
    inputs = tiny_tokenizer()(TEXTS, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        then, now = model(**inputs), grown(**inputs)
    assert torch.equal(then.sentence_embedding, now.sentence_embedding)
    assert all(torch.equal(x, now.logits[task]) for task, x in then.logits.items())


def test_a_csv_makes_a_release_of_a_release(source, table, tmp_path, monkeypatch, capsys):
    output = tmp_path / "output"
    columns = ("--text-column", "message", "--label-column", "intent")
    command(monkeypatch, source, "--data", table, *columns, "--test", table, "--output", output)
    said = capsys.readouterr().out
    assert "intent: 2 label(s) from 40 rows, 2 left out" in said and "on 40 held-out rows" in said
    assert "on 40 rows of the test split" in said
    assert_only_the_head_is_new(source, output, "intent")
    for file in ("model.safetensors", "tokenizer.json", "2_Dense/model.safetensors"):
        assert (output / file).read_bytes() == (source / file).read_bytes(), file


def test_a_checkpoint_stays_a_checkpoint(checkpoint, table, tmp_path, monkeypatch):
    output = tmp_path / "output"
    columns = ("--text-column", "message", "--label-column", "intent", "--name", "place")
    command(monkeypatch, checkpoint, "--data", table, *columns, "--output", output)
    assert not (output / "multitask.safetensors.index.json").exists()
    assert_only_the_head_is_new(checkpoint, output, "place")


def test_labels_are_read_from_every_format(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"t": "a", "l": ["x"]}\n\n{"t": "b", "l": [[0, 1, "PER"]]}\n{"t": "c"}\n')
    assert add_task.read_file(path, "t", "l") == (["a", "b", "c"], [["x"], [[0, 1, "PER"]], None])
    features = Features({"t": Value("string"), "l": ClassLabel(names=["no", "yes"])})
    Dataset.from_dict({"t": ["a", "b", "c"], "l": [1, 0, -1]}, features=features).to_parquet(tmp_path / "a.parquet")
    assert add_task.read_file(tmp_path / "a.parquet", "t", "l") == (["a", "b", "c"], ["yes", "no", None])
    path = tmp_path / "a.csv"
    for given, expected in [("1 2 1", ["1", "2", "1"]), ("1.5 2 1", [1.5, 2.0, 1.0]), ("1 x 1", ["1", "x", "1"])]:
        path.write_text("t,l\n" + "\n".join(f"a,{x}" for x in given.split()))
        assert add_task.read_file(path, "t", "l")[1] == expected


def test_what_cannot_be_read_is_refused(source, table, tmp_path, monkeypatch):
    output = ("--output", tmp_path / "output")
    for arguments, message in [
        (
            (source, "--data", table, "--text-column", "text", "--label-column", "intent"),
            r"no column \['text'\]; it has: message",
        ),
        (
            (source, "--data", tmp_path / "x.xlsx", "--text-column", "a", "--label-column", "b"),
            r"allowed: a file that ends in",
        ),
        (
            ("no such/model", "--data", table, "--text-column", "message", "--label-column", "intent"),
            "MODEL is 'no such/model'",
        ),
    ]:
        with pytest.raises(SystemExit, match=message):
            command(monkeypatch, *arguments, *output)
    with pytest.raises(SystemExit, match="exists and is not empty"):
        columns = ("--text-column", "message", "--label-column", "intent")
        command(monkeypatch, source, "--data", table, *columns, "--output", tmp_path)
    assert not (tmp_path / "output").exists()
