"""All outputs through sentence-transformers' `encode`, from one pass, with the modules on disk left as every server knows them.

Its stock Transformer module passes on the token vectors alone, and a module of our own in modules.json would make other
servers drop the projection. So the logits are added in memory, as the README shows.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

from tests.conftest import TASKS, TEXTS

KEYS = [f"logits.{task}" for task in TASKS]


def with_logits(repo: Path) -> SentenceTransformer:
    """Returns a sentence transformer whose records carry the logits of every head, as in the README."""
    model = SentenceTransformer(str(repo), trust_remote_code=True, device="cpu")
    multitask = model[0].auto_model

    def forward(features: dict[str, Any], **_: Any) -> dict[str, Any]:
        out = multitask(features["input_ids"], features["attention_mask"])
        logits = {f"logits.{task}": values for task, values in out.logits.items()}
        return {**features, "token_embeddings": out.last_hidden_state, **logits}

    model[0].forward = forward
    return model


@pytest.fixture(scope="module")
def model(release: Path) -> SentenceTransformer:
    return with_logits(release)


def test_each_record_carries_the_logits_that_its_text_has_alone(model, release):
    multitask = AutoModel.from_pretrained(release, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(release)
    records = model.encode(TEXTS, output_value=None, batch_size=3)  # of unlike lengths: sorted and padded inside
    for text, record in zip(TEXTS, records, strict=True):
        with torch.no_grad():
            out = multitask(**tokenizer(text, truncation=True, return_tensors="pt"))
        torch.testing.assert_close(record["sentence_embedding"], out.sentence_embedding[0], atol=1e-5, rtol=1e-5)
        kept = record["attention_mask"].bool()
        for task, logits in out.logits.items():
            found = record[f"logits.{task}"]
            found = found[kept] if TASKS[task]["kind"] == "token_classification" else found
            torch.testing.assert_close(found, logits[0], atol=1e-5, rtol=1e-5)
    assert set(KEYS) <= set(model.encode(TEXTS[0], output_value=None)), "a single text too"


def test_it_takes_one_pass_and_vectors_stay_as_they_are(model, release):
    passes = []
    hook = model[0].auto_model.encoder.embeddings.register_forward_hook(lambda *_: passes.append(1))
    records = model.encode(TEXTS, output_value=None)
    hook.remove()
    assert len(passes) == 1
    plain = SentenceTransformer(str(release), device="cpu").encode(TEXTS)
    np.testing.assert_allclose([record["sentence_embedding"] for record in records], plain, atol=1e-5)
    np.testing.assert_allclose(model.encode(TEXTS), plain, atol=1e-5)
    short = model.encode(TEXTS, truncate_dim=4, normalize_embeddings=True)
    assert short.shape == (len(TEXTS), 4)
    np.testing.assert_allclose(np.linalg.norm(short, axis=1), 1, atol=1e-5)


def test_the_stock_modules_pass_on_token_vectors_alone(release):
    """Should this fail, sentence-transformers has learned to carry more, and the README's way can be made shorter."""
    record = SentenceTransformer(str(release), trust_remote_code=True, device="cpu").encode("so sad", output_value=None)
    assert "token_embeddings" in record and not set(KEYS) & set(record)
