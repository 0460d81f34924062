"""What a projected embedding keeps at fewer dimensions: nearest neighbours, similarity and retrieval on test sets.

Axes: N texts, Q queries, H the full vector, E the projected one.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
from sentence_transformers import SentenceTransformer
from tqdm import tqdm

from evaluation.metrics import ndcg, neighbour_overlap, ranked_documents, recall_at, similarity_metrics

NEIGHBOURS = 10
NEIGHBOUR_SET = "wnut17"
PAIR_SETS = ("stsb", "sick_r", "sts_unseen")
RETRIEVAL_SETS = ("squad_sentences", "scifact")
ENCODED_TOGETHER = 1000  # texts in a file of the cache

Encode = Callable[[Sequence[str]], np.ndarray]
View = Callable[[np.ndarray], np.ndarray]
Measure = Callable[[View], dict[str, float]]


class EncoderVectors:
    """Encodes texts with an encoder's own pooled vectors, before any projection, and keeps them in a folder.

    Args:
        encoder: Folder or Hub id that `SentenceTransformer` loads.
        cache: Folder for the vectors, so that an interrupted run continues; None keeps nothing.
    """

    def __init__(self, encoder: str, cache: Path | None = None) -> None:
        transformer, pooling, *_ = SentenceTransformer(encoder, device="cpu")
        self.model = SentenceTransformer(modules=[transformer, pooling], device="cpu")
        self.digest = hashlib.sha256(b"".join(x.numpy().tobytes() for x in self.model.state_dict().values())).hexdigest()
        self.cache = cache

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Returns the texts' unit-length vectors, float32 [N, H]; a progress bar shows on standard error."""
        distinct = list(dict.fromkeys(texts))
        starts = tqdm(range(0, len(distinct), ENCODED_TOGETHER), desc=f"{len(distinct):,} texts", leave=False)
        vectors = np.concatenate([self._chunk(distinct[start : start + ENCODED_TOGETHER]) for start in starts])
        rows = {text: row for row, text in enumerate(distinct)}
        return vectors[[rows[text] for text in texts]]

    def _chunk(self, texts: list[str]) -> np.ndarray:
        if self.cache is None:
            return self.model.encode(texts, normalize_embeddings=True, show_progress_bar=False)
        path = self.cache / (hashlib.sha256(json.dumps([self.digest, texts]).encode()).hexdigest() + ".npy")
        if not path.exists():
            self.cache.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            with partial.open("wb") as stream:
                np.save(stream, self.model.encode(texts, normalize_embeddings=True, show_progress_bar=False))
            partial.replace(path)
        return np.load(path)


def prefix_views(matrix: np.ndarray, dims: Iterable[int]) -> dict[str, View]:
    """Returns, by name, the full vector and each prefix of the projected one; float [N, H] to [N, H or dims].

    Args:
        matrix: float [E, H], the projection.
        dims: Prefix lengths, each at most E. Cosine similarity needs no further normalization.
    """

    def project(dim: int) -> View:
        return lambda vectors: vectors @ matrix[:dim].T

    return {str(matrix.shape[1]): lambda vectors: vectors, **{str(dim): project(dim) for dim in dims}}


def measure_embedding(
    encode: Encode, data: Path, views: Mapping[str, View]
) -> Iterator[tuple[str, dict[str, dict[str, float]]]]:
    """Yields each test set's name and its figures in each view: overlap@10, Spearman's correlation, or nDCG@10 and recall@100.

    Args:
        encode: Texts to vectors, float [N, H]; every test set is encoded once.
        data: Folder of the data sets.
        views: From `prefix_views`.

    Raises:
        FileNotFoundError: A data set is missing; the message names its file.
    """
    prepare: dict[str, Callable[[Encode, Path], Measure]] = {
        NEIGHBOUR_SET: neighbour_measure,
        **dict.fromkeys(PAIR_SETS, pair_measure),
        **dict.fromkeys(RETRIEVAL_SETS, retrieval_measure),
    }
    for name, measure_of in prepare.items():
        measure = measure_of(encode, data / name)
        yield name, {view: measure(project) for view, project in views.items()}


def neighbour_measure(encode: Encode, folder: Path, split: str = "test") -> Measure:
    """Returns what computes a view's overlap@10 with the full vector on a split's distinct texts."""
    vectors = encode(distinct_texts(folder, split))
    return lambda view: {"overlap@10": neighbour_overlap(vectors, view(vectors), NEIGHBOURS)}


def pair_measure(encode: Encode, folder: Path, split: str = "test") -> Measure:
    """Returns what computes a view's Spearman correlation with the scores of a split's sentence pairs."""
    rows = read_columns(folder / f"{split}.parquet", "sentence1", "sentence2", "score")
    first, second = np.split(encode(rows["sentence1"] + rows["sentence2"]), 2)
    return lambda view: {"spearman": similarity_metrics(view(first), view(second), rows["score"])}


def retrieval_measure(encode: Encode, folder: Path) -> Measure:
    """Returns what computes a view's mean nDCG@10 and recall@100 over the queries of a retrieval set."""
    corpus, queries = (read_columns(folder / f"{name}.parquet", "id", "text") for name in ("corpus", "queries"))
    judged = read_columns(folder / "qrels.parquet", "query_id", "doc_id", "score")
    documents = {name: row for row, name in enumerate(corpus["id"])}
    gains: dict[str, dict[int, float]] = {name: {} for name in queries["id"]}
    for query, document, score in zip(judged["query_id"], judged["doc_id"], judged["score"], strict=True):
        gains[query][documents[document]] = score
    asked, stored = encode(queries["text"]), encode(corpus["text"])

    def measure(view: View) -> dict[str, float]:
        ranking = ranked_documents(view(asked), view(stored), 100)
        scores = {"ndcg@10": ndcg(ranking, list(gains.values())), "recall@100": recall_at(ranking, list(gains.values()))}
        return {name: float(values.mean()) for name, values in scores.items()}

    return measure


def distinct_texts(folder: Path, split: str) -> list[str]:
    """Returns the distinct texts of a split in their order; tokens are joined by spaces."""
    path = folder / f"{split}.parquet"
    column = "text" if "text" in pyarrow.parquet.read_schema(path).names else "tokens"
    rows = read_columns(path, column)[column]
    return list(dict.fromkeys(row if isinstance(row, str) else " ".join(row) for row in rows))


def read_columns(path: Path, *names: str) -> dict[str, list[Any]]:
    """Returns columns of a parquet file."""
    return pyarrow.parquet.read_table(path, columns=list(names)).to_pydict()
