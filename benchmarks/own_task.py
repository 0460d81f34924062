"""A task of one's own: accuracy and seconds of `add_task`, beside logistic regression on sentence vectors and SetFit.

    python -m benchmarks.own_task . --data FOLDER

FOLDER holds clinc150/, hwu64/ and wnut17/. Each cell is measured once and kept in results/own_task.json; run again, the command
computes the missing cells. From them it draws results/own_task.png and renders the table of docs/own-tasks.md.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from seqeval.metrics.sequence_labeling import get_entities
from sklearn.preprocessing import normalize

from common.data import class_names, load_split, token_spans
from common.files import ROOT, environment_info, write_json
from learning_multitask import learn_texts, read_examples, read_pooled
from pipeline_multitask import MultiTaskPipeline
from release.card import fill
from release.tables import markdown
from training.add_task import Rows, load, measure_task, read_file

TUNED = (1, 10, 100, 1000)  # values of C
PAGE = ROOT / "docs/own-tasks.md"
TITLES = {
    "add_task": "`add_task`", "add_task, encoder alone": '`add_task`, `reads="encoder"`',
    "logistic regression": "logistic regression on sentence vectors", "logistic regression, C tuned": "the same, C tuned",
    "setfit": "SetFit",
}  # fmt: skip
Cell = dict[str, float | str]
# Rows of a data set: their texts, labels, "features" (float32 [N, 2H], what a head that reads "both" reads), and "vectors"
# (float32 [N, E], the sentence vectors).
Part = dict[str, np.ndarray]


def read_part(pipe: MultiTaskPipeline, folder: Path, split: str) -> Part:
    """Returns a split without texts that are out of scope."""
    texts, labels = (np.array(x) for x in read_file(folder / f"{split}.parquet", "text", "label"))
    texts, labels = texts[labels != "oos"], labels[labels != "oos"]
    width = pipe.model.config.hidden_size
    features = read_pooled(pipe.annotator, "probe", texts.tolist(), True, 2 * width)
    vectors = features[:, width:] @ pipe.model.linear.weight.detach().numpy().T  # as SentenceTransformer gives them
    return {"texts": texts, "labels": labels, "features": features, "vectors": normalize(vectors)}


def probe(model: str) -> MultiTaskPipeline:
    """Returns a pipeline with a head "probe" that gives what a head that reads "both" reads."""
    from torch import nn

    pipe = load(Path(model))
    pipe.model.add_task("probe", {"kind": "sequence_classification", "labels": ["a", "b"], "reads": "both"})
    pipe.model.heads["probe"].classifier = nn.Identity()
    return pipe


def draw(train: Part, test: Part, per_label: int | None, labels: int | None, seed: int) -> tuple[Part, Part]:
    """Returns the given number of training rows per label, sampled with the seed, and the test rows of the same labels."""
    rng, names = np.random.default_rng(seed), np.unique(train["labels"])
    kept = names if labels is None else rng.permutation(names)[:labels]
    rows = np.concatenate([rng.permutation(np.flatnonzero(train["labels"] == x))[:per_label] for x in kept])
    same_labels = np.isin(test["labels"], kept)
    return {name: x[rows] for name, x in train.items()}, {name: x[same_labels] for name, x in test.items()}


# Methods


def add_task(train: Part, test: Part, seed: int, encoder_alone: bool = False) -> Cell:
    """Returns the test accuracy of what `add_task` fits to these features, or the encoder's half of them, and its seconds."""
    first = train["features"].shape[1] // 2 if encoder_alone else 0
    examples = read_examples("own", train["texts"].tolist(), train["labels"].tolist(), None)
    distinct = train["features"][np.unique(examples.rows, return_index=True)[1], first:]
    start = time.perf_counter()
    weights, _, report = learn_texts(examples, distinct, seed)
    seconds = time.perf_counter() - start
    logits = test["features"][:, first:] @ weights["weight"].numpy().T + weights["bias"].numpy()
    accuracy = float((np.array(examples.labels)[logits.argmax(axis=1)] == test["labels"]).mean())
    return {"accuracy": accuracy, "held_out": report["score"], "seconds": seconds, "strength": report["regularization"]}


def logistic_regression(train: Part, test: Part, seed: int, values: tuple[float, ...] = (1,)) -> Cell:
    """Returns the same of scikit-learn's logistic regression on the sentence vectors, with the best of some values of C."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV

    start = time.perf_counter()
    model = LogisticRegression(max_iter=1000)
    parts = min(3, np.unique(train["labels"], return_counts=True)[1].min())  # no more than a label has rows
    fitted = GridSearchCV(model, {"C": values}, cv=parts) if len(values) > 1 else model
    fitted.fit(train["vectors"], train["labels"])
    seconds = time.perf_counter() - start
    return {"accuracy": float(fitted.score(test["vectors"], test["labels"])), "seconds": seconds}


def setfit(model: str, train: Part, test: Part, seed: int) -> Cell:
    """Returns the same of SetFit on the starting encoder, with its own settings; its seconds include the reading."""
    from datasets import Dataset
    from setfit import SetFitModel, Trainer, TrainingArguments

    known = SetFitModel.from_pretrained(model, device="cpu")
    del known.model_body[2]  # the projection
    start = time.perf_counter()
    arguments = TrainingArguments("runs/setfit", num_epochs=1, seed=seed, report_to="none", save_strategy="no")
    rows = Dataset.from_dict({"text": train["texts"].tolist(), "label": train["labels"].tolist()})
    Trainer(known, arguments, train_dataset=rows).train()
    seconds = time.perf_counter() - start
    right = np.array(known.predict(test["texts"].tolist())) == test["labels"]
    return {"accuracy": float(right.mean()), "seconds": seconds}


def whole(model: str, train: Rows, test: Rows, seed: int, field: str = "accuracy") -> Cell:
    """Returns the test score, under the name `field`, of the pipeline's `add_task`; its seconds include the reading."""
    pipe = load(Path(model))
    pipe(["warm"], embedding=False)
    start = time.perf_counter()
    pipe.add_task("own", *train, seed=seed, progress=False)
    seconds = time.perf_counter() - start
    return {field: measure_task(pipe, "own", *test)["score"], "seconds": seconds}


def read_entities(folder: Path, split: str) -> Rows:
    """Returns a split's texts and the persons and locations in each, as (start, end, type)."""
    data, spans = load_split(str(folder), split, ["tokens", "ner_tags"]), []
    names = class_names(data, "ner_tags")
    for tokens, tags in zip(data["tokens"], data["ner_tags"], strict=True):
        places, found = token_spans(tokens), get_entities([names[x] for x in tags])
        spans.append([(places[i][0], places[j][1], kind) for kind, i, j in found if kind in ("person", "location")])
    return [" ".join(tokens) for tokens in data["tokens"]], spans


FITS: dict[str, Callable[[Part, Part, int], Cell]] = {
    "add_task": add_task, "add_task, encoder alone": partial(add_task, encoder_alone=True),
    "logistic regression": logistic_regression, "logistic regression, C tuned": partial(logistic_regression, values=TUNED),
}  # fmt: skip
# Rows of each label (None: all), and how many seeds.
SIZES = {2: 5, 5: 5, 10: 5, 20: 3, 50: 1, None: 1}


def jobs(model: str, data: Path) -> Iterator[tuple[str, Callable[[], Cell]]]:
    """Yields each cell's name and what measures it, the quick ones first."""
    pipe = probe(model)
    parts = {name: [read_part(pipe, data / name, split) for split in ("train", "test")] for name in ("clinc150", "hwu64")}
    for (size, seeds), (name, both) in product(SIZES.items(), parts.items()):
        for seed in range(seeds):
            drawn = draw(*both, size, None, seed)
            for method, fit in FITS.items():
                yield f"{name} / {size or 'all'} per label / {method} / seed {seed}", partial(fit, *drawn, seed)
    for seed, (name, both) in product(range(5), parts.items()):
        for size, labels in ((8, 10), (80, 5)):
            setting, drawn = f"{name} / {size} per label, {labels} labels", draw(*both, size, labels, seed)
            rows = [(part["texts"].tolist(), part["labels"].tolist()) for part in drawn]
            yield f"{setting} / add_task / seed {seed}", partial(whole, model, *rows, seed)
            if seed == 0 and size == 8:
                yield f"{setting} / setfit / seed {seed}", partial(setfit, model, *drawn, seed)
    (texts, spans), test = (read_entities(data / "wnut17", split) for split in ("train", "test"))
    for seed in range(3):
        chosen = np.random.default_rng(seed).permutation(len(texts))[:300]
        some = [texts[i] for i in chosen], [spans[i] for i in chosen]
        yield f"wnut17 / 300 sentences / add_task / seed {seed}", partial(whole, model, some, test, seed, "entity_f1")


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
    rows = []
    for (data, setting, method), values in sorted(accuracy.items(), key=lambda x: (x[0][0], list(accuracy).index(x[0]))):
        spread = f"{min(values):.3f} to {max(values):.3f} ({len(values)})" if len(values) > 1 else "one seed"
        time_taken = f"{np.mean(seconds[data, setting, method]):.1f}"
        rows.append([data, setting, TITLES[method], f"{np.mean(values):.3f}", spread, time_taken])
    for key, cell in cells.items():
        if "entity_f1" in cell:
            data, setting, _, seed = key.split(" / ")
            rows.append([data, setting, "`add_task`", f"entity F1 {cell['entity_f1']:.3f}", seed, f"{cell['seconds']:.1f}"])
    return markdown(["data set", "examples", "method", "accuracy", "range over seeds", "seconds to fit"], rows)


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
    args = parser.parse_args()
    cells: dict[str, Any] = json.loads(args.output.read_text("utf-8"))["cells"] if args.output.exists() else {}
    for key, measure in jobs(args.model, args.data):
        if key not in cells:
            cells[key] = measure()
            about = {"command": "python -m benchmarks.own_task . --data FOLDER", **environment_info()}
            write_json(args.output, {**about, "cells": cells})
            print(key, json.dumps(cells[key]), flush=True)
    picture(cells, args.output.with_suffix(".png"))
    if args.output == parser.get_default("output"):
        PAGE.write_text(fill(PAGE.read_text("utf-8"), "own-task", table(cells)), "utf-8")


if __name__ == "__main__":
    main()
