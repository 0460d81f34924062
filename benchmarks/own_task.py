"""A task of one's own: accuracy and seconds of `add_task`, beside logistic regression on sentence vectors and SetFit.

    python -m benchmarks.own_task . --data FOLDER

FOLDER holds clinc150/, hwu64/ and wnut17/. Each cell is measured once and kept in results/own_task.json; run again, the command
computes the missing cells. From them it draws results/own_task.png and renders the table of docs/own-tasks.md.
"""

import argparse
import json
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from seqeval.metrics.sequence_labeling import get_entities

from common.data import token_spans
from common.files import ROOT, environment_info, write_json
from learning_multitask import learn_texts, read_examples, read_pooled
from pipeline_multitask import MultiTaskPipeline
from training.add_task import load, measure_task, read_file
from weights_multitask import sha256

SEEDS = range(5)
TUNED = (1, 10, 100, 1000)  # values of C
PAGE = ROOT / "docs/own-tasks.md"
TITLES = {
    "add_task": "`add_task`", "add_task, encoder alone": '`add_task`, `reads="encoder"`',
    "logistic regression": "logistic regression on sentence vectors", "logistic regression, C tuned": "the same, C tuned",
    "setfit": "SetFit",
}  # fmt: skip
Cell = dict[str, float | str]


@dataclass
class Part:
    """Rows of a data set.

    Attributes:
        texts: The texts.
        labels: str [N], their labels.
        features: float32 [N, 2H], what a head that reads "both" reads.
        vectors: float32 [N, E], the sentence vectors.
    """

    texts: np.ndarray
    labels: np.ndarray
    features: np.ndarray
    vectors: np.ndarray

    def take(self, rows: np.ndarray) -> "Part":
        return Part(self.texts[rows], self.labels[rows], self.features[rows], self.vectors[rows])


def tag_spans(tokens: list[str], tags: Iterable[str | None]) -> list[tuple[int, int, str]]:
    """Returns the entities of BIO tags in the text of tokens joined by spaces, as (start, end, type)."""
    spans = token_spans(tokens)
    found = get_entities([tag or "O" for tag in tags])
    return [(spans[first][0], spans[last][1], kind) for kind, first, last in found]


def read_part(pipe: MultiTaskPipeline, folder: Path, split: str, cache: Path) -> Part:
    """Returns a split without texts that are out of scope; what the model reads is kept in the cache for the next run."""
    texts, labels = (np.array(x) for x in read_file(folder / f"{split}.parquet", "text", "label"))
    texts, labels = texts[labels != "oos"], labels[labels != "oos"]
    width, file = pipe.model.config.hidden_size, cache / f"{folder.name}_{split}.npy"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        np.save(file, read_pooled(pipe.annotator, "probe", texts.tolist(), True, 2 * width))
    features = np.load(file)
    vectors = features[:, width:] @ pipe.model.linear.weight.detach().numpy().T  # as SentenceTransformer gives them
    return Part(texts, labels, features, vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def probe(model: str) -> MultiTaskPipeline:
    """Returns a pipeline with a head "probe" that gives what a head that reads "both" reads."""
    from torch import nn

    pipe = load(Path(model))
    pipe.model.add_task("probe", {"kind": "sequence_classification", "labels": ["a", "b"], "reads": "both"})
    pipe.model.heads["probe"].classifier = nn.Identity()
    return pipe


def draw(train: Part, test: Part, per_label: int | None, labels: int | None, seed: int) -> tuple[Part, Part]:
    """Returns the given number of training rows per label, sampled with the seed, and the test rows of the same labels."""
    rng, names = np.random.default_rng(seed), np.unique(train.labels)
    kept = names if labels is None else rng.permutation(names)[:labels]
    rows = np.concatenate([rng.permutation(np.flatnonzero(train.labels == x))[:per_label] for x in kept])
    return train.take(rows), test.take(np.flatnonzero(np.isin(test.labels, kept)))


# Methods


def add_task(train: Part, test: Part, seed: int, encoder_alone: bool = False) -> Cell:
    """Returns the test accuracy of what `add_task` fits to these features, or the encoder's half of them, and its seconds."""
    first = train.features.shape[1] // 2 if encoder_alone else 0
    examples = read_examples("own", train.texts.tolist(), train.labels.tolist(), None)
    distinct = train.features[np.unique(examples.rows, return_index=True)[1], first:]
    start = time.perf_counter()
    weights, _, report = learn_texts(examples, distinct, seed)
    seconds = time.perf_counter() - start
    logits = test.features[:, first:] @ weights["weight"].numpy().T + weights["bias"].numpy()
    accuracy = float((np.array(examples.labels)[logits.argmax(axis=1)] == test.labels).mean())
    return {"accuracy": accuracy, "held_out": report["score"], "seconds": seconds, "strength": report["regularization"]}


def logistic_regression(train: Part, test: Part, seed: int, values: tuple[float, ...] = (1,)) -> Cell:
    """Returns the same of scikit-learn's logistic regression on the sentence vectors, with the best of some values of C."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV

    start = time.perf_counter()
    model = LogisticRegression(max_iter=1000)
    parts = min(3, np.unique(train.labels, return_counts=True)[1].min())  # no more than a label has rows
    fitted = GridSearchCV(model, {"C": values}, cv=parts) if len(values) > 1 else model
    fitted.fit(train.vectors, train.labels)
    seconds = time.perf_counter() - start
    return {"accuracy": float(fitted.score(test.vectors, test.labels)), "seconds": seconds}


def setfit(model: str, train: Part, test: Part, seed: int) -> Cell:
    """Returns the same of SetFit on the starting encoder, with its own settings; its seconds include the reading."""
    from datasets import Dataset
    from setfit import SetFitModel, Trainer, TrainingArguments

    known = SetFitModel.from_pretrained(model, device="cpu")
    del known.model_body[2]  # the projection
    start = time.perf_counter()
    arguments = TrainingArguments("runs/setfit", num_epochs=1, seed=seed, report_to="none", save_strategy="no")
    rows = Dataset.from_dict({"text": train.texts.tolist(), "label": train.labels.tolist()})
    Trainer(known, arguments, train_dataset=rows).train()
    seconds = time.perf_counter() - start
    return {"accuracy": float((np.array(known.predict(test.texts.tolist())) == test.labels).mean()), "seconds": seconds}


def whole(model: str, train: Part, test: Part, seed: int) -> Cell:
    """Returns the same of the pipeline's `add_task` from a warm pipeline; its seconds include the reading."""
    pipe = load(Path(model))
    pipe(["warm"], embedding=False)
    start = time.perf_counter()
    pipe.add_task("own", train.texts.tolist(), train.labels.tolist(), seed=seed, progress=False)
    seconds = time.perf_counter() - start
    measured = measure_task(pipe, "own", test.texts.tolist(), test.labels.tolist())
    return {"accuracy": measured["score"], "seconds": seconds}


def entities(model: str, folder: Path, seed: int, rows: int) -> Cell:
    """Returns strict F1 on wnut17's test split for person and location, learned from some rows of its train split."""
    import pyarrow.parquet

    def read(split: str) -> tuple[list[str], list[list[tuple[int, int, str]]]]:
        table = pyarrow.parquet.read_table(folder / f"{split}.parquet")
        names = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]["ner_tags"]["feature"]["names"]
        data = table.to_pydict()
        tags = [[names[x] for x in row] for row in data["ner_tags"]]
        wanted = [[x if x[2:] in ("person", "location") else "O" for x in row] for row in tags]
        return [" ".join(x) for x in data["tokens"]], [tag_spans(*x) for x in zip(data["tokens"], wanted, strict=True)]

    pipe, (texts, spans) = load(Path(model)), read("train")
    chosen = np.random.default_rng(seed).permutation(len(texts))[:rows]
    start = time.perf_counter()
    pipe.add_task("own", [texts[i] for i in chosen], [spans[i] for i in chosen], seed=seed, progress=False)
    seconds = time.perf_counter() - start
    measured = measure_task(pipe, "own", *read("test"))
    return {"entity_f1": measured["score"], "seconds": seconds}


FITS: dict[str, Callable[[Part, Part, int], Cell]] = {
    "add_task": add_task, "add_task, encoder alone": partial(add_task, encoder_alone=True),
    "logistic regression": logistic_regression, "logistic regression, C tuned": partial(logistic_regression, values=TUNED),
}  # fmt: skip
# Rows of each label (None: all), and how many seeds.
SIZES = {2: 5, 5: 5, 10: 5, 20: 3, 50: 1, None: 1}


def measure(args: argparse.Namespace, cells: dict[str, Cell]) -> None:
    """Measures the cells that are missing, the quick ones first, and writes the file after each."""

    def keep(key: str, cell: Callable[[], Cell]) -> None:
        if key not in cells and (not args.only or re.search(args.only, key)):
            cells[key] = cell()
            about = {"command": "python -m benchmarks.own_task . --data FOLDER", **environment_info()}
            write_json(args.output, {**about, "cells": cells})
            print(key, json.dumps(cells[key]), flush=True)

    pipe, cache = probe(args.model), args.cache / sha256(Path(args.model) / "heads/model.safetensors")[:12]
    parts = {
        name: [read_part(pipe, args.data / name, split, cache) for split in ("train", "test")]
        for name in ("clinc150", "hwu64")
    }
    for size, seeds in SIZES.items():
        for name, both in parts.items():
            for seed in range(seeds):
                drawn = draw(*both, size, None, seed)
                for method, fit in FITS.items():
                    label = "all" if size is None else str(size)
                    keep(f"{name} / {label} per label / {method} / seed {seed}", lambda f=fit, d=drawn, s=seed: f(*d, s))
    for seed in SEEDS:
        for name, both in parts.items():
            few, some = draw(*both, 8, 10, seed), draw(*both, 80, 5, seed)
            keep(f"{name} / 8 per label, 10 labels / add_task / seed {seed}", lambda d=few, s=seed: whole(args.model, *d, s))
            keep(
                f"{name} / 80 per label, 5 labels / add_task / seed {seed}", lambda d=some, s=seed: whole(args.model, *d, s)
            )
            if seed < args.setfit_seeds:
                key = f"{name} / 8 per label, 10 labels / setfit / seed {seed}"
                keep(key, lambda d=few, s=seed: setfit(args.model, *d, s))
    for seed in range(3):
        keep(
            f"wnut17 / 300 sentences / add_task / seed {seed}",
            lambda s=seed: entities(args.model, args.data / "wnut17", s, 300),
        )


# What is shown


def summary(cells: dict[str, Cell], field: str = "accuracy") -> dict[tuple[str, str, str], list[float]]:
    """Returns the values of a field of all seeds, by data set, setting and method."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for key, cell in cells.items():
        if field in cell and len(names := key.split(" / ")) == 4:
            found.setdefault((names[0], names[1], names[2]), []).append(float(cell[field]))
    return found


def table(cells: dict[str, Cell]) -> str:
    """Returns the means over seeds as a Markdown table."""
    accuracy, seconds = summary(cells), summary(cells, "seconds")
    lines = ["| data set | examples | method | accuracy | range over seeds | seconds to fit |", "|---|---|---|---|---|---|"]
    for (data, setting, method), values in sorted(accuracy.items(), key=lambda x: (x[0][0], list(accuracy).index(x[0]))):
        spread = f"{min(values):.3f} to {max(values):.3f} ({len(values)})" if len(values) > 1 else "one seed"
        time_taken = np.mean(seconds[data, setting, method])
        lines.append(f"| {data} | {setting} | {TITLES[method]} | {np.mean(values):.3f} | {spread} | {time_taken:.1f} |")
    for key, cell in cells.items():
        if "entity_f1" in cell:
            data, setting, _, seed = key.split(" / ")
            lines.append(
                f"| {data} | {setting} | `add_task` | entity F1 {cell['entity_f1']:.3f} | {seed} | {cell['seconds']:.1f} |"
            )
    return "\n".join(lines)


def picture(cells: dict[str, Cell], path: Path) -> None:
    """Draws accuracy against the number of examples of each label, the mean over seeds, for each data set."""
    from matplotlib.figure import Figure

    from evaluation.plots import COLOURS

    found = summary(cells)
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    for axes, data in zip(figure.subplots(1, 2), ("clinc150", "hwu64"), strict=True):
        for colour, method in zip(COLOURS, FITS, strict=False):
            points = [(s, v) for s in SIZES if s and (v := found.get((data, f"{s} per label", method)))]
            sizes, values = [s for s, _ in points], [v for _, v in points]
            axes.plot(sizes, [np.mean(v) for v in values], "o-", ms=3, lw=1.2, color=colour, label=method)
            axes.fill_between(sizes, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.12, lw=0)
        axes.set(title=data, xlabel="labelled examples of each label", ylabel="test accuracy", xscale="log")
        axes.set_xticks([s for s in SIZES if s], [str(s) for s in SIZES if s])
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="release folder")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=ROOT / "results/own_task.json")
    parser.add_argument("--cache", type=Path, default=ROOT / "runs/own_task", help="folder for what the model reads")
    parser.add_argument("--only", help="regular expression: measure the cells whose names it finds")
    parser.add_argument("--setfit-seeds", type=int, default=1)
    args = parser.parse_args()
    cells: dict[str, Any] = json.loads(args.output.read_text("utf-8"))["cells"] if args.output.exists() else {}
    measure(args, cells)
    picture(cells, args.output.with_suffix(".png"))
    if args.output == parser.get_default("output"):
        rendered = f"<!-- own-task -->\n{table(cells)}\n<!-- /own-task -->"
        block = re.compile("<!-- own-task -->.*<!-- /own-task -->", re.DOTALL)
        PAGE.write_text(block.sub(lambda _: rendered, PAGE.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
