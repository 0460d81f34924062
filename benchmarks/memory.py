"""Measures the memory that a file takes, short and long: `python -m benchmarks.memory`.

annotate.py reads short generated texts with a tiny model of random weights, once for each number of rows. Its peak memory, which
is mostly that of its libraries, goes to results/memory.json, with the ratio of the last number of rows to the first.
"""

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

from benchmarks.run import positive, write_result
from benchmarks.starts import watch
from common.files import ROOT
from configuration_multitask import MultiTaskConfig
from modeling_multitask import MultiTaskModel

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "embedding_dim": 16}
WORDS = ["Paris", "Apple", "Tim", "Cook", "love", "store", "sad", "Rome", "closed", "all", "day"]


def write_model(folder: Path) -> None:
    """Writes a model with the tasks and the tokenizer of this repository, and tiny and random otherwise."""
    config = MultiTaskConfig.from_pretrained(ROOT)
    MultiTaskModel(MultiTaskConfig(**{**config.to_dict(), **TINY, "num_task_layers": 0})).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT).save_pretrained(folder)


def peak_bytes(folder: Path, rows: int) -> int:
    """Returns the peak memory of annotating so many rows, of one to twelve words each, with the model in the folder."""
    draw = random.Random(0)
    with open(folder / "in.jsonl", "w", encoding="utf-8") as stream:
        for _ in range(rows):
            stream.write(json.dumps({"text": " ".join(draw.choices(WORDS, k=draw.randint(1, 12)))}) + "\n")
    files = ["--input", folder / "in.jsonl", "--output", folder / "out.parquet", "--overwrite"]
    return watch([sys.executable, ROOT / "annotate.py", "--model", folder, "--device", "cpu", *files])[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=positive, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--output", type=Path, default=ROOT / "results/memory.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        peaks = {rows: peak_bytes(Path(folder), rows) for rows in args.rows}
    command = f"python -m benchmarks.memory --rows {' '.join(map(str, args.rows))}"
    write_result(args.output, {"command": command, "peak_bytes": peaks, "ratio": peaks[args.rows[-1]] / peaks[args.rows[0]]})
    print(args.output.read_text("utf-8"))


if __name__ == "__main__":
    main()
