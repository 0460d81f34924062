"""Writes what the shipped model says of ten sentences: `python -m tests.golden`, after a release of new weights."""

import json
from pathlib import Path
from typing import Any

from transformers import pipeline

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).with_name("golden.json")
SENTENCES = [
    "Tim Cook opened Apple's new store in Paris. I love it!",
    "The United Nations said on Monday that aid had reached Kabul.",
    "worst. flight. ever. @united lost my bag again and nobody cares",
    "Angela Merkel met Emmanuel Macron in Berlin to talk about the European Union.",
    "I'm so happy for you, congratulations!",
    "It will get better, keep going, tomorrow is another day.",
    "Still crying about Robin Williams.",
    "England beat Australia by nine wickets at Lord's.",
    "The cat sat on the mat.",
    "",
]


def answers() -> list[dict[str, Any]]:
    """Returns one record per sentence, its embedding cut to the first eight numbers, all rounded."""
    pipe = pipeline("multitask", model=str(ROOT), trust_remote_code=True, device="cpu")
    found = []
    for text, record in zip(SENTENCES, pipe(SENTENCES), strict=True):
        found.append(
            {
                "text": text,
                "sentence_embedding": [round(float(x), 5) for x in record["sentence_embedding"][:8]],
                "labels": {name: _rounded(answer["scores"]) for name, answer in record["labels"].items()},
                "entities": {
                    name: [
                        [x["entity_group"], x["word"], x["start"], x["end"], round(x["score"], 4)] for x in found_entities
                    ]
                    for name, found_entities in record["entities"].items()
                },
            }
        )
    return found


def _rounded(scores: dict[str, float]) -> dict[str, float]:
    return {label: round(score, 4) for label, score in scores.items()}


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(answers(), indent=1, ensure_ascii=False) + "\n", "utf-8")
