"""The metrics of each task kind, as their data sets' papers define them, and how sure they are.

Every metric has an interval next to it: the 95 % percentile bootstrap (Efron 1979) over the rows of the data set. Each
row's share in a metric is computed once; a resample only adds them up. Axes: N rows, R resamples, C labels, E embedding.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from scipy.stats import pearsonr, rankdata, spearmanr
from seqeval.scheme import IOB2, Entities
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error, recall_score

Scores = dict[str, np.ndarray]
Intervals = dict[str, list[float]]

RESAMPLES = 1000
_RESAMPLES_AT_ONCE = 100  # bounds the memory
COVERAGE = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)  # shares of the answers that are kept
BINS = 15  # of the calibration error, as in Guo et al. 2017

# Text labels


def classification_metrics(truth: Sequence, predicted: Sequence) -> dict[str, float]:
    """Returns `macro_recall`, `macro_f1` and `accuracy`, each in [0, 1], over the labels that occur in `truth`."""
    labels = sorted(set(truth))
    return {
        "macro_recall": float(recall_score(truth, predicted, labels=labels, average="macro", zero_division=0)),
        "macro_f1": float(f1_score(truth, predicted, labels=labels, average="macro", zero_division=0)),
        "accuracy": float(accuracy_score(truth, predicted)),
    }


def classification_intervals(truth: np.ndarray, predicted: np.ndarray, rows: np.ndarray) -> Intervals:
    """Returns the intervals of `classification_metrics`.

    Args:
        truth: int [items], label indices.
        predicted: int [items].
        rows: int [items], the row of the data set that each item, a text or a word, belongs to.
    """
    labels = np.arange(max(truth.max(), predicted.max()) + 1)
    counts = _sum_by_row(_label_counts(truth[:, None] == labels, predicted[:, None] == labels), rows)

    def scores(sums: np.ndarray) -> Scores:
        right, _, gold = np.moveaxis(sums, 1, 0)  # each [R, C]
        recall, f1 = (_mean_where(gold > 0, values) for values in (_ratio(right, gold), _f1(sums)))
        return {"macro_recall": recall, "macro_f1": f1, "accuracy": _ratio(right.sum(axis=1), gold.sum(axis=1))}

    return bootstrap_sums(counts, scores)


def multi_label_metrics(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Returns `macro_f1` (over the labels that occur in `truth`), `micro_f1` and `exact_match`, each in [0, 1].

    Args:
        truth: 0/1 [N, C].
        predicted: 0/1 [N, C].
    """
    labels = np.flatnonzero(truth.any(axis=0))
    macro = f1_score(truth, predicted, labels=labels, average="macro", zero_division=0) if len(labels) else 0.0
    return {
        "macro_f1": float(macro),
        "micro_f1": float(f1_score(truth, predicted, average="micro", zero_division=0)),
        "exact_match": float(accuracy_score(truth, predicted)),
    }


def multi_label_intervals(truth: np.ndarray, predicted: np.ndarray) -> Intervals:
    """Returns the intervals of `multi_label_metrics`, for the same 0/1 [N, C]."""

    def scores(sums: np.ndarray) -> Scores:
        return {"macro_f1": _mean_where(sums[:, 2] > 0, _f1(sums)), "micro_f1": _f1(sums.sum(axis=2))}

    exact = mean_intervals({"exact_match": (truth == predicted).all(axis=1)})
    return {**bootstrap_sums(_label_counts(truth > 0, predicted > 0), scores), **exact}


def regression_metrics(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Returns `spearman` and `pearson` in [-1, 1] and `mean_absolute_error`, each the mean over a head's C values.

    Args:
        truth: float [N, C].
        predicted: float [N, C].
    """
    pairs = list(zip(truth.T, predicted.T, strict=True))
    return {
        "spearman": float(np.mean([_defined(spearmanr(x, y).statistic) for x, y in pairs])),
        "pearson": float(np.mean([_defined(pearsonr(x, y).statistic) for x, y in pairs])),
        "mean_absolute_error": float(mean_absolute_error(truth, predicted)),
    }


def regression_intervals(truth: np.ndarray, predicted: np.ndarray) -> Intervals:
    """Returns the intervals of `regression_metrics`, for the same float [N, C]."""

    def scores(index: np.ndarray) -> Scores:
        columns = [(truth[index, column], predicted[index, column]) for column in range(truth.shape[1])]  # [R, N] each
        return {
            "spearman": np.mean([_pearson(rankdata(x, axis=1), rankdata(y, axis=1)) for x, y in columns], axis=0),
            "pearson": np.mean([_pearson(x, y) for x, y in columns], axis=0),
        }

    errors = np.abs(truth - predicted).mean(axis=1)
    return {**bootstrap(len(truth), scores), **mean_intervals({"mean_absolute_error": errors})}


# Entities


def entity_metrics(truth: list[list[str]], predicted: list[list[str]]) -> dict[str, float]:
    """Returns strict entity-level `f1`, `precision` and `recall` in [0, 1] from BIO tags per sentence.

    Beside them stands `f1_<TYPE>` of each type that occurs in `truth`, for instance `f1_PER`.
    """
    counts, types = entity_counts(truth, predicted)
    in_truth = np.flatnonzero(counts[:, 2].any(axis=0))
    return {name: float(value[0]) for name, value in _entity_scores(counts.sum(axis=0)[None], types, in_truth).items()}


def entity_counts(truth: list[list[str]], predicted: list[list[str]]) -> tuple[np.ndarray, list[str]]:
    """Returns how many entities each sentence has, int [N, 3, types], and the types' names.

    The second axis is: found and right, found, in `truth`. An entity is right if its type and both its ends are.
    """
    gold, found = (Entities(tags, scheme=IOB2) for tags in (truth, predicted))
    types = sorted(gold.unique_tags | found.unique_tags)
    counts = np.zeros((len(truth), 3, len(types)), dtype=int)
    for row, (in_truth, in_prediction) in enumerate(zip(gold.entities, found.entities, strict=True)):
        for kind, entities in enumerate((set(in_truth) & set(in_prediction), in_prediction, in_truth)):
            for entity in entities:
                counts[row, kind, types.index(entity.tag)] += 1
    return counts, types


def entity_intervals(truth: list[list[str]], predicted: list[list[str]]) -> Intervals:
    """Returns the intervals of `entity_metrics`; a resample says nothing of a type that it lacks."""
    counts, types = entity_counts(truth, predicted)
    in_truth = np.flatnonzero(counts[:, 2].any(axis=0))
    return bootstrap_sums(counts, lambda sums: _entity_scores(sums, types, in_truth))


def _entity_scores(sums: np.ndarray, types: list[str], in_truth: np.ndarray) -> Scores:
    """Returns the metrics, each [R], for sums [R, 3, types] of `entity_counts`, of the types with these indices too."""
    right, found, gold = np.moveaxis(sums.sum(axis=2), 1, 0)  # each [R]
    total = {"f1": _f1(sums.sum(axis=2)), "precision": _ratio(right, found), "recall": _ratio(right, gold)}
    per_type = np.where(sums[:, 1:].any(axis=1), _f1(sums), np.nan)  # [R, types]
    return {**total, **{f"f1_{types[i]}": per_type[:, i] for i in in_truth}}


def entities_to_tags(spans: list[tuple[int, int]], entities: list[dict]) -> list[str]:
    """Returns the BIO tag of each data set token, given its character span and the entities found in the text.

    An entity that starts or ends inside a token is wrong, whatever its group: it gets the group "<group>-partial".
    """
    tags = ["O"] * len(spans)
    for entity in entities:
        inside = [i for i, (start, end) in enumerate(spans) if start < entity["end"] and entity["start"] < end]
        whole = (spans[inside[0]][0], spans[inside[-1]][1]) == (entity["start"], entity["end"])
        for i in inside:
            tags[i] = ("B-" if i == inside[0] else "I-") + entity["entity_group"] + ("" if whole else "-partial")
    return tags


def entities_right(spans: list[tuple[int, int]], tags: list[str], entities: list[dict]) -> list[bool]:
    """Returns for each entity found in a text whether its group and both its ends are those of an entity of `tags`.

    Args:
        spans: The character span of each of the data set's tokens.
        tags: The tokens' BIO tags.
        entities: As the pipeline gives them.
    """
    gold = Entities([tags], scheme=IOB2).entities[0]
    right = {(x.tag, spans[x.start][0], spans[x.end - 1][1]) for x in gold}
    return [(x["entity_group"], x["start"], x["end"]) in right for x in entities]


# Calibration


def coverage(confidence: np.ndarray, correct: np.ndarray) -> dict[str, dict[str, float]]:
    """Returns how accuracy rises as answers of low confidence are left out.

    Args:
        confidence: float [items], the score of each answer.
        correct: bool [items], whether it is right.

    Returns:
        For each share of answers in `COVERAGE`, the `min_score` that keeps about this share, and the `accuracy` of what it keeps; none
        without answers.
    """
    order = np.argsort(-confidence, kind="stable")
    counts = {share: round(share * len(order)) for share in COVERAGE}
    return {
        f"{share:.1f}": {"min_score": float(confidence[order[n - 1]]), "accuracy": float(correct[order[:n]].mean())}
        for share, n in counts.items()
        if n
    }


def confidence_bins(confidence: np.ndarray) -> np.ndarray:
    """Returns the bin, int [items] in 0 … `BINS` - 1, of each confidence in [0, 1]: of equal width, closed on the right."""
    return (np.ceil(confidence * BINS) - 1).clip(0, BINS - 1).astype(int)


def calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Returns the expected calibration error in [0, 1] (Guo et al. 2017): the mean gap of confidence and accuracy.

    Args:
        confidence: float [items], the probability of each predicted label.
        correct: bool [items], whether that label is right.
    """
    return float(_calibration_scores(_calibration_parts(confidence, correct).sum(axis=0)[None])["calibration_error"][0])


def calibration_intervals(confidence: np.ndarray, correct: np.ndarray, rows: np.ndarray) -> Intervals:
    """Returns the interval of `calibration_error`; `rows`, int [items], says which row of the data set an item is of.

    Resamples vary within bins, and every gap counts: the interval of a well calibrated head lies rather high.
    """
    return bootstrap_sums(_sum_by_row(_calibration_parts(confidence, correct), rows), _calibration_scores)


def _calibration_parts(confidence: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """Returns what each item adds to the gap of every bin, and last its count, float [items, BINS + 1]."""
    parts = np.zeros((len(confidence), BINS + 1))
    parts[np.arange(len(confidence)), confidence_bins(confidence)] = correct - confidence
    parts[:, BINS] = 1
    return parts


def _calibration_scores(sums: np.ndarray) -> Scores:
    return {"calibration_error": _ratio(np.abs(sums[:, :BINS]).sum(axis=1), sums[:, BINS])}


# Embeddings


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Returns the cosine similarity of each row of `first` and of `second`, float [N] for inputs float [N, E]."""
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return (first * second).sum(axis=1) / norms.clip(min=1e-12)


def similarity_metrics(first: np.ndarray, second: np.ndarray, scores: Sequence[float]) -> float:
    """Returns Spearman's rank correlation in [-1, 1] of cosine similarities and gold scores; inputs float [N, E].

    If one of them is the same for all pairs, it ranks nothing, and the answer is 0.
    """
    return _defined(spearmanr(cosines(first, second), scores).statistic)


def rank_correlation_intervals(values: Scores, scores: Sequence[float]) -> Intervals:
    """Returns the interval of Spearman's correlation of each entry of `values`, float [N], with `scores`, float [N]."""
    gold = np.asarray(scores, dtype=float)

    def correlations(index: np.ndarray) -> Scores:
        ranks = rankdata(gold[index], axis=1)  # [R, N]
        return {name: _pearson(rankdata(value[index], axis=1), ranks) for name, value in values.items()}

    return bootstrap(len(gold), correlations)


def neighbours_shared(before: np.ndarray, after: np.ndarray, count: int) -> np.ndarray:
    """Returns which share of each text's nearest neighbours before is among its nearest after, float [N] in [0, 1].

    Args:
        before: float [N, E], one embedding per text.
        after: float [N, F], another one of the same texts.
        count: How many neighbours by cosine similarity to compare, the text itself left out; less than N.

    Raises:
        ValueError: There are too few texts.
    """
    if len(before) <= count:
        raise ValueError(f"{len(before)} distinct texts are too few to compare {count} neighbours; give more rows.")
    nearest = [_nearest(vectors, count) for vectors in (before, after)]
    return np.array([len(set(a) & set(b)) / count for a, b in zip(*nearest, strict=True)])


def neighbour_overlap(before: np.ndarray, after: np.ndarray, count: int) -> float:
    """Returns the mean over texts of `neighbours_shared`, in [0, 1]."""
    return float(neighbours_shared(before, after, count).mean())


def ranked_documents(queries: np.ndarray, documents: np.ndarray, count: int) -> np.ndarray:
    """Returns the indices of each query's `count` nearest documents by cosine similarity, best first, int [Q, count].

    Args:
        queries: float [Q, E].
        documents: float [N, E]; if N is less than `count`, all are ranked.
        count: At least 1.
    """
    similarity = unit(queries) @ unit(documents).T  # [Q, N]
    return np.argsort(-similarity, axis=1, kind="stable")[:, :count]


def ndcg(ranking: np.ndarray, gains: Sequence[Mapping[int, float]], count: int = 10) -> np.ndarray:
    """Returns each query's normalized discounted cumulative gain at `count`, float [Q] in [0, 1] (Järvelin and Kekäläinen 2002).

    Args:
        ranking: int [Q, at least `count` or all documents], from `ranked_documents`.
        gains: Each query's relevant documents and how relevant each is, above 0. A query without any scores 0.
        count: How many ranks count.
    """
    discounts = 1 / np.log2(np.arange(2, count + 2))
    found = np.zeros((len(ranking), count))
    ideal = np.zeros((len(ranking), count))
    for row, (documents, gain) in enumerate(zip(ranking[:, :count].tolist(), gains, strict=True)):
        found[row, : len(documents)] = [gain.get(document, 0.0) for document in documents]
        best = sorted(gain.values(), reverse=True)[:count]
        ideal[row, : len(best)] = best
    return _ratio(found @ discounts, ideal @ discounts)


def recall_at(ranking: np.ndarray, gains: Sequence[Mapping[int, float]], count: int = 100) -> np.ndarray:
    """Returns the share of each query's relevant documents among its first `count`, float [Q] in [0, 1]; see `ndcg`."""
    found = [len(gain.keys() & set(row)) for row, gain in zip(ranking[:, :count].tolist(), gains, strict=True)]
    return _ratio(np.array(found, dtype=float), np.array([len(gain) for gain in gains], dtype=float))


def _nearest(vectors: np.ndarray, count: int) -> np.ndarray:
    similarity = unit(vectors) @ unit(vectors).T  # [N, N]
    np.fill_diagonal(similarity, -np.inf)
    return np.argpartition(-similarity, count, axis=1)[:, :count]


def unit(vectors: np.ndarray) -> np.ndarray:
    """Returns vectors, float [N, E], at unit length; a zero vector stays zero."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=1e-12)


# The bootstrap


def resample(rows: int, resamples: int = RESAMPLES, seed: int = 0) -> Iterator[np.ndarray]:
    """Yields row indices drawn with replacement, int [R, rows], some resamples at a time; the same in every process."""
    generator = np.random.default_rng(seed)
    for start in range(0, resamples, _RESAMPLES_AT_ONCE):
        yield generator.integers(0, rows, size=(min(_RESAMPLES_AT_ONCE, resamples - start), rows))


def bootstrap(rows: int, scores: Callable[[np.ndarray], Scores]) -> Intervals:
    """Returns the 95 % percentile interval [low, high] of each score over `RESAMPLES` resamples of the rows.

    Args:
        rows: How many rows there are.
        scores: Maps row indices, int [R, rows], to each score's values, float [R]; those that are NaN are left out.
    """
    drawn = [scores(index) for index in resample(rows)]
    values = {name: np.concatenate([chunk[name] for chunk in drawn]) for name in drawn[0]}
    return {name: np.nanpercentile(value, [2.5, 97.5]).tolist() for name, value in values.items()}


def bootstrap_sums(parts: np.ndarray, scores: Callable[[np.ndarray], Scores]) -> Intervals:
    """Returns the interval of each score that is a function of a sum over rows.

    Args:
        parts: [N, ...], what each row adds to the sum.
        scores: Maps sums, float [R, ...], to each score's values, float [R].
    """

    parts = parts.astype(float)

    def sums(index: np.ndarray) -> np.ndarray:
        times = np.stack([np.bincount(x, minlength=len(parts)) for x in index]).astype(float)  # [R, N]
        return np.tensordot(times, parts, axes=1)

    return bootstrap(len(parts), lambda index: scores(sums(index)))


def mean_intervals(values: Scores) -> Intervals:
    """Returns the interval of the mean of each entry, float [N]."""
    parts = np.stack(list(values.values()), axis=1)
    return bootstrap_sums(parts, lambda sums: dict(zip(values, sums.T / len(parts), strict=True)))


def _sum_by_row(parts: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Returns the sums of the parts, [items, ...], of each row, float [rows, ...]; rows without items are left out."""
    names, index = np.unique(rows, return_inverse=True)
    sums = np.zeros((len(names), *parts.shape[1:]))
    np.add.at(sums, index, parts)
    return sums


def _label_counts(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Returns, for bool [N, C]: is each label predicted and right, predicted, right; bool [N, 3, C]."""
    return np.stack([truth & predicted, predicted, truth], axis=1)


def _f1(sums: np.ndarray) -> np.ndarray:
    """Returns F1 for sums [R, 3, ...] of right and found, found, and true ones; 0 where there are none."""
    return _ratio(2 * sums[:, 0], sums[:, 1] + sums[:, 2])


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Returns part ÷ whole, 0 where the whole is 0."""
    return np.divide(part, whole, out=np.zeros(np.shape(part)), where=whole != 0)


def _mean_where(kept: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Returns the mean of each row's kept values, float [R] for [R, C]; 0 for a row without any."""
    return _ratio((values * kept).sum(axis=1), kept.sum(axis=1))


def _pearson(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Returns Pearson's correlation of each row, float [R] for [R, N]; 0 where one of the two is constant."""
    first, second = (x - x.mean(axis=1, keepdims=True) for x in (first, second))
    return _ratio((first * second).sum(axis=1), np.sqrt((first**2).sum(axis=1) * (second**2).sum(axis=1)))


def _defined(correlation: float) -> float:
    """Returns a correlation, 0 instead of NaN: what is constant ranks nothing."""
    return float(np.nan_to_num(correlation))
