"""Adds a task to a finished model; its encoder, its embedding and its other heads stay as they are, to the bit:

    python -m training.add_task MODEL --data mine.csv --text-column message --label-column intent --output my-model

MODEL is a release folder, a checkpoint or a Hub id, and the output is of the same form, without card and ONNX files. --data is a
csv, jsonl or parquet file. The labels are read from it: text or whole numbers (one label each), lists of str (any number of
labels), decimal numbers (regression), lists of [start, end, label] (entities). The score is that of held-out rows.
"""

import argparse
import csv
import json
import sys
import tempfile
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from datasets import ClassLabel, Dataset
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import AutoTokenizer

from configuration_multitask import WEIGHTS_INDEX
from learning_multitask import ENTITIES, NUMBER, PROBLEMS, Report, check_spans, found_spans, labels_of, plain, score
from modeling_multitask import MultiTaskModel
from pipeline_multitask import MultiTaskPipeline
from release.export import ENCODER_FILE, HEADS_FILE, export
from tasks_multitask import TOKEN
from weights_multitask import WeightsError

Rows = tuple[list[Any], list[Any]]  # texts and their labels


# Reading


def read_file(path: Path, text_column: str, label_column: str) -> Rows:
    """Returns the texts and labels of a csv, jsonl or parquet file; a label that is missing is None.

    Raises:
        ValueError: The file cannot be read, or lacks a column.
    """
    if path.suffix not in (".csv", ".jsonl", ".parquet"):
        raise ValueError(f"--data is {str(path)!r}; allowed: a file that ends in .csv, .jsonl or .parquet.")
    try:
        columns = _columns(path)
    except (csv.Error, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no {path.suffix[1:]} file in UTF-8: {error}") from error
    if missing := [name for name in (text_column, label_column) if name not in columns]:
        raise ValueError(f"{path} has no column {missing}; it has: {', '.join(columns)}.")
    return columns[text_column], _labels(columns[label_column])


def _columns(path: Path) -> dict[str, list[Any]]:
    if path.suffix == ".parquet":
        data = Dataset(pyarrow.parquet.read_table(path))
        columns = data.to_dict()
        for name, feature in data.features.items():
            if isinstance(feature, ClassLabel):  # numbers that have names
                columns[name] = [None if x is None or x < 0 else feature.names[x] for x in columns[name]]
        return columns
    with path.open(encoding="utf-8-sig", newline="") as stream:
        if path.suffix == ".csv":
            rows = list(csv.DictReader(stream, restkey=""))
        else:
            rows = [json.loads(line) for line in stream if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: every line must be a JSON object.")
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(chain(*rows))}


def _labels(values: list[Any]) -> list[Any]:
    """Returns a file's labels: whole numbers are names of classes; decimals, also those written as text, are numbers."""
    given = [x for x in values if x is not None and x != ""]
    if all(isinstance(x, str) for x in given):
        try:
            numbers = [float(x) for x in given]
        except ValueError:
            return values
        is_number = any(not x.is_integer() for x in numbers)
        return [None if x in (None, "") else float(x) for x in values] if is_number else values
    if all(isinstance(x, int) and not isinstance(x, bool) for x in given):
        return [None if x is None else str(x) for x in values]
    return values


# Writing


def write_model(pipe: MultiTaskPipeline, source: Path, output: Path) -> None:
    """Writes the model in the form that `source` has; a release with a task branch keeps its encoder's files as they are."""
    pipe.model.to("cpu")
    if not (source / WEIGHTS_INDEX).exists():
        pipe.save_pretrained(str(output))
        return
    has_branch = pipe.model.config.num_task_layers > 0
    with safe_open(source / (HEADS_FILE if has_branch else ENCODER_FILE), framework="pt") as weights:
        dtype = weights.get_tensor(next(iter(weights.keys()))).dtype
    with tempfile.TemporaryDirectory() as checkpoint:
        pipe.save_pretrained(checkpoint)
        export(checkpoint, output, source if has_branch else None, dtype)


# The whole


def load(source: Path) -> MultiTaskPipeline:
    """Returns the pipeline of a model's folder."""
    model, tokenizer = MultiTaskModel.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    return MultiTaskPipeline(model=model, tokenizer=tokenizer, device="cuda" if torch.cuda.is_available() else "cpu")


def measure_task(pipe: MultiTaskPipeline, name: str, texts: list[Any], targets: list[Any]) -> Report:
    """Returns how well a task answers other examples: `metric`, `score`, `confusions` and `rows`.

    Raises:
        ValueError: The examples have a label that the task lacks.
    """
    spec = pipe.model.config.task_specs[name]
    kind = ENTITIES if spec.kind == TOKEN else {problem: kind for kind, problem in PROBLEMS.items()}[str(spec.problem_type)]
    known = {x[2:] for x in spec.labels} if kind == ENTITIES else set(spec.labels)
    rows = [(text, plain(x)) for text, x in zip(texts, targets, strict=True)]
    rows = [(text, x) for text, x in rows if x is not None and plain(text) is not None]
    if kind == ENTITIES:
        rows = [(text, check_spans(text, x)) for text, x in rows]
    for _, x in rows:
        if unknown := [label for label in labels_of(kind, x) if label not in known]:
            raise ValueError(
                f"The test split has the label {unknown[0]!r}, which the examples lack: {', '.join(sorted(known))}."
            )
    records = pipe([text for text, _ in rows], tasks=[name], embedding=False)
    if kind == ENTITIES:
        answers = [found_spans(record["entities"][name]) for record in records]
    elif kind == NUMBER:
        answers = [record["labels"][name]["values"][spec.labels[0]] for record in records]
    else:
        answers = [record["labels"][name][kind] for record in records]
    return {**score(kind, [x for _, x in rows], answers), "rows": len(rows)}


def summary(report: Report) -> str:
    """Returns what the command says of a new task."""
    left = f", {report['left_out']:,} left out" if report["left_out"] else ""
    lines = [f"{report['task']}: {len(report['labels'])} label(s) from {report['rows']:,} rows{left}"]
    if report["contradicting_texts"]:
        lines.append(f"{report['contradicting_texts']:,} texts occur with different labels.")
    lines += report["notes"]
    if report["score"] is not None:
        lines.append(f"{report['metric']} {report['score']:.3f} on {report['held_out']:,} held-out rows")
    if test := report.get("test"):
        lines.append(f"{test['metric']} {test['score']:.3f} on {test['rows']:,} rows of the test split")
    pairs = (test or report).get("confusions", [])
    lines += [f"  {count}× {truth!r} taken for {answer!r}" for truth, answer, count in pairs]
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    """Does what the command line says."""
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise ValueError(f"--output {args.output} exists and is not empty; give a new folder.")
    try:
        source = Path(args.model if Path(args.model).is_dir() else snapshot_download(args.model))
    except (OSError, ValueError) as error:
        raise ValueError(f"MODEL is {args.model!r}; allowed: a folder, or a Hub id that can be fetched ({error})") from error
    columns = (args.text_column, args.label_column)
    rows, test = read_file(args.data, *columns), args.test and read_file(args.test, *columns)
    pipe = load(source)
    report = pipe.add_task(args.name or args.label_column, *rows, seed=args.seed)
    if test:
        report["test"] = measure_task(pipe, report["task"], *test)
    print(summary(report))
    write_model(pipe, source, args.output)
    print(f"{args.output} holds the model with its new task")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="release folder, checkpoint folder or Hub id")
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--data", type=Path, required=True, help="a csv, jsonl or parquet file")
    parser.add_argument("--text-column", required=True, help="column of the texts")
    parser.add_argument("--label-column", required=True, help="column of the labels")
    parser.add_argument("--name", help="name of the task; by default that of the label column")
    parser.add_argument("--test", type=Path, help="file with the same columns to measure the task on")
    parser.add_argument("--seed", type=int, default=0)
    try:
        run(parser.parse_args())
    except (WeightsError, ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
