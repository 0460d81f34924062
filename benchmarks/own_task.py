"""A task of one's own: how good it is and how long it takes, beside logistic regression on sentence vectors and SetFit.

    python -m benchmarks.own_task . --data FOLDER

FOLDER holds clinc150/ and hwu64/ with train.parquet and test.parquet. Each cell is measured once and kept in
results/own_task.json; run again, the command computes the missing cells.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from common.files import ROOT
from training.add_task import load, read_file

SEEDS = range(5)
Rows = tuple[list[str], list[str]]


def rows_of(folder: Path, split: str) -> Rows:
    """Returns the texts and labels of a split, without texts that are out of scope."""
    pairs = [pair for pair in zip(*read_file(folder / f"{split}.parquet", "text", "label"), strict=True) if pair[1] != "oos"]
    return [text for text, _ in pairs], [label for _, label in pairs]


def draw(rows: Rows, per_label: int | None, labels: int | None, seed: int, test: Rows) -> tuple[Rows, Rows]:
    """Returns the given number of training rows per label, sampled with the seed, and the test rows of the same labels."""
    rng, names = np.random.default_rng(seed), sorted(set(rows[1]))
    kept = names if labels is None else list(rng.permutation(names)[:labels])
    found = np.array(rows[1])
    chosen = np.concatenate([rng.permutation(np.flatnonzero(found == x))[:per_label] for x in kept])
    pairs = [pair for pair in zip(*test, strict=True) if pair[1] in set(kept)]
    return ([rows[0][i] for i in chosen], [rows[1][i] for i in chosen]), ([x for x, _ in pairs], [x for _, x in pairs])


def own(model: str, train: Rows, test: Rows, seed: int) -> dict[str, float]:
    """Returns the test accuracy of `add_task`, and its seconds."""
    pipe = load(Path(model))
    start = time.perf_counter()
    report = pipe.add_task("own_task", *train, seed=seed, progress=False)
    seconds = time.perf_counter() - start
    answers = [x["labels"]["own_task"]["label"] for x in pipe(test[0], tasks=["own_task"], embedding=False)]
    accuracy = float(np.mean(np.array(answers) == np.array(test[1])))
    return {"accuracy": accuracy, "held_out": report["score"], "seconds": seconds, "fitting": report["seconds_fitting"]}


def logistic_regression(model: str, train: Rows, test: Rows, seed: int) -> dict[str, float]:
    """Returns the same of scikit-learn's logistic regression on the model's sentence vectors."""
    from sentence_transformers import SentenceTransformer
    from sklearn.linear_model import LogisticRegression

    encoder = SentenceTransformer(model)
    start = time.perf_counter()
    fitted = LogisticRegression(max_iter=1000).fit(encoder.encode(train[0]), train[1])
    seconds = time.perf_counter() - start
    return {"accuracy": float(fitted.score(encoder.encode(test[0]), test[1])), "seconds": seconds}


def setfit(model: str, train: Rows, test: Rows, seed: int) -> dict[str, float]:
    """Returns the same of SetFit on the same encoder, with its own settings."""
    from datasets import Dataset
    from setfit import SetFitModel, Trainer, TrainingArguments

    tuned = SetFitModel.from_pretrained(model, labels=sorted(set(train[1])))
    start = time.perf_counter()
    arguments = TrainingArguments(num_epochs=1, seed=seed, report_to="none")
    Trainer(tuned, arguments, train_dataset=Dataset.from_dict({"text": train[0], "label": train[1]})).train()
    seconds = time.perf_counter() - start
    return {"accuracy": float(np.mean(np.array(tuned.predict(test[0])) == np.array(test[1]))), "seconds": seconds}


METHODS: dict[str, Callable[[str, Rows, Rows, int], dict[str, float]]] = {
    "add_task": own, "logistic_regression": logistic_regression, "setfit": setfit,
}  # fmt: skip
# Rows per label, labels and methods; None: all.
SETTINGS: dict[str, tuple[int | None, int | None, tuple[str, ...]]] = {
    "all": (None, None, ("add_task", "logistic_regression")),
    "10 per label": (10, None, ("add_task", "logistic_regression")),
    "8 per label, 10 labels": (8, 10, ("add_task", "logistic_regression", "setfit")),
    "80 per label, 5 labels": (80, 5, ("add_task",)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="release folder")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=ROOT / "results/own_task.json")
    parser.add_argument("--only", nargs="+", default=list(SETTINGS), choices=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    args = parser.parse_args()
    cells: dict[str, Any] = json.loads(args.output.read_text("utf-8")) if args.output.exists() else {}
    for dataset in ("clinc150", "hwu64"):
        train, test = (rows_of(args.data / dataset, split) for split in ("train", "test"))
        for setting in args.only:
            per_label, labels, methods = SETTINGS[setting]
            for seed in SEEDS if per_label else [0]:
                drawn = draw(train, per_label, labels, seed, test)
                for method in [x for x in methods if x in args.methods]:
                    key = f"{dataset} / {setting} / seed {seed} / {method}"
                    if key not in cells:
                        cells[key] = METHODS[method](args.model, *drawn, seed)
                        args.output.write_text(json.dumps(cells, indent=2) + "\n", "utf-8")
                        print(key, json.dumps(cells[key]), flush=True)


if __name__ == "__main__":
    main()
