"""Adds a task to a finished model; its encoder, its embedding and its other heads stay as they are, to the bit:

    python -m training.add_task MODEL --data mine.csv --text-column message --label-column intent --output my-model

MODEL is a release folder, a checkpoint or a Hub id, and the output is of the same form, without card and ONNX files. --data is a
csv, jsonl or parquet file. The labels are read from it: text or whole numbers (one label each), lists of str (any number of
labels), decimal numbers (regression), lists of [start, end, label] (entities). The score is that of held-out rows.

With a recipe in place of the columns (`training/recipes/add_irony.toml`), the examples are the train split of its one task, mapped
as in training, and its test split, or else its validation split, is measured too. Of the recipe, the data set's fields, `kind`,
`labels`, `head`, for entities `epochs`, and `run.seed` are used.
"""

import argparse
import csv
import json
import sys
import tempfile
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from datasets import ClassLabel, Dataset
from huggingface_hub import snapshot_download
from safetensors import safe_open
from seqeval.metrics.sequence_labeling import get_entities
from transformers import AutoTokenizer

from common.data import has_split, label_reader, load_task_split, tagged_rows, task_labels, token_spans
from common.recipe import Recipe, RecipeError, TaskRecipe
from configuration_multitask import WEIGHTS_INDEX
from learning_multitask import ENTITIES, NUMBER, PROBLEMS, Report, check_spans, found_spans, labels_of, plain, score
from modeling_multitask import MultiTaskModel
from pipeline_multitask import MultiTaskPipeline
from release.export import ENCODER_FILE, HEADS_FILE, export
from tasks_multitask import SEQUENCE, TOKEN
from weights_multitask import WeightsError

Rows = tuple[list[Any], list[Any]]  # texts and their labels
TRAINED_ALONE = ("unsaid", "passage_rows", "rewrites", "loss_weight", "class_weights", "focal_gamma")  # not used here


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


def read_split(task: TaskRecipe, split: str, seed: int) -> tuple[Rows, list[str]]:
    """Returns the texts and labels of a split of a recipe's task, by name, and the task's labels."""
    texts: list[str] = []
    found: list[Any] = []
    names: list[str] = []
    for key, part in task.parts("").items():
        data, where = load_task_split(part, split), f"{part.dataset}{key}, split {split}"
        if part.limit is not None and split == "train":
            data = data.shuffle(seed=seed).select(range(min(part.limit, len(data))))
        names = task_labels(part, data)
        if part.kind == TOKEN:
            rows = tagged_rows(part, data, names, where)
            texts += [" ".join(tokens) for tokens, _ in rows]
            found += [tag_spans(tokens, tags) for tokens, tags in rows]
        else:
            to_label = label_reader(part, data, names, where)
            texts += data[part.text_columns[0]][:]
            found += [_by_name(part, to_label(x, f"{where}, row {i}"), names) for i, x in enumerate(data[part.label_column])]
    if task.kind == TOKEN:
        names = list(dict.fromkeys(x[2:] for x in names if x != "O"))
    return (texts, found), names


def _by_name(task: TaskRecipe, value: Any, names: list[str]) -> Any:
    """Returns a label as `label_reader` gives it the way `add_task` takes it; None if it is missing."""
    if not isinstance(value, list):
        return None if value < 0 else names[value]
    if task.head.get("problem_type") == "regression":
        return value[0]
    return None if min(value) < 0 else [name for name, x in zip(names, value, strict=True) if x]


def tag_spans(tokens: list[str], tags: Iterable[str | None]) -> list[tuple[int, int, str]]:
    """Returns the entities of BIO tags in the text of tokens joined by spaces, as (start, end, type)."""
    spans = token_spans(tokens)
    found = get_entities([tag or "O" for tag in tags])
    return [(spans[first][0], spans[last][1], kind) for kind, first, last in found]


def new_task(recipe: Recipe) -> tuple[str, TaskRecipe]:
    """Returns the name and the recipe of the one task that is to be added.

    Raises:
        RecipeError: There are several, it has no head, or sets what adding a task does not use.
    """
    if len(recipe.tasks) != 1:
        raise RecipeError(f"the recipe has the tasks {', '.join(recipe.tasks)}; one is added at a time: leave one in")
    ((name, task),) = recipe.tasks.items()
    if not task.has_head:
        raise RecipeError(f"tasks.{name}.kind is {task.kind!r}, which trains the embedding; allowed: {SEQUENCE}, {TOKEN}")
    default = TaskRecipe(kind=task.kind)
    if unused := [key for key in TRAINED_ALONE if getattr(task, key) != getattr(default, key)]:
        raise RecipeError(f"tasks.{name} sets {', '.join(unused)}, which training.train uses; leave them out here")
    return name, task


# Writing


def local_folder(model: str) -> Path:
    """Returns the folder of a model, which is fetched if `model` is a Hub id.

    Raises:
        ValueError: It is neither a folder nor can it be fetched.
    """
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(model))
    except (OSError, ValueError) as error:
        raise ValueError(f"MODEL is {model!r}; allowed: a folder, or a Hub id that can be fetched ({error})") from error


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
    answers = [_answer(kind, name, record) for record in pipe([text for text, _ in rows], tasks=[name], embedding=False)]
    return {**score(kind, [x for _, x in rows], answers), "rows": len(rows)}


def _answer(kind: str, name: str, record: dict[str, Any]) -> Any:
    if kind == ENTITIES:
        return found_spans(record["entities"][name])
    answer = record["labels"][name]
    return next(iter(answer["values"].values())) if kind == NUMBER else answer[kind]


def add_recipe_task(pipe: MultiTaskPipeline, recipe: Recipe) -> Report:
    """Adds a recipe's one task to a pipeline's model and returns the report, with `test` if there is another split."""
    name, task = new_task(recipe)
    head = {key: x for key, x in task.head.items() if key != "problem_type"}
    if task.kind == TOKEN:
        head["epochs"] = int(task.epochs)
    rows, names = read_split(task, "train", recipe.run.seed)
    report = pipe.add_task(name, *rows, labels=names, seed=recipe.run.seed, **head)
    splits = [x for x in ("test", "validation") if all(has_split(part, x) for part in task.parts(name).values())]
    if splits:
        measured = measure_task(pipe, name, *read_split(task, splits[0], recipe.run.seed)[0])
        report["test"] = {**measured, "split": splits[0]}
    return report


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
        lines.append(
            f"{test['metric']} {test['score']:.3f} on {test['rows']:,} rows of the {test.get('split', 'test')} split"
        )
    pairs = (test or report).get("confusions", [])
    lines += [f"  {count}× {truth!r} taken for {answer!r}" for truth, answer, count in pairs]
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    """Does what the command line says."""
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise ValueError(f"--output {args.output} exists and is not empty; give a new folder.")
    if args.recipe is None and not (args.data and args.text_column and args.label_column):
        raise ValueError("Give --data FILE with --text-column and --label-column, or a recipe.")
    recipe = None if args.recipe is None else Recipe.read(args.recipe, args.data, overrides=args.set)
    source = local_folder(args.model)
    pipe = load(source)
    if recipe is not None:
        report = add_recipe_task(pipe, recipe)
    else:
        columns = (args.text_column, args.label_column)
        rows, test = read_file(args.data, *columns), args.test and read_file(args.test, *columns)
        report = pipe.add_task(args.name or args.label_column, *rows, seed=args.seed)
        if test:
            report["test"] = measure_task(pipe, report["task"], *test)
    print(summary(report))
    write_model(pipe, source, args.output)
    print(f"{args.output} holds the model with its new task")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="release folder, checkpoint folder or Hub id")
    parser.add_argument("recipe", type=Path, nargs="?")
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--data", type=Path, help="csv, jsonl or parquet file; with a recipe, the folder of its data sets")
    parser.add_argument("--text-column", help="column of the texts")
    parser.add_argument("--label-column", help="column of the labels")
    parser.add_argument("--name", help="name of the task; by default that of the label column")
    parser.add_argument("--test", type=Path, help="file with the same columns to measure the task on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a setting of the recipe"
    )
    try:
        run(parser.parse_args())
    except (WeightsError, ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
