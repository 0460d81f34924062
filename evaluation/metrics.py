"""The metrics of each task kind, as their data sets' papers define them."""

import numpy as np
from scipy.stats import spearmanr
from seqeval.metrics import f1_score as entity_f1_score
from seqeval.metrics import precision_score as entity_precision_score
from seqeval.metrics import recall_score as entity_recall_score
from seqeval.scheme import IOB2
from sklearn.metrics import accuracy_score, f1_score, recall_score


def classification_metrics(truth: list[str], predicted: list[str]) -> dict[str, float]:
    """Returns `macro_recall`, `macro_f1` and `accuracy`, each in [0, 1], over the labels that occur in `truth`."""
    labels = sorted(set(truth))
    return {
        "macro_recall": float(recall_score(truth, predicted, labels=labels, average="macro", zero_division=0)),
        "macro_f1": float(f1_score(truth, predicted, labels=labels, average="macro", zero_division=0)),
        "accuracy": float(accuracy_score(truth, predicted)),
    }


def entity_metrics(truth: list[list[str]], predicted: list[list[str]]) -> dict[str, float]:
    """Returns strict entity-level `f1`, `precision` and `recall` in [0, 1] from BIO tags per sentence."""
    options = {"mode": "strict", "scheme": IOB2, "zero_division": 0}
    return {
        "f1": float(entity_f1_score(truth, predicted, **options)),
        "precision": float(entity_precision_score(truth, predicted, **options)),
        "recall": float(entity_recall_score(truth, predicted, **options)),
    }


def token_spans(tokens: list[str]) -> list[tuple[int, int]]:
    """Returns the character span of each token in `" ".join(tokens)`."""
    spans, start = [], 0
    for token in tokens:
        spans.append((start, start + len(token)))
        start += len(token) + 1
    return spans


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


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Returns the cosine similarity of each row of `first` and of `second`, float [N] for inputs float [N, E]."""
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return (first * second).sum(axis=1) / norms.clip(min=1e-12)


def mean_cosine(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the mean cosine similarity of rows, in [-1, 1]."""
    return float(cosines(first, second).mean())


def similarity_metrics(first: np.ndarray, second: np.ndarray, scores: list[float]) -> float:
    """Returns Spearman's rank correlation in [-1, 1] of cosine similarities and gold scores; inputs float [N, E]."""
    return float(spearmanr(cosines(first, second), scores).statistic)


def neighbours_kept(before: np.ndarray, after: np.ndarray, count: int) -> float:
    """Returns which share, in [0, 1], of each text's nearest neighbours before is among its nearest after, on average.

    Args:
        before: float [N, E], one embedding per text.
        after: float [N, F], another one of the same texts.
        count: How many neighbours by cosine similarity to compare, the text itself left out; less than N.
    """
    nearest = [_nearest(vectors, count) for vectors in (before, after)]
    return float(np.mean([len(set(a) & set(b)) / count for a, b in zip(*nearest, strict=True)]))


def _nearest(vectors: np.ndarray, count: int) -> np.ndarray:
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=1e-12)
    similarity = unit @ unit.T  # [N, N]
    np.fill_diagonal(similarity, -np.inf)
    return np.argpartition(-similarity, count, axis=1)[:, :count]
