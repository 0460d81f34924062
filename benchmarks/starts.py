"""Measures what it takes to annotate one text from the shell, libraries included: `python -m benchmarks.starts`.

For each backend that this folder holds an export for, and for the three models that this one replaces where they are
installed: the median seconds, in alternating rounds, and the greatest memory. Results go to results/starts.json.
"""

import argparse
import statistics
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from annotator_multitask import BACKENDS, ONNX_FILES
from benchmarks.run import SHORT_TEXT, positive, write_result
from common.files import ROOT

# Runs a command and prints the seconds and the bytes of memory that it took. A process of its own, since one inherits its
# parent's peak.
WATCH = """
import resource, subprocess, sys, time
start = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(time.perf_counter() - start, peak * (1 if sys.platform == "darwin" else 1024))
"""
# One text by the three models that this one replaces, in one process.
THREE_MODELS = """
import sys
import en_core_web_sm
from sentence_transformers import SentenceTransformer
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
SentenceTransformer(sys.argv[1], device="cpu").encode(sys.argv[2])
SentimentIntensityAnalyzer().polarity_scores(sys.argv[2])
en_core_web_sm.load(exclude=["tagger", "parser", "attribute_ruler", "lemmatizer", "senter"])(sys.argv[2])
"""


def watch(command: list[Any]) -> tuple[float, int]:
    """Returns the seconds and the peak memory, in bytes, of a command.

    Raises:
        CalledProcessError: It has failed; it has said why.
    """
    done = subprocess.run([sys.executable, "-c", WATCH, *map(str, command)], check=True, stdout=subprocess.PIPE, text=True)
    seconds, peak = done.stdout.split()
    return float(seconds), int(peak)


def commands(model: Path) -> dict[str, list[Any]]:
    """Returns the command lines, by what they run."""
    annotate = [sys.executable, ROOT / "annotate.py", "--model", model, "--device", "cpu", SHORT_TEXT, "--backend"]
    found = [x for x in BACKENDS if x == "torch" or (model / ONNX_FILES[x]).exists()]
    three = [sys.executable, "-c", THREE_MODELS, model, SHORT_TEXT]
    installed = find_spec("en_core_web_sm") and find_spec("vaderSentiment")
    return {**{backend: [*annotate, backend] for backend in found}, **({"three models": three} if installed else {})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT, help="folder of a release; default: this repository")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--output", type=Path, default=ROOT / "results/starts.json")
    args = parser.parse_args()
    ways = commands(args.model)
    rounds = [{name: watch(command) for name, command in ways.items()} for _ in range(args.rounds)]
    found: dict[str, Any] = {
        name: {
            "seconds": statistics.median(measured[name][0] for measured in rounds),
            "peak_bytes": max(measured[name][1] for measured in rounds),
        }
        for name in ways
    }
    for name, way in found.items():
        way["to_torch"] = statistics.median(measured[name][0] / measured["torch"][0] for measured in rounds)
        print(f"{name:<14} {way['seconds']:.1f} s ({way['to_torch']:.2f} of PyTorch's), {way['peak_bytes'] / 1e6:,.0f} MB")
    write_result(args.output, {"command": f"python -m benchmarks.starts --rounds {args.rounds}", "ways": found})


if __name__ == "__main__":
    main()
