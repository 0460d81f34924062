"""The metrics of each task kind, as their data sets' papers define them, and how sure they are.

Every metric has an interval next to it: the 95 % percentile bootstrap (Efron 1979) over the rows of the data set. Each
row's share in a metric is computed once; a resample only adds them up. Axes: N rows, R resamples, C labels, E embedding.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata
from seqeval.scheme import IOB2, Entities
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize

Scores = dict[str, np.ndarray]
Intervals = dict[str, list[float]]

RESAMPLES = 1000
_RESAMPLES_AT_ONCE = 100  # bounds the memory
COVERAGE = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)  # shares of the answers that are kept
BINS = 15  # of the calibration error, as in Guo et al. 2017


@dataclass(frozen=True)
class Statistic:
    """Metrics of a data set, and how they vary with its rows.

    Attributes:
        rows: How many rows there are.
        scores: Maps row indices, int [R, any number], to each metric's values on these rows, float [R]; NaN: it says nothing there.
    """

    rows: int
    scores: Callable[[np.ndarray], Scores]

    def metrics(self) -> dict[str, float]:
        """Returns each metric on all rows."""
        return {name: float(values[0]) for name, values in self.scores(np.arange(self.rows)[None]).items()}

    def intervals(self) -> Intervals:
        """Returns the 95 % percentile interval [low, high] of each metric over `RESAMPLES` resamples; NaN is left out."""
        drawn = [self.scores(index) for index in resample(self.rows)]
        values = {name: np.concatenate([chunk[name] for chunk in drawn]) for name in drawn[0]}
        return {name: np.nanpercentile(value, [2.5, 97.5]).tolist() for name, value in values.items()}

    def map(self, change: Callable[[Scores], Scores]) -> "Statistic":
        """Returns this one with other metrics, made of its own."""
        return Statistic(self.rows, lambda index: change(self.scores(index)))

    def __or__(self, other: "Statistic") -> "Statistic":
        """Returns this one's metrics and another's of the same rows."""
        return Statistic(self.rows, lambda index: self.scores(index) | other.scores(index))


def of_sums(parts: np.ndarray, scores: Callable[[np.ndarray], Scores]) -> Statistic:
    """Returns metrics that are functions of a sum over rows.

    Args:
        parts: [N, ...], what each row adds to the sum.
        scores: Maps sums, float [R, ...], to each metric's values, float [R].
    """
    parts = parts.astype(float)

    def of_rows(index: np.ndarray) -> Scores:
        times = np.stack([np.bincount(x, minlength=len(parts)) for x in index]).astype(float)  # [R, N]
        return scores(np.tensordot(times, parts, axes=1))

    return Statistic(len(parts), of_rows)


def of_means(values: Scores) -> Statistic:
    """Returns the mean of each entry, float [N]."""
    parts = np.stack(list(values.values()), axis=1)
    return of_sums(parts, lambda sums: dict(zip(values, sums.T / len(parts), strict=True)))


def resample(rows: int) -> Iterator[np.ndarray]:
    """Yields row indices drawn with replacement, int [R, rows], some resamples at a time; the same in every process."""
    generator = np.random.default_rng(0)
    for _ in range(RESAMPLES // _RESAMPLES_AT_ONCE):
        yield generator.integers(0, rows, size=(_RESAMPLES_AT_ONCE, rows))


# Labels and numbers


def classification(truth: Sequence, predicted: Sequence, rows: np.ndarray | None = None) -> Statistic:
    """Returns `macro_recall` and `macro_f1` over the labels that occur in `truth`, and `accuracy`, each in [0, 1].

    Args:
        truth: One label of each of the items, which are texts or words.
        predicted: The same.
        rows: int [items], the row of the data set that each item belongs to; None: each is a row.
    """
    labels, numbers = np.unique(np.concatenate([truth, predicted]), return_inverse=True)
    given, answered = (side[:, None] == np.arange(len(labels)) for side in np.split(numbers, 2))
    counts = _label_counts(given, answered)

    def scores(sums: np.ndarray) -> Scores:
        right, _, gold = np.moveaxis(sums, 1, 0)  # each [R, C]
        recall, f1 = (_mean_where(gold > 0, values) for values in (_ratio(right, gold), _f1(sums)))
        return {"macro_recall": recall, "macro_f1": f1, "accuracy": _ratio(right.sum(axis=1), gold.sum(axis=1))}

    return of_sums(counts if rows is None else _sum_by_row(counts, rows), scores)


def multi_label(truth: np.ndarray, predicted: np.ndarray) -> Statistic:
    """Returns `macro_f1` (over the labels that occur in `truth`), `micro_f1` and `exact_match`, each in [0, 1].

    Args:
        truth: 0/1 [N, C].
        predicted: 0/1 [N, C].
    """

    def scores(sums: np.ndarray) -> Scores:
        return {"macro_f1": _mean_where(sums[:, 2] > 0, _f1(sums)), "micro_f1": _f1(sums.sum(axis=2))}

    exact = of_means({"exact_match": (truth == predicted).all(axis=1)})
    return of_sums(_label_counts(truth > 0, predicted > 0), scores) | exact


def regression(truth: np.ndarray, predicted: np.ndarray) -> Statistic:
    """Returns `spearman` and `pearson` in [-1, 1] and `mean_absolute_error`, each the mean over a head's C values.

    A correlation with values that are all the same is 0.

    Args:
        truth: float [N, C].
        predicted: float [N, C].
    """

    def scores(index: np.ndarray) -> Scores:
        columns = [(truth[index, column], predicted[index, column]) for column in range(truth.shape[1])]  # [R, N] each
        return {
            "spearman": np.mean([_pearson(rankdata(x, axis=1), rankdata(y, axis=1)) for x, y in columns], axis=0),
            "pearson": np.mean([_pearson(x, y) for x, y in columns], axis=0),
        }

    return Statistic(len(truth), scores) | of_means({"mean_absolute_error": np.abs(truth - predicted).mean(axis=1)})


# Entities


def entities(truth: list[list[str]], predicted: list[list[str]]) -> Statistic:
    """Returns strict entity-level `f1`, `precision` and `recall` in [0, 1] from BIO tags per sentence.

    Beside them stands `f1_<TYPE>` of each type that occurs in `truth`, for instance `f1_PER`; rows without this type say nothing
    of it.
    """
    counts, types = entity_counts(truth, predicted)
    in_truth = np.flatnonzero(counts[:, 2].any(axis=0))

    def scores(sums: np.ndarray) -> Scores:
        right, found, gold = np.moveaxis(sums.sum(axis=2), 1, 0)  # each [R]
        total = {"f1": _f1(sums.sum(axis=2)), "precision": _ratio(right, found), "recall": _ratio(right, gold)}
        per_type = np.where(sums[:, 1:].any(axis=1), _f1(sums), np.nan)  # [R, types]
        return {**total, **{f"f1_{types[i]}": per_type[:, i] for i in in_truth}}

    return of_sums(counts, scores)


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


def calibration(confidence: np.ndarray, correct: np.ndarray, rows: np.ndarray) -> Statistic:
    """Returns the expected `calibration_error` in [0, 1] (Guo et al. 2017): the mean gap of confidence and accuracy.

    Resamples vary within bins, and every gap counts: the interval of a well calibrated head lies rather high.

    Args:
        confidence: float [items], the probability of each predicted label.
        correct: bool [items], whether that label is right.
        rows: int [items], the row of the data set that each item belongs to.
    """
    parts = np.zeros((len(confidence), BINS + 1))  # what each item adds to the gap of every bin, and last its count
    parts[np.arange(len(confidence)), confidence_bins(confidence)] = correct - confidence
    parts[:, BINS] = 1

    def scores(sums: np.ndarray) -> Scores:
        return {"calibration_error": _ratio(np.abs(sums[:, :BINS]).sum(axis=1), sums[:, BINS])}

    return of_sums(_sum_by_row(parts, rows), scores)


# Embeddings


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Returns the cosine similarity of each row of `first` and of `second`, float [N] for inputs float [N, E]."""
    return (normalize(first) * normalize(second)).sum(axis=1)


def rank_correlations(values: Scores, scores: Sequence[float]) -> Statistic:
    """Returns Spearman's rank correlation in [-1, 1] of each entry of `values`, float [N], with `scores`, float [N].

    An entry that is the same everywhere ranks nothing, and its correlation is 0.
    """
    gold = np.asarray(scores, dtype=float)

    def correlations(index: np.ndarray) -> Scores:
        ranks = rankdata(gold[index], axis=1)  # [R, N]
        return {name: _pearson(rankdata(value[index], axis=1), ranks) for name, value in values.items()}

    return Statistic(len(gold), correlations)


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
    finders = [NearestNeighbors(n_neighbors=count, metric="cosine").fit(vectors) for vectors in (before, after)]
    nearest = [finder.kneighbors(return_distance=False) for finder in finders]  # of each text among the others
    return np.array([len(set(a) & set(b)) / count for a, b in zip(*nearest, strict=True)])


# Sums


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
    varies = (np.ptp(first, axis=1) > 0) & (np.ptp(second, axis=1) > 0)
    first, second = (x - x.mean(axis=1, keepdims=True) for x in (first, second))
    return _ratio((first * second).sum(axis=1) * varies, np.sqrt((first**2).sum(axis=1) * (second**2).sum(axis=1)))
