"""What the embedding keeps at fewer dimensions: `python -m evaluation.embedding . --data DATA --output results/embedding.json`.

Nearest neighbours, similarity, retrieval and classification from ten texts a label, all on test sets, with the encoder's full
vector beside the projected one and its prefixes. Axes: N texts, Q queries, H the full vector, E the projected one.
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
from safetensors.numpy import load_file
from sentence_transformers import SentenceTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import ndcg_score
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.preprocessing import normalize

from common.files import environment_info, write_json
from evaluation.metrics import cosines, neighbours_shared, rank_correlations

NEIGHBOURS = 10
NEIGHBOUR_SET = "wnut17"
PAIR_SETS = ("stsb", "sick_r", "sts_unseen")
RETRIEVAL_SETS = ("squad_sentences", "scifact")
PROBE_SETS = ("clinc150", "hwu64")
PROBE_ROWS, PROBE_DRAWS, PROBE_C = 10, 5, 10.0  # training rows of each label, how often drawn, inverse regularization

Encode = Callable[[Sequence[str]], np.ndarray]
View = Callable[[np.ndarray], np.ndarray]
Measure = Callable[[View], dict[str, float]]


class EncoderVectors:
    """Encodes texts with an encoder's own pooled vectors, before any projection.

    Args:
        encoder: Folder or Hub id that `SentenceTransformer` loads.
    """

    def __init__(self, encoder: str) -> None:
        transformer, pooling, *_ = SentenceTransformer(encoder, device="cpu")
        self.model = SentenceTransformer(modules=[transformer, pooling], device="cpu")
        self.digest = hashlib.sha256(b"".join(x.numpy().tobytes() for x in self.model.state_dict().values())).hexdigest()

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Returns the texts' unit-length vectors, float32 [N, H]; a progress bar shows on standard error."""
        distinct = list(dict.fromkeys(texts))
        vectors = self.model.encode(distinct, normalize_embeddings=True, show_progress_bar=True)
        rows = {text: row for row, text in enumerate(distinct)}
        return vectors[[rows[text] for text in texts]]


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
    """Yields each test set's name and its figures in each view: overlap@10, Spearman's correlation, nDCG@10 and recall@100, or accuracy.

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
        **dict.fromkeys(PROBE_SETS, probe_measure),
    }
    for name, measure_of in prepare.items():
        measure = measure_of(encode, data / name)
        yield name, {view: measure(project) for view, project in views.items()}


def neighbour_measure(encode: Encode, folder: Path, split: str = "test") -> Measure:
    """Returns what computes a view's overlap@10 with the full vector on a split's distinct texts."""
    vectors = encode(distinct_texts(folder, split))
    return lambda view: {"overlap@10": float(neighbours_shared(vectors, view(vectors), NEIGHBOURS).mean())}


def pair_measure(encode: Encode, folder: Path, split: str = "test") -> Measure:
    """Returns what computes a view's Spearman correlation with the scores of a split's sentence pairs."""
    rows = read_columns(folder / f"{split}.parquet", "sentence1", "sentence2", "score")
    first, second = np.split(encode(rows["sentence1"] + rows["sentence2"]), 2)
    return lambda view: rank_correlations({"spearman": cosines(view(first), view(second))}, rows["score"]).metrics()


def retrieval_measure(encode: Encode, folder: Path) -> Measure:
    """Returns what computes a view's mean nDCG@10 and recall@100 over the queries of a retrieval set."""
    corpus, queries = (read_columns(folder / f"{name}.parquet", "id", "text") for name in ("corpus", "queries"))
    judged = read_columns(folder / "qrels.parquet", "query_id", "doc_id", "score")
    rows, documents = ({name: row for row, name in enumerate(side["id"])} for side in (queries, corpus))
    gains = np.zeros((len(rows), len(documents)), np.float32)
    gains[[rows[x] for x in judged["query_id"]], [documents[x] for x in judged["doc_id"]]] = judged["score"]
    asked, stored = encode(queries["text"]), encode(corpus["text"])

    def measure(view: View) -> dict[str, float]:
        similarity = cosine_similarity(view(asked), view(stored))  # [Q, N]
        first = np.argsort(-similarity, axis=1)[:, :100]
        recall = np.take_along_axis(gains > 0, first, axis=1).sum(axis=1) / (gains > 0).sum(axis=1)
        return {"ndcg@10": float(ndcg_score(gains, similarity, k=10)), "recall@100": float(recall.mean())}

    return measure


def probe_measure(encode: Encode, folder: Path) -> Measure:
    """Returns what computes a view's test accuracy under linear probing with `PROBE_ROWS` training rows a label, a mean of draws."""
    train, test = (read_columns(folder / f"{split}.parquet", "text", "label") for split in ("train", "test"))
    labels, truth = np.array(train["label"]), np.array(test["label"])
    known, unknown = encode(train["text"]), encode(test["text"])

    def draw(seed: int) -> np.ndarray:
        order = np.random.default_rng(seed).permutation(len(labels))
        return np.concatenate([order[labels[order] == label][:PROBE_ROWS] for label in np.unique(labels)])

    def accuracy(view: View, rows: np.ndarray) -> float:
        probe = LogisticRegression(C=PROBE_C, max_iter=1000).fit(normalize(view(known[rows])), labels[rows])
        return float((probe.predict(normalize(view(unknown))) == truth).mean())

    return lambda view: {"accuracy": float(np.mean([accuracy(view, draw(seed)) for seed in range(PROBE_DRAWS)]))}


def distinct_texts(folder: Path, split: str) -> list[str]:
    """Returns the distinct texts of a split in their order; tokens are joined by spaces."""
    path = folder / f"{split}.parquet"
    column = "text" if "text" in pyarrow.parquet.read_schema(path).names else "tokens"
    rows = read_columns(path, column)[column]
    return list(dict.fromkeys(row if isinstance(row, str) else " ".join(row) for row in rows))


def read_columns(path: Path, *names: str) -> dict[str, list[Any]]:
    """Returns columns of a parquet file."""
    return pyarrow.parquet.read_table(path, columns=list(names)).to_pydict()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="release folder")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--dims", type=int, nargs="+", default=[256, 128, 64], help="Matryoshka dimensions to measure")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    views = prefix_views(load_file(args.model / "2_Dense/model.safetensors")["linear.weight"], args.dims)
    command = "python -m evaluation.embedding MODEL --data DATA"
    found: dict[str, Any] = {"command": command, "rows_per_label": PROBE_ROWS, "draws": PROBE_DRAWS, "test": {}}
    for name, figures in measure_embedding(EncoderVectors(str(args.model)), args.data, views):
        found["test"][name] = figures
        write_json(args.output, {**found, **environment_info()})
        print(name, json.dumps(figures))


if __name__ == "__main__":
    main()
