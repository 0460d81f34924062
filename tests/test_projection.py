"""The projection of a frozen encoder's vectors: its fit on small made-up vectors, and what is measured of it."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from evaluation import embedding
from evaluation.metrics import neighbours_shared
from training import projection
from training.projection import FitSettings, fit_projection, principal_axes

WIDTH = 24
SETTINGS = FitSettings(dims=(12, 8, 4), steps=60, learning_rate=1e-2, temperature=0.1, batch_size=200)


def made_up_vectors(seed, count=1500):
    """Unit vectors that are not centred, and whose axes matter less and less, as an encoder's do."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(1, 0.1, WIDTH) ** 2
    mixing = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(99)))[0]
    return F.normalize((torch.randn(count, WIDTH, generator=generator) * spread + 0.2) @ mixing, dim=1)


def kept(vectors, matrix, dim):
    return neighbours_shared(vectors.numpy(), (vectors @ matrix[:dim].T).numpy(), 10).mean()


@pytest.fixture(scope="module")
def fitted():
    return fit_projection(made_up_vectors(0), SETTINGS)


def test_every_prefix_keeps_at_least_the_neighbours_that_principal_axes_keep(fitted):
    unseen, axes = made_up_vectors(1, 600), principal_axes(made_up_vectors(0), 12)
    assert fitted.shape == (12, WIDTH) and fitted.dtype == torch.float32
    for dim in (8, 4):
        assert kept(unseen, fitted, dim) > kept(unseen, axes, dim), dim


def test_all_dimensions_give_the_similarities_of_the_principal_components(fitted):
    unseen, axes = made_up_vectors(1, 600), principal_axes(made_up_vectors(0), 12)
    torch.testing.assert_close(fitted @ fitted.T, torch.eye(12), rtol=0, atol=1e-5)
    after, before = unseen @ fitted.T, unseen @ axes.T
    torch.testing.assert_close(after @ after.T, before @ before.T, rtol=0, atol=1e-5)


def test_principal_axes_are_orthonormal_and_fall_in_variance():
    vectors = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([9.0, 5, 3, 1, 1, 1])
    axes = principal_axes(vectors, 3)
    torch.testing.assert_close(axes @ axes.T, torch.eye(3), atol=1e-5, rtol=0)
    assert axes[0].abs().argmax() == 0 and axes[1].abs().argmax() == 1


def test_the_same_seed_gives_the_same_matrix_and_lengths_do_not_matter(fitted):
    assert torch.equal(fitted, fit_projection(made_up_vectors(0), SETTINGS))
    assert not torch.equal(fitted, fit_projection(made_up_vectors(0), SETTINGS, seed=1))
    longer = made_up_vectors(0) * torch.linspace(1, 9, 1500)[:, None]
    assert kept(longer, fit_projection(longer, SETTINGS), 4) == pytest.approx(kept(longer, fitted, 4), abs=0.01)


def test_few_texts_give_an_orthonormal_matrix_too():
    matrix = fit_projection(made_up_vectors(0, 12), SETTINGS)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(12), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("count", "dims", "message"),
    [
        (7, (8, 4), "7 texts are too few to fit 8 dimensions"),
        (100, (25, 4), "dims starts with 25; the encoder's vectors have 24 dimensions"),
    ],
)
def test_what_cannot_be_fitted_says_why(count, dims, message):
    with pytest.raises(ValueError, match=message):
        fit_projection(made_up_vectors(0, count), dataclasses.replace(SETTINGS, dims=dims))


# Measures


def write_set(folder, **files):
    folder.mkdir(parents=True)
    for name, columns in files.items():
        pyarrow.parquet.write_table(pa.table(columns), folder / f"{name}.parquet")


def test_retrieval_by_hand(tmp_path):
    vectors = {"a": [1.0, 0], "b": [0.9, 0.1], "c": [0, 1], "d": [-1, 0], "east": [2.0, 0], "north": [0.1, 3.0]}
    qrels = {"query_id": ["east", "north", "north"], "doc_id": ["b", "c", "d"], "score": [1, 2, 1]}
    texts = {"corpus": [*"abcd"], "queries": ["east", "north"]}
    write_set(tmp_path / "set", qrels=qrels, **{name: {"id": ids, "text": ids} for name, ids in texts.items()})
    measure = embedding.retrieval_measure(lambda texts: np.array([vectors[x] for x in texts]), tmp_path / "set")
    first, last, best = 1 / np.log2(3), 1 / np.log2(5), 2 + 1 / np.log2(3)  # the ranks: a b c d, and c b a d
    assert measure(lambda x: x) == {"ndcg@10": pytest.approx((first + (2 + last) / best) / 2), "recall@100": 1.0}


@pytest.fixture
def data(tmp_path):
    """Tiny data sets in the layout of the real ones."""
    words = [f"word{i}" for i in range(40)]
    texts = [f"{a} {b}" for a in words for b in words[:2]]
    tokens = {"tokens": [text.split() for text in texts]}
    for name in {*projection.FIT_SETS, *projection.VALIDATION_SETS} - set(embedding.PROBE_SETS):
        write_set(tmp_path / name, train={"text": texts}, validation={"text": [*texts, texts[0]]}, test=tokens)
    pairs = {"sentence1": texts[:20], "sentence2": texts[20:40], "score": np.linspace(0, 1, 20).tolist()}
    for name in embedding.PAIR_SETS:
        write_set(tmp_path / name, validation=pairs, test=pairs)
    labelled = {"text": texts, "label": [i % 2 for i in range(80)]}
    for name in embedding.PROBE_SETS:
        write_set(tmp_path / name, train=labelled, validation=labelled, test=labelled)
    for name in embedding.RETRIEVAL_SETS:
        corpus = {"id": [f"d{i}" for i in range(80)], "text": texts}
        qrels = {"query_id": ["q0", "q1"], "doc_id": ["d0", "d3"], "score": [1, 1]}
        write_set(tmp_path / name, corpus=corpus, queries={"id": ["q0", "q1"], "text": [texts[0], texts[3]]}, qrels=qrels)
    return tmp_path


@pytest.fixture(scope="module")
def encoder(release):
    """The tiny release; its own projection must not be used."""
    return str(release)


def test_the_encoders_own_vectors_come_in_the_order_of_the_texts(encoder):
    texts = ["paris", "tim cook", "", "paris"]
    encode = embedding.EncoderVectors(encoder)
    model = SentenceTransformer(encoder, device="cpu")
    expected = SentenceTransformer(modules=list(model)[:2], device="cpu").encode(texts, normalize_embeddings=True)
    np.testing.assert_allclose(encode(texts), expected, atol=1e-6)


def test_the_full_vector_and_every_prefix_are_measured(encoder, data):
    encode = embedding.EncoderVectors(encoder)
    width = encode(["any"]).shape[1]
    views = embedding.prefix_views(np.eye(width, dtype=np.float32), [width, 4])
    found = dict(embedding.measure_embedding(encode, data, views))
    assert set(found) == {"wnut17", "stsb", "sts_unseen", "sick_r", "scifact", "squad_sentences", "clinc150", "hwu64"}
    assert found["wnut17"][str(width)] == {"overlap@10": 1.0}
    assert found["wnut17"]["4"]["overlap@10"] < 1
    assert found["scifact"][str(width)] == {"ndcg@10": 1.0, "recall@100": 1.0}
    assert found["clinc150"][str(width)]["accuracy"] > 0.9, "the second word is the label"


def test_tokens_are_joined_and_copies_dropped(data):
    assert embedding.distinct_texts(data / "wnut17", "test")[0] == "word0 word0"
    assert len(embedding.distinct_texts(data / "wnut17", "validation")) == 80


def test_the_command_writes_matrix_and_figures(encoder, data, tmp_path, monkeypatch):
    monkeypatch.setattr(projection, "SETTINGS", SETTINGS)
    output, results = tmp_path / "out/projection.safetensors", tmp_path / "out/projection.json"
    arguments = ["--encoder", encoder, "--data", str(data), "--output", str(output), "--results", str(results)]
    monkeypatch.setattr("sys.argv", ["projection", *arguments])
    projection.main()
    assert load_file(output)["linear.weight"].shape[0] == 12
    written = json.loads(results.read_text())
    assert set(written["validation"]) == {"principal components", "fitted"}
    full, *_ = written["validation"]["fitted"].values()
    assert full["wnut17"] == 1.0


def test_missing_data_sets_are_all_named_before_anything_is_encoded(data):
    for name in ("tweet_emotion", "hwu64"):
        (data / name).rename(data / f"{name}-elsewhere")
    with pytest.raises(FileNotFoundError, match="lacks the data sets hwu64, tweet_emotion; give --data"):
        projection.check_data(data)
