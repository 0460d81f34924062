"""Each requirements file is enough for the commands that README and docs name with it: tried in fresh environments."""

import subprocess
import venv
from pathlib import Path

import pytest

from tests.conftest import ROOT, write_release
from tests.test_consumers import lend

pytestmark = pytest.mark.environments
EXAMPLES = [
    "message,intent",
    *(f"text {i} {'rain' if i % 2 else 'alarm'},{'weather' if i % 2 else 'clock'}" for i in range(20)),
]


def run(*command: str | Path) -> str:
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def environment(folder: Path, requirements: str) -> Path:
    """Returns the Python of a fresh environment; torch is lent, to spare a large download."""
    venv.create(folder, with_pip=True)
    lend("torch", next(folder.glob("lib/python*/site-packages")))
    install(folder / "bin/python", "-r", requirements)
    return folder / "bin/python"


def install(python: Path, *packages: str) -> None:
    run(python, "-m", "pip", "install", "-q", "--no-compile", *packages, "-c", "constraints.txt")


def test_requirements_are_enough_to_annotate_learn_and_with_three_packages_to_export(tmp_path):
    python = environment(tmp_path / "use", "requirements.txt")
    assert "sentiment" in run(python, "annotate.py", "I love it!")
    learn = "annotate.add_task('a', ['x', 'y'] * 4, ['p', 'q'] * 4)"
    load = "from transformers import pipeline; annotate = pipeline('multitask', model='.', trust_remote_code=True)"
    run(python, "-c", f"{load}; {learn}")
    folder = write_release(tmp_path / "model")
    install(python, "onnx", "onnxscript", "onnxruntime")
    run(python, "-m", "release.onnx", folder)
    assert (folder / "onnx/model_quantized.onnx").exists()


def test_training_requirements_are_enough_to_train_evaluate_and_add_a_task(tmp_path):
    python = environment(tmp_path / "train", "requirements-train.txt")
    data, release = tmp_path / "mine.csv", write_release(tmp_path / "model")
    data.write_text("\n".join(EXAMPLES), "utf-8")
    columns = ("--text-column", "message", "--label-column", "intent")
    said = run(python, "-m", "training.add_task", release, "--data", data, *columns, "--output", tmp_path / "grown")
    assert "intent: 2 label(s) from 20 rows" in said
    for module in ("training.train", "training.projection", "training.sources", "evaluation.evaluate", "release.publish"):
        run(python, "-m", module, "--help")
