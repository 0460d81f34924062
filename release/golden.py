"""What a model says of ten sentences: `python -m release.golden`, after a release of new weights, writes golden.json.

`python golden.py REPO GOLDEN.json REVISION` prints in what a model on the Hub differs from such a file, and fails if it does.
"""

import json
import sys
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
EMBEDDING_TOLERANCE, SCORE_TOLERANCE = 2e-4, 2e-3


def load(repo: str = str(ROOT), revision: str | None = None) -> Any:
    """Returns the multitask pipeline of a folder or of a repository on the Hub."""
    return pipeline("multitask", model=repo, revision=revision, trust_remote_code=True, device="cpu")


def answers(pipe: Any) -> list[dict[str, Any]]:
    """Returns one record per sentence, its embedding cut to the first eight dimensions, all rounded."""
    found = []
    for text, record in zip(SENTENCES, pipe(SENTENCES), strict=True):
        found.append(
            {
                "text": text,
                "sentence_embedding": [round(float(x), 5) for x in record["sentence_embedding"][:8]],
                "labels": {
                    name: {label: round(score, 4) for label, score in (answer.get("scores") or answer["values"]).items()}
                    for name, answer in record["labels"].items()
                },
                "entities": {
                    name: [
                        [x["entity_group"], x["word"], x["start"], x["end"], round(x["score"], 4)] for x in found_entities
                    ]
                    for name, found_entities in record["entities"].items()
                },
            }
        )
    return found


def differences(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> list[str]:
    """Returns one line for each answer that is not as expected; tasks that nothing is expected of may have been added."""
    if [x["text"] for x in found] != [x["text"] for x in expected]:
        return ["the sentences are others"]
    lines = []
    for now, then in zip(found, expected, strict=True):
        pairs = [("sentence_embedding", now["sentence_embedding"], then["sentence_embedding"], EMBEDDING_TOLERANCE)]
        for name, scores in then["labels"].items():
            pairs.append((name, now["labels"].get(name), scores, SCORE_TOLERANCE))
        for name, entities in then["entities"].items():
            pairs.append((name, now["entities"].get(name), entities, SCORE_TOLERANCE))
        lines += [
            f"{name} of {then['text']!r} is {got}, should be {wanted}"
            for name, got, wanted, tolerance in pairs
            if not _close(got, wanted, tolerance)
        ]
    return lines


def _close(got: Any, wanted: Any, tolerance: float) -> bool:
    """Returns whether two JSON values are the same, but for numbers with a point, which may differ a little."""
    if type(got) is not type(wanted):
        return False
    if isinstance(wanted, dict):
        return list(got) == list(wanted) and all(_close(got[key], wanted[key], tolerance) for key in wanted)
    if isinstance(wanted, list):
        return len(got) == len(wanted) and all(_close(x, y, tolerance) for x, y in zip(got, wanted, strict=True))
    return abs(got - wanted) <= tolerance if isinstance(wanted, float) else got == wanted


def main() -> None:
    if len(sys.argv) == 1:
        GOLDEN.write_text(json.dumps(answers(load()), indent=1, ensure_ascii=False) + "\n", "utf-8")
        return
    repo, golden, revision = sys.argv[1:]
    lines = differences(answers(load(repo, revision)), json.loads(Path(golden).read_text("utf-8")))
    print("\n".join(lines))
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()
