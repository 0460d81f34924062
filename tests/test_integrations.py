"""docs/integrations.md: each snippet runs and gives this model's vectors; what is not installed is skipped."""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from transformers import pipeline

from tests.conftest import ROOT, TEXTS

pytestmark = pytest.mark.integrations
PAGE = (ROOT / "docs/integrations.md").read_text("utf-8")
SECTIONS = {part.split("\n")[0]: part for part in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]}
SNIPPETS = {
    name: re.findall(r"```python\n(.*?)```", part, re.DOTALL) for name, part in SECTIONS.items() if name != "Servers"
}


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    """This model's vectors of `TEXTS`, float [N, 256]."""
    return SentenceTransformer(str(ROOT), device="cpu").encode(TEXTS)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Returns a function that runs a library's snippet in the repository's root and gives what it has defined."""
    monkeypatch.chdir(ROOT)

    def run_snippet(name: str) -> dict[str, Any]:
        (snippet,) = SNIPPETS[name]
        pytest.importorskip(re.search(r"(?:from|import) ([a-z_]+)", snippet)[1])
        defined: dict[str, Any] = {"texts": list(TEXTS), "__name__": "snippet"}
        exec(compile(snippet, name, "exec"), defined)
        return defined

    yield run_snippet


@pytest.mark.parametrize("name", [name for name in SNIPPETS if name != "fastembed"])
def test_a_library_gives_our_vectors(run, expected, name):
    defined = run(name)
    np.testing.assert_allclose(np.array(defined["vectors"]), expected, atol=1e-5)
    if name == "spaCy":  # which registers a component once
        records = pipeline("multitask", model=str(ROOT), trust_remote_code=True, device="cpu")(TEXTS)
        for doc, record in zip(defined["docs"], records, strict=True):
            entities = [(entity["word"], entity["entity_group"]) for entity in record["entities"]["ner"]]
            assert [(entity.text, entity.label_) for entity in doc.ents] == entities
            assert doc._.sentiment == record["labels"]["sentiment"]["label"]
