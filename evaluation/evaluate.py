"""Evaluates a model on the data sets of a recipe: `python -m evaluation.evaluate . --split test --output results/release.json`.

Everything is measured on what a user gets: the records of the multitask pipeline, made from raw text. Training calls
`measure` too, on the model that it is training. Axes: N texts (or words of texts), C labels, E embedding.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from scipy.special import expit, softmax
from transformers import AutoModel, pipeline

from annotator_multitask import EKMAN, Record, Span, group_scores, mean_over_windows, merge_words, text_chunks
from common.data import (
    DataError,
    encode,
    fold_unsaid,
    has_split,
    hash_columns,
    load_split,
    load_task_split,
    make_examples,
    public_name,
    rewrite,
    rewrite_tokens,
    tagged_rows,
    task_labels,
    token_spans,
    word_tags,
)
from common.files import ROOT, environment_info, write_json
from common.recipe import REWRITES, Recipe, RecipeError, TaskRecipe
from evaluation.metrics import (
    Intervals,
    Statistic,
    calibration,
    classification,
    cosines,
    coverage,
    entities,
    entities_right,
    entities_to_tags,
    multi_label,
    neighbours_shared,
    of_means,
    rank_correlations,
    regression,
)
from modeling_multitask import IGNORE_INDEX
from tasks_multitask import PROBLEM_TYPES, TOKEN, TaskSpec

DEFAULT_RECIPE = ROOT / "training/recipes/release.toml"
NEIGHBOURS = 10
SINGLE_LABEL, MULTI_LABEL, REGRESSION = PROBLEM_TYPES
LESS_IS_BETTER = ("mean_absolute_error", "calibration_error")


def measure(
    pipe: Any,
    recipe: Recipe,
    split: str,
    intervals: bool = False,
    limit: int | None = None,
    form: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Returns, for each task (each "<task>/<data set>" of one with several), `metrics` (name to value), `intervals` (name to [low, high]), of heads `coverage` and `domains`, and on what it was measured.

    To measure a model while it trains, give `MultiTaskPipeline(model=model, tokenizer=tokenizer, device=model.device)`;
    the model is left in evaluation mode, as the pipeline itself leaves it. A task whose data set has no such split is
    left out.

    Args:
        pipe: A `MultiTaskPipeline`.
        recipe: Names the tasks and their data sets.
        split: "train", "validation" or "test".
        intervals: Whether to compute the 95 % bootstrap interval of every metric; if not, `intervals` is empty.
        limit: Maximum number of rows of each split, from its start.
        form: How the texts are rewritten first, see `REWRITES`; None: as they are.

    Raises:
        ValueError: The model lacks one of the tasks or one of their labels, or the data are not what the recipe says.
    """
    pipe.model.eval()
    results = {}
    for key, task in recipe.parts.items():
        if not has_split(task, split):
            continue
        name = key.partition("/")[0]
        data = load_task_split(task, split)
        data = data.select(range(min(limit or len(data), len(data))))
        if task.has_head:
            predictions = predict(pipe, name, task, data, form)
            statistics = head_statistics(predictions)
            kept = {} if predictions.spec.problem_type == REGRESSION else coverage(*predictions.answers()[:2])
            extra = {"coverage": kept, "domains": by_domain(predictions, data)}
        else:
            extra, statistics = {}, [pair_correlations(pipe, task, data, recipe.model.matryoshka_dims)]
        metrics, ranges = measured(statistics, intervals)
        facts = {"split": split, "rows": len(data), "sha256": hash_columns(data, task.columns)}
        results[key] = {"metrics": metrics, "intervals": ranges, **extra, **facts}
    return results


def main_metric(task: TaskRecipe) -> str:
    """Returns the name of the metric that a task is judged by: the recipe's, or the usual one of its kind.

    Raises:
        ValueError: The recipe names a metric for which lower is better; it cannot enter an average.
    """
    if task.metric in LESS_IS_BETTER:
        raise DataError(f"metric is {task.metric!r}, for which lower is better; choose one for which higher is better.")
    if task.metric is not None:
        return task.metric
    if task.kind == TOKEN:
        return "f1"
    return "macro_f1" if task.has_head and task.head.get("problem_type") != REGRESSION else "spearman"


def average(results: dict[str, dict[str, Any]], recipe: Recipe) -> float:
    """Returns the mean over tasks of their main metric, of several data sets the mean; NaN if nothing was measured.

    Raises:
        ValueError: A task's main metric is none that was measured.
    """
    values: dict[str, list[float]] = {}
    for name, found in results.items():
        task = name.partition("/")[0]
        key = main_metric(recipe.tasks[task])
        if key not in found["metrics"]:
            raise DataError(f"tasks.{name}.metric is {key!r}; allowed: {', '.join(found['metrics'])}.")
        values.setdefault(task, []).append(found["metrics"][key])
    return float(np.mean([np.mean(x) for x in values.values()])) if values else float("nan")


# What a head says


@dataclass(frozen=True)
class Predictions:
    """What one head says of a split, beside what is right. Items are texts, or the words of a token task's texts.

    Attributes:
        spec: The head.
        logits: float [N, C], the temperature applied.
        predicted: int [N], the likeliest label; multi-label: 0/1 [N, C]; regression: float [N, C].
        truth: The same of the data set.
        rows: int [N], the row of the data set that each item belongs to.
        tags: For entities: the tags of each row's tokens in the data set, and those that the pipeline's entities give.
        found: For entities: of each one that the pipeline gives, its score, whether it is right, and its row.
    """

    spec: TaskSpec
    logits: np.ndarray
    predicted: np.ndarray
    truth: np.ndarray
    rows: np.ndarray
    tags: tuple[list[list[str]], list[list[str]]] | None = None
    found: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    @property
    def probabilities(self) -> np.ndarray:
        """The head's probabilities, float [N, C]; multi-label: independent, otherwise they sum to one."""
        return expit(self.logits) if self.spec.problem_type == MULTI_LABEL else softmax(self.logits, axis=1)

    def answers(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns of each answer that a user gets, a label or an entity, its score, whether it is right, and its row."""
        if self.found is not None:
            return self.found
        if self.spec.problem_type == MULTI_LABEL:
            items, labels = np.nonzero(self.predicted)
            return self.probabilities[items, labels], self.truth[items, labels] > 0, self.rows[items]
        return self.probabilities.max(axis=1), self.predicted == self.truth, self.rows

    def of_rows(self, rows: np.ndarray) -> "Predictions":
        """Returns the predictions for some rows of the data set, int [rows] in their order."""
        items = np.isin(self.rows, rows)
        tags = None if self.tags is None else tuple([side[row] for row in rows] for side in self.tags)
        fields = {name: getattr(self, name)[items] for name in ("logits", "predicted", "truth", "rows")}
        found = None if self.found is None else tuple(x[np.isin(self.found[2], rows)] for x in self.found)
        return dataclasses.replace(self, **fields, tags=tags, found=found)


def predict(pipe: Any, name: str, task: TaskRecipe, data: Dataset, form: str | None = None) -> Predictions:
    """Returns what head `name` says of the rows that have a label, their texts rewritten in a form of `REWRITES` or as they are.

    Raises:
        ValueError: The model has no such head or lacks a label of the data set, or no row has a label.
    """
    spec = pipe.model.config.task_specs.get(name)
    if spec is None:
        known = ", ".join(pipe.model.config.tasks) or "none"
        raise DataError(f"tasks.{name} is in the recipe; the model's tasks are: {known}. Give the recipe it was trained by.")
    if spec.kind != task.kind:
        raise DataError(f"tasks.{name}.kind is {task.kind!r}; the model's head is a {spec.kind}.")
    names = task_labels(task, data)
    if spec.problem_type != REGRESSION and (unknown := [label for label in names if label not in spec.labels]):
        raise DataError(f"tasks.{name}: the data set has the labels {unknown}; the head knows {', '.join(spec.labels)}.")
    found = (_predict_words if spec.kind == TOKEN else _predict_texts)(pipe, name, task, data, names, form)
    if not len(found.truth):
        raise DataError(f"tasks.{name} ({task.dataset}): no row has a label in column {task.label_column!r}.")
    return found


def _predict_texts(pipe: Any, name: str, task: TaskRecipe, data: Dataset, names: list[str], form: str | None) -> Predictions:
    spec = pipe.model.config.task_specs[name]
    examples = make_examples(task, data, names, pipe.tokenizer, f"tasks.{name} ({task.dataset})")
    given = np.array([example["labels"] for example in examples])
    labelled = ~np.isnan(given) if spec.problem_type == REGRESSION else given != IGNORE_INDEX
    rows = np.flatnonzero(labelled if given.ndim == 1 else labelled.all(axis=1))
    answered = list(answers(pipe, name, [rewrite(examples[row]["text"], form) for row in rows]))
    logits = np.array([logits for _, _, logits in answered]).reshape(len(rows), len(spec.labels))
    if spec.problem_type == REGRESSION:
        return Predictions(spec, logits, logits, given[rows], rows)
    order = [spec.labels.index(label) for label in names]  # the data set may number the labels otherwise
    if spec.problem_type == SINGLE_LABEL:
        return Predictions(spec, logits, logits.argmax(axis=1), np.array(order)[given[rows]], rows)
    truth = np.zeros(logits.shape, dtype=int)
    truth[:, order] = given[rows]
    present = [record["labels"][name]["labels"] for record, _, _ in answered]
    predicted = np.array([[int(label in found) for label in spec.labels] for found in present])
    return Predictions(spec, logits, predicted, truth, rows)


def _predict_words(pipe: Any, name: str, task: TaskRecipe, data: Dataset, names: list[str], form: str | None) -> Predictions:
    """Returns what a token head says of words; a row's tokens are joined by spaces and found again by the model."""
    spec = pipe.model.config.task_specs[name]
    tagged = [rewrite_tokens(*row, form) for row in tagged_rows(task, data, names, f"tasks.{name} ({task.dataset})")]
    tokens, truth = [row for row, _ in tagged], [tags for _, tags in tagged]
    logits, labels, rows, found = [], [], [], []
    given: list[tuple[float, bool, int]] = []
    for row, (record, words, values) in enumerate(answers(pipe, name, [" ".join(x) for x in tokens])):
        spans = token_spans(tokens[row])
        logits.append(values.reshape(len(words), len(spec.labels)))
        labels += [spec.labels.index(x) if x in spec.labels else IGNORE_INDEX for x in word_tags(words, spans, truth[row])]
        rows += [row] * len(words)
        if spec.is_bio:  # nothing is judged at a token that has no tag
            said = [x for x in record["entities"][name] if x["entity_group"] not in task.unsaid]
            tags = entities_to_tags(spans, said)
            found.append(["O" if gold is None else tag for gold, tag in zip(truth[row], tags, strict=True)])
            right = entities_right(spans, [tag or "O" for tag in truth[row]], said)
            given += [(x["score"], correct, row) for x, correct in zip(said, right, strict=True)]
    kept = np.array(labels, dtype=int) != IGNORE_INDEX
    values = fold_unsaid(torch.from_numpy(np.concatenate(logits)[kept]), task, spec.labels).numpy()
    tags = ([[tag or "O" for tag in row] for row in truth], found) if spec.is_bio else None
    answered = (np.array([x[0] for x in given]), np.array([x[1] for x in given], bool), np.array([x[2] for x in given], int))
    items = (values, values.argmax(axis=1), np.array(labels)[kept], np.array(rows)[kept])
    return Predictions(spec, *items, tags, answered if spec.is_bio else None)


def answers(pipe: Any, name: str, texts: list[str]) -> Iterator[tuple[Record, list[Span], np.ndarray]]:
    """Yields for each text the pipeline's record of one task, and the logits behind it with the windows merged.

    For a token task these are the spans of the text's words and float [words, C]; otherwise no spans and float [C].
    """
    is_token, annotator = pipe.model.config.task_specs[name].kind == TOKEN, pipe.annotator
    for chunk in text_chunks(texts):
        by_text = annotator.read(chunk, [name])
        for record, group in zip(annotator.records(chunk, by_text, [name], None), by_text, strict=True):
            if is_token:
                yield record, *merge_words(name, group)
            else:
                yield record, [], mean_over_windows(group, [window.logits[name] for window in group])


def measured(statistics: list[Statistic], intervals: bool) -> tuple[dict[str, float], Intervals]:
    """Returns all metrics, and their intervals if asked for."""
    metrics = {name: value for x in statistics for name, value in x.metrics().items()}
    return metrics, {name: ends for x in statistics for name, ends in x.intervals().items()} if intervals else {}


def head_statistics(predictions: Predictions) -> list[Statistic]:
    """Returns the metrics of one head."""
    spec, truth, predicted = predictions.spec, predictions.truth, predictions.predicted
    if spec.problem_type == REGRESSION:
        return [regression(truth, predicted)]
    if spec.problem_type == MULTI_LABEL:
        found = [multi_label(truth, predicted)]
        if set(spec.labels) == {label for labels in EKMAN.values() for label in labels}:
            found += group_statistics(predictions)
    elif predictions.tags:
        found = [entities(*predictions.tags)]
    else:
        found = [classification(truth, predicted, predictions.rows)]
        if spec.kind == TOKEN:  # words with labels of their own, such as parts of speech
            found = [found[0].map(lambda scores: {"f1": scores["macro_f1"], **scores})]
    return [*found, calibration(*predictions.answers())]


def group_statistics(predictions: Predictions) -> list[Statistic]:
    """Returns macro F1 and calibration error of the likeliest of Ekman's six emotions and neutral.

    Measured on the texts whose labels are of one group, over the groups that occur there.
    """
    labels, names = predictions.spec.labels, list(EKMAN)
    columns = [[labels.index(label) for label in group] for group in EKMAN.values()]
    in_truth = np.stack([predictions.truth[:, group].any(axis=1) for group in columns], axis=1)  # [N, groups]
    kept = in_truth.sum(axis=1) == 1
    answered = [group_scores(dict(zip(labels, row, strict=True))) for row in predictions.probabilities[kept]]
    scores = np.array([[answer[name] for name in names] for answer in answered]).reshape(-1, len(names))
    truth, predicted, rows = in_truth[kept].argmax(axis=1), scores.argmax(axis=1), predictions.rows[kept]
    right, error = classification(truth, predicted, rows), calibration(scores.max(axis=1), predicted == truth, rows)
    return [
        right.map(lambda x: {"ekman_macro_f1": x["macro_f1"]}),
        error.map(lambda x: {"ekman_calibration_error": x["calibration_error"]}),
    ]


def by_domain(predictions: Predictions, data: Dataset) -> dict[str, dict[str, float]]:
    """Returns the metrics of each domain of a data set with a column "domain"; none without."""
    if "domain" not in data.column_names:
        return {}
    domains = np.array(data["domain"])[predictions.rows]  # of each item
    kept = {name: np.unique(predictions.rows[domains == name]) for name in np.unique(domains).tolist()}
    return {name: measured(head_statistics(predictions.of_rows(rows)), False)[0] for name, rows in kept.items()}


# What the embedding says


def embed(
    pipe: Any, texts: list[str], matryoshka_dims: Sequence[int] = (), reference: str | None = None
) -> dict[str, np.ndarray]:
    """Returns the texts' vectors, float [N, E], by the suffix of their metrics' names.

    "" is the sentence embedding, "_raw" the encoder's own pooled vector, "_<n>" the embedding's first n dimensions and
    "_reference" the pooled vector of the encoder `reference`.
    """
    limits = [pipe.tokenizer.model_max_length, pipe.model.max_length]
    length = min(limit for limit in limits if limit is not None)
    ids = pipe.tokenizer(texts, truncation=True, max_length=length)["input_ids"]
    mode, pad_token_id = pipe.model.config.pooling_mode, pipe.tokenizer.pad_token_id or 0
    embeddings = np.stack([record["sentence_embedding"] for record in pipe(texts, tasks=[])])
    views = {"": embeddings, "_raw": encode(pipe.model.encoder, ids, mode, pad_token_id).numpy()}
    views.update({f"_{dim}": embeddings[:, :dim] for dim in matryoshka_dims})
    if reference:
        encoder = AutoModel.from_pretrained(reference).eval().to(pipe.device)
        views["_reference"] = encode(encoder, ids, mode, pad_token_id).numpy()
    return views


def pair_correlations(pipe: Any, task: TaskRecipe, data: Dataset, matryoshka_dims: list[int]) -> Statistic:
    """Returns Spearman's correlation of pairs' scores with each of the vectors of `embed`."""
    views = embed(pipe, [text for column in task.text_columns for text in data[column]], matryoshka_dims)
    values = {f"spearman{suffix}": cosines(*np.split(view, 2)) for suffix, view in views.items()}
    return rank_correlations(values, list(data[task.label_column]))


def measure_drift(pipe: Any, dataset: str, split: str, column: str, reference: str, intervals: bool) -> dict[str, Any]:
    """Returns how near the embedding is to the encoder `reference` on one column of a data set, and on what it was measured.

    `cosine_raw` is the mean cosine similarity of the two encoders' pooled vectors; `neighbours_at_10` the share of each
    text's ten nearest neighbours under the reference that are so under the sentence embedding, and
    `neighbours_at_10_raw` under the encoder's own pooled vector. Lists of tokens are joined; a text that occurs twice
    counts once.

    Raises:
        ValueError: The data set has no such split or column, or too few texts.
    """
    data = load_split(dataset, split, [column])
    texts = dict.fromkeys(" ".join(text) if isinstance(text, list) else text for text in data[column])
    views = embed(pipe, list(texts), reference=reference)
    before, now, embeddings = (views[suffix] for suffix in ("_reference", "_raw", ""))
    values = {
        "cosine_raw": cosines(before, now),
        f"neighbours_at_{NEIGHBOURS}": neighbours_shared(before, embeddings, NEIGHBOURS),
        f"neighbours_at_{NEIGHBOURS}_raw": neighbours_shared(before, now, NEIGHBOURS),
    }
    metrics, ranges = measured([of_means(values)], intervals)
    facts = {"dataset": public_name(dataset), "split": split, "rows": len(data), "sha256": hash_columns(data, [column])}
    return {**facts, "metrics": metrics, "intervals": ranges}


# Data, and the command line


def check_splits(recipe: Recipe, split: str) -> None:
    """Loads all data that will be measured on, so that what is missing is known before the work starts.

    Raises:
        RecipeError: Some cannot be loaded; the message names them all.
    """
    problems = []
    for name, task in recipe.parts.items():
        try:
            if task.splits.get(split, split):  # empty: the data set has no such split
                load_task_split(task, split)
        except (ValueError, OSError) as error:
            problems.append(f"tasks.{name}: {error}")
    if problems:
        raise RecipeError("\n".join(problems))


def command(args: argparse.Namespace) -> str:
    """Returns the command that gives these results, without what is particular to this machine."""
    recipe = args.recipe.resolve()
    options = {
        "recipe": recipe.relative_to(ROOT) if recipe.is_relative_to(ROOT) else recipe.name,
        "only": args.only and " ".join(args.only),
        "split": args.split,
        "rewrite": args.rewrite,
    }
    if recipe == DEFAULT_RECIPE:
        del options["recipe"]
    given = [f"--{name} {value}" for name, value in options.items() if value]
    return " ".join(["python -m evaluation.evaluate MODEL", *given])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("--recipe", type=Path, default=DEFAULT_RECIPE, help="names tasks and data")
    parser.add_argument("--only", nargs="+", metavar="TASK", help="measure these tasks of the recipe alone")
    parser.add_argument("--data", type=Path, help="folder with local copies of the data sets")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--rewrite", choices=REWRITES, help="rewrite the texts first, for instance in lower case")
    parser.add_argument("--output", type=Path, help="where to write the results, for instance results/release.json")
    args = parser.parse_args()
    try:
        recipe, public = (Recipe.read(args.recipe, data, only=args.only or ()) for data in (args.data, None))
        check_splits(recipe, args.split)
        pipe = pipeline("multitask", model=args.model, trust_remote_code=True)
        tasks = measure(pipe, recipe, args.split, intervals=True, form=args.rewrite)
    except (RecipeError, DataError) as error:
        sys.exit(str(error))
    result = {
        "command": command(args),
        "parameters": sum(x.numel() for x in pipe.model.parameters()),
        "tasks": tasks,
        "recipe": dataclasses.asdict(public),  # without the places of local copies
        **environment_info(),
    }
    for name, found in tasks.items():
        print(name, json.dumps(found["metrics"]))
    if args.output:
        write_json(args.output, result)


if __name__ == "__main__":
    main()
