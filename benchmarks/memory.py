"""Measures the memory that a file takes, short and long: `python -m benchmarks.memory`.

annotate.py reads generated short texts with a tiny model of random weights, once for each number of rows. The highest
memory of the whole process, which is mostly its libraries, goes to results/memory.json, and the ratio of the last
number of rows to the first.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.run import WATCH, positive, write_result
from common.files import ROOT
from configuration_multitask import MultiTaskConfig
from modeling_multitask import MultiTaskModel
from release.export import export

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "embedding_dim": 16,
    "num_task_layers": 0,
}
WORDS = ["Paris", "Apple", "Tim", "Cook", "love", "store", "sad", "Rome", "closed", "all", "day"]


def write_model(folder: Path) -> Path:
    """Writes a release with the tasks and the tokenizer of this repository, and tiny and random otherwise."""
    fields = json.loads((ROOT / "config.json").read_text("utf-8"))
    model = MultiTaskModel(MultiTaskConfig(**{name: x for name, x in fields.items() if name != "multitask_weights"} | TINY))
    model.save_pretrained(folder / "checkpoint")
    AutoTokenizer.from_pretrained(ROOT).save_pretrained(folder / "checkpoint")
    export(folder / "checkpoint", folder / "model")
    return folder / "model"


def write_texts(path: Path, rows: int) -> Path:
    """Writes a text of one to twelve words per row."""
    draw = random.Random(0)
    with open(path, "w", encoding="utf-8") as stream:
        for _ in range(rows):
            stream.write(json.dumps({"text": " ".join(draw.choices(WORDS, k=draw.randint(1, 12)))}) + "\n")
    return path


def peak_memory(model: Path, rows: int, folder: Path) -> int:
    """Returns the peak memory, in bytes, of annotating this many rows.

    Raises:
        CalledProcessError: annotate.py has failed; it has said why.
    """
    files = ["--input", write_texts(folder / "in.jsonl", rows), "--output", folder / "out.parquet", "--overwrite"]
    command = [sys.executable, ROOT / "annotate.py", "--model", model, "--device", "cpu", *files]
    done = subprocess.run([sys.executable, "-c", WATCH, *map(str, command)], check=True, stdout=subprocess.PIPE)
    return int(done.stdout.split()[-1])


def measure(rows: list[int]) -> dict[str, Any]:
    """Returns the peak for each number of rows, and the ratio of the last to the first."""
    with tempfile.TemporaryDirectory() as name:
        model = write_model(Path(name))
        peaks = {count: peak_memory(model, count, Path(name)) for count in rows}
    return {"peak_bytes": peaks, "ratio": peaks[rows[-1]] / peaks[rows[0]]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=positive, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--output", type=Path, default=ROOT / "results/memory.json")
    args = parser.parse_args()
    found = measure(args.rows)
    for rows, peak in found["peak_bytes"].items():
        print(f"{rows:>12,} rows {peak / 2**20:8.0f} MiB")
    print(f"ratio {found['ratio']:.3f}")
    write_result(args.output, {"command": f"python -m benchmarks.memory --rows {' '.join(map(str, args.rows))}", **found})


if __name__ == "__main__":
    main()
