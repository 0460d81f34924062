"""What other libraries make of a release: the vector of sentence-transformers, whichever way they read the files.

Tests marked `consumer` are skipped only where their library is not installed. Tests marked `environments` build virtual
environments from the package registry, once; `pytest --cache-clear` has them built anew, with what is newest then.
"""

import json
import re
import subprocess
import sys
import venv
from collections.abc import Callable, Iterable
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoModel, AutoTokenizer, pipeline

from handler import EndpointHandler
from release.export import export
from tests.conftest import ROOT, TEXTS
from tests.test_handler import alike, serve

LENT = ("torch", "numpy", "scipy", "scikit-learn")  # large, and of any version that these tests ask for
SCRIPTS = Path(__file__).with_name("consumers")
SAMPLES = [*TEXTS, "word " * 400, "ünïcode 😡 日本"]  # one beyond the length that the model reads


@pytest.fixture(scope="module")
def shipped() -> np.ndarray:
    """The vectors of `SAMPLES` from this repository, float [N, 256]."""
    return SentenceTransformer(str(ROOT), device="cpu").encode(SAMPLES)


@pytest.fixture(scope="module")
def expected(release: Path) -> np.ndarray:
    """The vectors of `SAMPLES` from the tiny release, float [N, 8]."""
    return SentenceTransformer(str(release), device="cpu").encode(SAMPLES)


def sample(name: str) -> tuple[list[str], list[str]]:
    """Returns the texts and the labels of a sample of a data set."""
    rows = [json.loads(line) for line in (ROOT / f"tests/samples/{name}.jsonl").read_text("utf-8").splitlines()]
    return [row["text"] for row in rows], [row["label"] for row in rows]


# Libraries that run in this environment


@pytest.mark.consumer
def test_langchain_embeds_documents_and_queries(shipped):
    langchain = pytest.importorskip("langchain_huggingface")
    embeddings = langchain.HuggingFaceEmbeddings(model_name=str(ROOT), model_kwargs={"device": "cpu"})
    np.testing.assert_allclose(embeddings.embed_documents(SAMPLES), shipped, atol=1e-5)
    np.testing.assert_allclose(embeddings.embed_query(SAMPLES[0]), shipped[0], atol=1e-5)


@pytest.mark.consumer
def test_txtai_gives_our_vector_when_told_and_the_encoders_own_otherwise(shipped):
    txtai = pytest.importorskip("txtai")
    told = txtai.Embeddings(path=str(ROOT), method="sentence-transformers", gpu=False)
    np.testing.assert_allclose(told.batchtransform(SAMPLES), shipped, atol=1e-5)
    told.index(SAMPLES)
    assert told.search("The embassy in Rome is closed.", 1)[0][0] == TEXTS.index(TEXTS[3])
    by_itself = txtai.Embeddings(path=str(ROOT), gpu=False)  # reads the pooling and no projection
    encoder = SentenceTransformer(modules=list(SentenceTransformer(str(ROOT), device="cpu"))[:2])
    own = encoder.encode(SAMPLES, normalize_embeddings=True)
    np.testing.assert_allclose(by_itself.batchtransform(SAMPLES), own, atol=1e-5)


@pytest.mark.consumer
def test_a_scikit_learn_pipeline_learns_from_the_vectors():
    pytest.importorskip("sklearn")
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer

    texts, labels = sample("emotion")
    embed = FunctionTransformer(SentenceTransformer(str(ROOT), device="cpu").encode)
    classifier = make_pipeline(embed, LogisticRegression(C=10)).fit(texts[:100], labels[:100])
    most_frequent = np.mean([label == "anger" for label in labels[100:]])
    assert classifier.score(texts[100:], labels[100:]) > most_frequent + 0.1


@pytest.mark.consumer
def test_setfit_trains_our_body_on_eight_texts_of_each_label(shipped, tmp_path):
    setfit = pytest.importorskip("setfit")
    from datasets import Dataset

    texts, labels = sample("sentiment")
    both = {
        name: [text for text, label in zip(texts, labels, strict=True) if label == name] for name in ("negative", "positive")
    }
    few = [{"text": text, "label": name} for name, group in both.items() for text in group[:8]]
    model = setfit.SetFitModel.from_pretrained(str(ROOT), device="cpu")
    assert type(model.model_body) is SentenceTransformer
    arguments = setfit.TrainingArguments(str(tmp_path), batch_size=4, max_steps=4, report_to="none", save_strategy="no")
    setfit.Trainer(model=model, args=arguments, train_dataset=Dataset.from_list(few)).train()
    assert np.abs(model.encode(SAMPLES) - shipped).max() > 1e-4, "the body has learned too"
    found = {name: [label == name for label in model.predict(group[8:28])] for name, group in both.items()}
    assert np.mean([*found["negative"], *found["positive"]]) > 0.6  # chance is 0.5; news, letters and reviews in one


@pytest.mark.consumer
@pytest.mark.parametrize("trusted", [False, True])
def test_the_feature_extraction_pipeline_gives_token_vectors_that_pool_to_ours(release, expected, trusted):
    extract = pipeline("feature-extraction", model=str(release), trust_remote_code=trusted, device="cpu")
    projection = load_file(release / "2_Dense/model.safetensors")["linear.weight"].numpy()
    for text, vector in zip(SAMPLES, expected, strict=True):
        hidden = np.array(extract(text, truncation=True))  # [1, T, H]
        np.testing.assert_allclose(unit(hidden.mean(axis=1) @ projection.T)[0], vector, atol=1e-5)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Returns vectors, float [N, E], of length 1."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.consumer
def test_peft_adapts_the_task_branch_and_leaves_the_encoder_to_the_bit(release, tmp_path):
    peft = pytest.importorskip("peft")
    inputs = AutoTokenizer.from_pretrained(release)(TEXTS, padding=True, truncation=True, return_tensors="pt")

    def load() -> Any:
        return AutoModel.from_pretrained(release, trust_remote_code=True)

    def outputs(model: nn.Module) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            out = model.eval()(**inputs)
        return {"embedding": out.sentence_embedding, **out.logits}

    adapted = peft.get_peft_model(load(), peft.LoraConfig(target_modules=r".*task_branch.*\.(query|value)", r=4))
    torch.testing.assert_close(outputs(adapted), outputs(load()))
    optimizer = torch.optim.SGD((x for x in adapted.parameters() if x.requires_grad), lr=1.0)
    for _ in range(2):  # the first step moves only one of the two factors of an adapter
        adapted(**inputs, labels={"sentiment": torch.tensor([2, 0, 1, 0])}).loss.backward()
        optimizer.step()
    trained = outputs(adapted)
    assert not torch.allclose(trained["ner"], outputs(load())["ner"], atol=1e-2), "all heads read the adapted branch"
    assert torch.equal(trained["embedding"], outputs(load())["embedding"])

    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(), tmp_path / "adapter")
    torch.testing.assert_close(outputs(again), trained)
    again.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(release).save_pretrained(tmp_path / "merged")
    export(tmp_path / "merged", tmp_path / "release", release, dtype=torch.float32)  # refuses another encoder
    vectors = SentenceTransformer(str(tmp_path / "release"), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(vectors, trained["embedding"], atol=1e-5)


# Servers that cannot run here: text-embeddings-inference, vLLM, Infinity


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def encode_from_files(folder: Path, texts: list[str]) -> np.ndarray:
    """Returns the vectors that a release's files describe to a server: each is read as the strictest of them reads it."""
    config = read(folder / "config.json")
    (architecture,) = config["architectures"]
    encoder_class = getattr(transformers, architecture)  # a class that they know, and no ...ForSequenceClassification
    encoder = encoder_class(encoder_class.config_class(**config)).eval()
    (weights,) = folder.glob("*.safetensors")  # some load all there are, some only model.safetensors
    assert weights.name == "model.safetensors" and not (folder / "model.safetensors.index.json").exists()
    # The starting encoder's own file holds a buffer of integers too, `position_ids`, which every server computes by itself.
    encoder.load_state_dict({name: x for name, x in load_file(weights).items() if x.is_floating_point()})
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()  # the starting encoder's file asks for 128 tokens, always
    tokenizer.enable_truncation(read(folder / "sentence_bert_config.json")["max_seq_length"])
    inputs = [torch.tensor([tokenizer.encode(text).ids]) for text in texts]
    with torch.no_grad():
        features = torch.cat([encoder(ids).last_hidden_state.mean(dim=1) for ids in inputs])  # [N, H]
    for module in read(folder / "modules.json")[2:]:
        if module["type"] == "sentence_transformers.models.Dense":
            features = features @ read_projection(folder / module["path"]).T
        else:
            assert module["type"] == "sentence_transformers.models.Normalize"
            features = nn.functional.normalize(features, dim=1)
    return features.numpy()


def read_projection(folder: Path) -> torch.Tensor:
    """Returns a Dense module's weight, float [E, H]; fails on what a server would leave out or not understand."""
    fields = read(folder / "config.json")
    assert fields["activation_function"] == "torch.nn.modules.linear.Identity" and fields["bias"] is False
    weights = load_file(folder / "model.safetensors")
    assert list(weights) == ["linear.weight"] and not (folder / "pytorch_model.bin").exists()
    assert weights["linear.weight"].shape == (fields["out_features"], fields["in_features"])
    return weights["linear.weight"].float()


@pytest.mark.consumer
@pytest.mark.parametrize("repo", ["tiny", "shipped"])
def test_a_server_that_runs_no_code_of_ours_finds_the_whole_embedding_in_the_files(repo, release, expected, shipped):
    folder, vectors = (release, expected) if repo == "tiny" else (ROOT, shipped)
    np.testing.assert_allclose(encode_from_files(folder, SAMPLES), vectors, atol=1e-5)


@pytest.mark.consumer
@pytest.mark.parametrize("repo", ["tiny", "shipped"])
def test_the_facts_that_servers_read_before_they_start(repo, release):
    folder = release if repo == "tiny" else ROOT
    config, pooling = read(folder / "config.json"), read(folder / "1_Pooling/config.json")
    assert not config["architectures"][0].endswith("Classification"), "or they serve classes and no vectors"
    for name in ("max_position_embeddings", "pad_token_id", "hidden_size", "num_hidden_layers"):
        assert type(config[name]) is int and config[name] >= 0, name
    assert read(folder / "sentence_bert_config.json")["max_seq_length"] <= config["max_position_embeddings"]
    needed = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")  # a missing one stops the start
    assert {name: pooling[f"pooling_mode_{name}"] for name in needed} == {name: name == "mean_tokens" for name in needed}
    types = [module["type"].rpartition(".") for module in read(folder / "modules.json")]
    assert [x[2] for x in types] == ["Transformer", "Pooling", "Dense", "Normalize"]
    assert {x[0] for x in types} == {"sentence_transformers.models"}, "of any other name, none of them would be read"


# Other versions, and libraries that these versions exclude


@pytest.fixture(scope="session")
def environment(request: pytest.FixtureRequest) -> Callable[..., Path]:
    """Returns a function that gives the Python of a virtual environment with a requirement, made once and kept."""

    def make(requirement: str, lent: Iterable[str] = ()) -> Path:
        folder = request.config.cache.mkdir("environments") / re.sub(r"[^\w.]+", "-", requirement)
        python, complete = folder / "bin/python", folder / "complete"
        if not complete.exists():
            venv.create(folder, clear=True, symlinks=True)
            lend(lent, next(folder.glob("lib/python*/site-packages")))
            succeed(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-compile", requirement)
            complete.touch()
        return python

    return make


def lend(packages: Iterable[str], site: Path) -> None:
    """Links installed packages into a virtual environment, to spare large downloads."""
    for installed in map(distribution, packages):
        for name in {file.parts[0] for file in installed.files or []} - {".."}:
            (site / name).symlink_to(Path(str(installed.locate_file(name))))


def succeed(*command: str | Path) -> None:
    """Runs a command, and fails with what it says if it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def encode_elsewhere(python: str | Path, script: str, repo: Path, folder: Path) -> np.ndarray:
    """Returns the vectors of `SAMPLES` that a script gives in another process."""
    (folder / "texts.json").write_text(json.dumps(SAMPLES), "utf-8")
    succeed(python, "-I", SCRIPTS / script, repo, folder / "texts.json", folder / "vectors.npy")
    return np.load(folder / "vectors.npy")


@pytest.mark.consumer
def test_onnx_runtime_and_tokenizers_are_enough(exported_release, tmp_path):
    expected = SentenceTransformer(str(exported_release), device="cpu").encode(SAMPLES)
    np.testing.assert_allclose(
        encode_elsewhere(sys.executable, "encode_onnx.py", exported_release, tmp_path), expected, atol=1e-5
    )


@pytest.mark.environments
@pytest.mark.parametrize(
    "requirement",
    [
        "sentence-transformers==3.0.1",  # the first that reads a Dense module from safetensors; 3.0.0 needs a pickle
        "sentence-transformers==5.0.0",
        "sentence-transformers>=6.2,<7",  # the newest
    ],
)
def test_other_versions_of_sentence_transformers_give_the_same_vectors(requirement, environment, shipped, tmp_path):
    python = environment(requirement, LENT)
    np.testing.assert_allclose(encode_elsewhere(python, "encode.py", ROOT, tmp_path), shipped, atol=1e-5)


@pytest.mark.environments
def test_fastembed_gives_the_same_vectors(exported_release, environment, tmp_path):
    expected = SentenceTransformer(str(exported_release), device="cpu").encode(SAMPLES)
    python = environment("fastembed==0.9.1")  # which needs another huggingface_hub than this environment's
    np.testing.assert_allclose(
        encode_elsewhere(python, "encode_fastembed.py", exported_release, tmp_path), expected, atol=1e-5
    )


@pytest.mark.environments
def test_the_handler_gives_the_same_answers_on_transformers_4(environment):
    """The containers of Inference Endpoints carry it."""
    python = environment("transformers[torch]==4.51.3", ["torch"])
    assert alike(serve(python, ROOT, {"inputs": TEXTS}), EndpointHandler(ROOT)({"inputs": TEXTS}))
