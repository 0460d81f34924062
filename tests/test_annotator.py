"""An annotator on an export: the pipeline's records without PyTorch and transformers, and refusals that say what to fix."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import pipeline

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")

from annotator_multitask import ONNX_FILES, Annotator  # noqa: E402
from release import onnx as release_onnx  # noqa: E402
from tests.conftest import ROOT, TASKS, TEXTS, WINDOW, write_release  # noqa: E402
from tests.loopback_hub import LoopbackHub  # noqa: E402

ODD = [
    "",
    "   ",
    "a\u0300" * 40,
    "\u0902 " * 3 * WINDOW,
    "[SEP] [MASK]",
    "Paris. " * WINDOW,
    "\u200bParis\x00",
    "PARIS 2024!",
]
MIXED = [text for pair in zip([*TEXTS, *TEXTS], ODD, strict=False) for text in pair]
# Modules that are None cannot be imported.
RECORDS = """
import pickle, sys
sys.modules["torch"] = sys.modules["transformers"] = None
from annotator_multitask import Annotator
source, backend, revision = sys.argv[1:]
hub = {"revision": revision} if revision else {}
texts = pickle.load(sys.stdin.buffer)
sys.stdout.buffer.write(pickle.dumps(list(Annotator.from_export(source, backend, threads=2, **hub).stream(texts))))
"""


@pytest.fixture
def copied(exported_release: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported_release, tmp_path / "copy")


def read(source: str | Path, backend: str = "onnx", revision: str = "", **options: Any) -> list[dict[str, Any]]:
    """Returns the records of `MIXED` from a process that cannot import PyTorch and transformers."""
    command = [sys.executable, "-c", RECORDS, str(source), backend, revision]
    run = subprocess.run(command, input=pickle.dumps(MIXED), cwd=ROOT, stdout=subprocess.PIPE, check=True, **options)
    return pickle.loads(run.stdout)


@pytest.mark.parametrize("backend", ONNX_FILES)
def test_records_are_the_pipelines_to_the_bit(exported_release, backend):
    pipe = pipeline("multitask", model=str(exported_release), trust_remote_code=True, device="cpu", backend=backend)
    for found, expected in zip(read(exported_release, backend), pipe(MIXED), strict=True):
        np.testing.assert_array_equal(found.pop("sentence_embedding"), expected.pop("sentence_embedding"))
        assert found == expected


def test_another_encoder_with_its_own_tokenizer(tmp_path):
    folder = write_release(tmp_path, "roberta")
    release_onnx.export(folder, folder)
    pipe = pipeline("multitask", model=str(folder), trust_remote_code=True, device="cpu", backend="onnx")
    assert [x["entities"] for x in read(folder)] == [x["entities"] for x in pipe(MIXED)]


UPLOAD = """
import sys
from huggingface_hub import HfApi
HfApi().create_repo("user/model")
print(HfApi().upload_folder(folder_path=sys.argv[1], repo_id="user/model").oid)
HfApi().delete_file("tokenizer.json", "user/model")
"""


def test_a_model_on_the_hub_at_a_revision(exported_release, tmp_path):
    with LoopbackHub() as hub:
        env = hub.env(tmp_path / "home")
        commit = subprocess.check_output([sys.executable, "-c", UPLOAD, exported_release], env=env, text=True).split()[-1]
        found = read("user/model", revision=commit, env=env)
        assert [x["labels"] for x in found] == [x["labels"] for x in read(exported_release)]
        with pytest.raises(subprocess.CalledProcessError) as failed:
            read("user/model", revision="main", env=env, stderr=subprocess.PIPE)
    assert b"ValueError: user/model holds no tokenizer.json" in failed.value.stderr


def test_the_command_line_writes_the_same_with_several_processes(exported_release, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in MIXED), "utf-8")
    written = []
    for workers in (1, 2):
        target = tmp_path / f"{workers}.jsonl"
        given = [
            "--model",
            exported_release,
            "--backend",
            "onnx",
            "--input",
            source,
            "--output",
            target,
            "--num-workers",
            str(workers),
        ]
        subprocess.run([sys.executable, ROOT / "annotate.py", *given], check=True)
        written.append(target.read_bytes())
    assert written[0] == written[1] and written[0].count(b"\n") == len(MIXED)


def test_a_file_that_is_missing_or_no_object_is_named(copied):
    for name, content, message in (
        ("onnx/model.onnx", None, r"holds no onnx/model\.onnx\. Write it with: python -m release\.onnx"),
        ("tokenizer.json", None, r"holds no tokenizer\.json"),
        ("tokenizer_config.json", "[", r"tokenizer_config\.json is no JSON"),
        ("config.json", "[]", r"holds no config\.json with a JSON object"),
        ("config.json", "{}", r"config\.json: tasks is None; allowed: an object"),
        ("config.json", None, r"holds no config\.json"),
    ):
        before = (copied / name).read_bytes()
        (copied / name).unlink() if content is None else (copied / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            Annotator.from_export(copied, "onnx")
        (copied / name).write_bytes(before)
    annotator = Annotator.from_export(copied, "onnx")
    for options, message in (
        ({"texts": "a"}, r"texts is the text 'a'; allowed: an iterable of texts"),
        ({"tasks": ["nothing"]}, r"tasks holds \['nothing'\]"),
        ({"embedding": "both"}, "embedding is 'both'"),
        ({"min_score": 2}, "min_score is 2"),
    ):
        with pytest.raises(ValueError, match=message):
            list(annotator.stream(**{"texts": TEXTS, **options}))
    with pytest.raises(ValueError, match="backend is 'torch'; allowed: onnx or onnx-int8"):
        Annotator.from_export(copied, "torch")


def test_a_tokenizer_that_is_not_the_models_is_refused(copied):
    fields = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**fields, "vocab_size": 100_000}))
    with pytest.raises(ValueError, match="it is not this model's tokenizer"):
        Annotator.from_export(copied, "onnx")


def test_an_export_with_labels_in_another_order_is_refused(copied):
    fields = json.loads((copied / "config.json").read_text())
    fields["tasks"]["sentiment"]["labels"] = TASKS["sentiment"]["labels"][::-1]
    (copied / "config.json").write_text(json.dumps(fields))
    annotator = Annotator.from_export(copied, "onnx")
    with pytest.raises(ValueError, match=r"model\.onnx has the labels .* export again"):
        list(annotator.stream(TEXTS))
    with pytest.raises(ValueError, match=r"model_tasks\.onnx has the labels .* export again"):
        list(annotator.stream(TEXTS, embedding=False))
