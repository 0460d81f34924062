"""Each requirements file is enough for the commands that README and docs name with it: tried in fresh environments."""

import subprocess
import venv
from pathlib import Path

import pytest

from tests.conftest import ROOT, write_release
from tests.test_consumers import LENT, lend

pytestmark = pytest.mark.environments
EXAMPLES = [
    "message,intent",
    *(f"text {i} {'rain' if i % 2 else 'alarm'},{'weather' if i % 2 else 'clock'}" for i in range(20)),
]


def run(*command: str | Path) -> str:
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def install(python: Path, *packages: str) -> None:
    run(python, "-m", "pip", "install", "-q", "--no-compile", *packages, "-c", "constraints.txt")


def test_the_requirements_named_for_each_command_are_enough(tmp_path):
    """One environment that grows in the order of the documents: to use, with three packages to export, to train."""
    venv.create(tmp_path / "environment", with_pip=True)
    python = tmp_path / "environment/bin/python"
    lend(LENT, next((tmp_path / "environment").glob("lib/python*/site-packages")))
    folder, data = write_release(tmp_path / "model"), tmp_path / "mine.csv"

    install(python, "-r", "requirements.txt")
    assert "sentiment" in run(python, "annotate.py", "I love it!")
    learn = "annotate.add_task('a', ['x', 'y'] * 4, ['p', 'q'] * 4)"
    load = "from transformers import pipeline; annotate = pipeline('multitask', model='.', trust_remote_code=True)"
    run(python, "-c", f"{load}; {learn}")

    install(python, "onnx", "onnxscript", "onnxruntime")
    run(python, "-m", "release.onnx", folder)
    assert (folder / "onnx/model_quantized.onnx").exists()

    install(python, "-r", "requirements-train.txt")
    data.write_text("\n".join(EXAMPLES), "utf-8")
    columns = ("--text-column", "message", "--label-column", "intent")
    said = run(python, "-m", "training.add_task", folder, "--data", data, *columns, "--output", tmp_path / "grown")
    assert "intent: 2 label(s) from 20 rows" in said
    run(python, "-c", "import training.train, training.projection, training.sources, evaluation.evaluate, release.publish")
