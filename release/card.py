"""Writes the measured results into the model card: `python -m release.card` renders results/ into README.md.

The metadata at the top and the table between the markers are rendered whole, so running it again changes nothing.
"""

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

ROOT = Path(__file__).resolve().parent.parent
NAME = "multitask-minilm"
_TABLE = re.compile(r"(<!-- results -->\n).*?(<!-- /results -->)", re.DOTALL)
_METADATA = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)


def read(name: str) -> dict[str, Any]:
    """Returns a result file by its name without ending."""
    return json.loads((ROOT / "results" / f"{name}.json").read_text("utf-8"))


def metadata(results: dict[str, Any], described: dict[str, Any]) -> str:
    """Returns the card's YAML metadata with the results as its model-index."""
    evaluations = [
        EvalResult(
            task_type=task["task_type"],
            task_name=task["title"],
            dataset_type=task["dataset"],
            dataset_name=task["dataset_name"],
            dataset_config=task.get("config"),
            dataset_split="test",
            metric_type=metric["type"],
            metric_name=metric["name"],
            metric_value=round(results["tasks"][name]["metrics"][metric["key"]], 4),
        )
        for name, task in described.items()
        for metric in task["metrics"]
    ]
    data = ModelCardData(
        model_name=NAME,
        language="en",
        license="apache-2.0",
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        base_model="sentence-transformers/all-MiniLM-L6-v2",
        datasets=sorted({task["dataset"] for task in described.values()}),
        tags=["feature-extraction", "text-classification", "token-classification", "multi-task", "transformers"],
        eval_results=evaluations,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def table(results: dict[str, Any], described: dict[str, Any]) -> str:
    """Returns the Markdown table of test results beside published ones."""
    lines = ["| task | test set | metric | this model | published, for comparison |", "|---|---|---|---|---|"]
    for name, task in described.items():
        found = results["tasks"][name]
        for metric in task["metrics"]:
            others = "; ".join(f"{x['model']} {x['value']:.3f}" for x in metric.get("published", []))
            value = f"**{found['metrics'][metric['key']]:.3f}**"
            rows = f"{task['dataset_name']} ({found['rows']:,})"
            lines.append(f"| {task['title']} | {rows} | {metric['name']} | {value} | {others} |")
    return "\n".join(lines) + "\n"


def render(card: str) -> str:
    """Returns the card with its metadata and results table made anew from results/."""
    results, described = read("release"), read("tasks")
    body = _TABLE.sub(lambda match: match[1] + table(results, described) + match[2], _METADATA.sub("", card))
    return metadata(results, described) + body


def main() -> None:
    path = ROOT / "README.md"
    path.write_text(render(path.read_text("utf-8")), "utf-8")
    print("README.md holds the results of results/release.json")


if __name__ == "__main__":
    main()
