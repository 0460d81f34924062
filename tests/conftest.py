"""Tiny real models and tokenizers, made in memory, and a release folder of one of them."""

import os
import shutil

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing in this suite may reach out

from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from configuration_multitask import MultiTaskConfig
from modeling_multitask import MultiTaskModel
from release.export import export

ROOT = Path(__file__).resolve().parent.parent
ENCODERS = ("bert", "roberta", "distilbert", "modernbert", "xlm-roberta")
WINDOW = 32  # tokens that the tiny models take, special tokens included
TEXTS = [
    "Tim Cook opened Apple's new store in Paris. I love it!",
    "so sad",
    "",
    "The U.S. embassy, in Rome, was closed; nobody said why, and it rained all day long in Italy.",
]
LONGEST = ("test_training", "test_onnx", "test_loading", "test_bulk_run", "test_bulk_ray_engine", "test_environments")
TASKS: dict[str, dict[str, Any]] = {
    "sentiment": {"kind": "sequence_classification", "labels": ["negative", "neutral", "positive"]},
    "topics": {
        "kind": "sequence_classification",
        "labels": ["sport", "politics"],
        "problem_type": "multi_label_classification",
        "hidden_dim": 16,
        "thresholds": [0.5, 0.4],
    },
    "rating": {"kind": "sequence_classification", "labels": ["stars"], "problem_type": "regression"},
    "ner": {
        "kind": "token_classification",
        "labels": ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"],
        "temperature": 0.5,
    },
    "pos": {"kind": "token_classification", "labels": ["NOUN", "VERB", "OTHER"]},
}

logging.disable_progress_bar()
settings.register_profile("shared machines are slow at times", deadline=None)
settings.load_profile("shared machines are slow at times")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files that take longest first, so that two processes with a file each end at about the same time."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


def tiny_config(model_type: str = "bert", **fields: Any) -> MultiTaskConfig:
    """Returns the configuration of a model with two layers of width 32."""
    defaults = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 320,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
        "max_position_embeddings": WINDOW
        + (1 if "roberta" in str(model_type) else 0),  # RoBERTa counts from padding_idx + 1
        "embedding_dim": 8,
        "tasks": TASKS,
    }
    return MultiTaskConfig(model_type=model_type, **{**defaults, **fields})


def tiny_model(model_type: str = "bert", seed: int = 0, **fields: Any) -> MultiTaskModel:
    """Returns a model in evaluation mode with random weights, large enough that heads disagree on texts."""
    torch.manual_seed(seed)
    model = MultiTaskModel(tiny_config(model_type, initializer_range=0.5, **fields)).eval()
    return model


def tiny_tokenizer(family: str = "wordpiece") -> PreTrainedTokenizerFast:
    """Returns a tokenizer of single characters (or bytes) of one of three families, ids below 320."""
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    characters = [chr(code) for code in range(33, 127)]
    if family == "wordpiece":  # BERT, DistilBERT
        words = ["paris", "apple", "tim", "cook", "love", "store"]
        vocabulary = [*special, *characters, *("##" + x for x in characters), *words]
        tokenizer = Tokenizer(models.WordPiece({x: i for i, x in enumerate(vocabulary)}, unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
    elif family == "bytes":  # RoBERTa, ModernBERT
        vocabulary = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
        tokenizer = Tokenizer(models.BPE({x: i for i, x in enumerate(vocabulary)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:  # XLM-R: pieces of whitespace-separated words
        vocabulary = [*special, "▁", "▁Paris", "is.", *characters]
        tokenizer = Tokenizer(models.Unigram([(x, -1.0) for x in vocabulary], unk_id=3))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=WINDOW, **names)


def write_checkpoint(folder: Path, model_type: str = "bert", **fields: Any) -> tuple[Path, Path]:
    """Writes a tiny model with its tokenizer, and its encoder alone, to new folders under `folder`; returns both."""
    families = {"bert": "wordpiece", "distilbert": "wordpiece", "xlm-roberta": "unigram"}
    checkpoint, encoder = folder / "checkpoint", folder / "encoder"
    model = tiny_model(model_type, **fields)
    model.save_pretrained(checkpoint)
    model.encoder.save_pretrained(encoder)
    for place in (checkpoint, encoder):
        tiny_tokenizer(families.get(model_type, "bytes")).save_pretrained(place)
    return checkpoint, encoder


def write_release(folder: Path, model_type: str = "bert", num_task_layers: int = 1, **fields: Any) -> Path:
    """Writes a release of a tiny model, by default with a task branch, to a new folder under `folder` and returns it."""
    checkpoint, encoder = write_checkpoint(folder, model_type, num_task_layers=num_task_layers, **fields)
    export(checkpoint, folder / "release", encoder if num_task_layers else None, dtype=torch.float32)
    return folder / "release"


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release folder of a tiny BERT with a task branch and a head of every kind."""
    return write_release(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def exported_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release folder like `release` with its ONNX files, which processes of one test run share: an export takes long."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from release import onnx as release_onnx

    shared = (
        tmp_path_factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else tmp_path_factory.mktemp("onnx")
    )
    folder = shared / "exported"
    with FileLock(shared / "exported.lock"):
        if not folder.exists():
            whole = write_release(tmp_path_factory.mktemp("exported"))
            release_onnx.export(whole, whole)
            shutil.copytree(whole, folder)
    return folder


@pytest.fixture(scope="session")
def pipe(release: Path) -> Any:
    """The multitask pipeline over the tiny release, on the CPU."""
    from transformers import pipeline

    return pipeline("multitask", model=str(release), trust_remote_code=True, device="cpu")
