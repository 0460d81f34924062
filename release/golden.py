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


def load(repo: str = str(ROOT), **options: Any) -> Any:
    """Returns the multitask pipeline of a folder or of a repository on the Hub."""
    return pipeline("multitask", model=repo, trust_remote_code=True, device="cpu", **options)


def answers(pipe: Any) -> list[dict[str, Any]]:
    """Returns one record per sentence, its embedding cut to the first eight dimensions, all rounded."""
    found = []
    for text, record in zip(SENTENCES, pipe(SENTENCES), strict=True):
        scores = {name: answer.get("scores") or answer["values"] for name, answer in record["labels"].items()}
        entities = {
            name: [[x["entity_group"], x["word"], x["start"], x["end"], round(x["score"], 4)] for x in spans]
            for name, spans in record["entities"].items()
        }
        vector = [round(float(x), 5) for x in record["sentence_embedding"][:8]]
        labels = {name: {label: round(score, 4) for label, score in x.items()} for name, x in scores.items()}
        found.append({"text": text, "sentence_embedding": vector, "labels": labels, "entities": entities})
    return found


def differences(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> list[str]:
    """Returns one line for each answer that is not as expected; tasks that nothing is expected of may have been added."""
    if [x["text"] for x in found] != [x["text"] for x in expected]:
        return ["the sentences are others"]
    lines = []
    for records in zip(found, expected, strict=True):
        now, then = ({"sentence_embedding": x["sentence_embedding"], **x["labels"], **x["entities"]} for x in records)
        lines += [
            f"{name} of {records[1]['text']!r} is {now.get(name)}, should be {wanted}"
            for name, wanted in then.items()
            if not _close(now.get(name), wanted, EMBEDDING_TOLERANCE if name == "sentence_embedding" else SCORE_TOLERANCE)
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
    lines = differences(answers(load(repo, revision=revision)), json.loads(Path(golden).read_text("utf-8")))
    print("\n".join(lines))
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()
