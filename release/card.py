"""Writes measured results into the documents: `python -m release.card` renders results/ into README.md and discussion.md.

The card's metadata and the tables between markers are rendered whole, so running it again changes nothing.
"""

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

ROOT = Path(__file__).resolve().parent.parent
NAME = "multitask-minilm"
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
            others = [f"{x['model']} {x['value']:.3f}" for x in metric.get("published", [])]
            if measured := metric.get("measured"):
                others.insert(0, f"{measured['model']} {found['metrics'][measured['key']]:.3f}")
            value = f"**{found['metrics'][metric['key']]:.3f}**"
            rows = f"{task['dataset_name']} ({found['rows']:,})"
            lines.append(f"| {task['title']} | {rows} | {metric['name']} | {value} | {'; '.join(others)} |")
    return "\n".join(lines) + "\n"


def comparison(runs: dict[str, dict[str, Any]], described: dict[str, Any]) -> str:
    """Returns a Markdown table of the same measures for several runs, given by their column titles."""
    measures = [
        (f"{task['dataset_name']}, {metric['name']}", name, metric["key"])
        for name, task in described.items()
        for metric in task["metrics"]
    ]
    measures += [
        ("STS-B, Spearman, starting encoder's own 384", "similarity", "spearman_reference"),
        ("mean cosine to the starting encoder", "similarity", "cosine_raw"),
        ("neighbours kept at 10", "similarity", "neighbours_at_10"),
    ]
    lines = ["| measure | " + " | ".join(runs) + " |", "|---" * (len(runs) + 1) + "|"]
    for title, name, key in measures:
        values = [run["tasks"][name]["metrics"][key] for run in runs.values()]
        lines.append(f"| {title} | " + " | ".join(f"{x:.3f}" for x in values) + " |")
    return "\n".join(lines) + "\n"


def fill(text: str, marker: str, content: str) -> str:
    """Returns `text` with what stands between the comments `<!-- marker -->` and `<!-- /marker -->` replaced."""
    pattern = re.compile(rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)", re.DOTALL)
    filled, count = pattern.subn(lambda match: match[1] + content + match[2], text)
    if count != 1:
        raise ValueError(f"the document must hold <!-- {marker} --> and <!-- /{marker} --> once; it does {count} times.")
    return filled


def render_card(card: str) -> str:
    """Returns README.md with its metadata and results table made anew."""
    results, described = read("release"), read("tasks")
    return metadata(results, described) + fill(_METADATA.sub("", card), "results", table(results, described))


def render_discussion(text: str) -> str:
    """Returns discussion.md with its tables made anew."""
    runs = {
        "heads at 2e-4": read("slow_heads_validation"),
        "heads at 2e-3": read("release_validation"),
    }
    return fill(text, "comparison", comparison(runs, read("tasks")))


def main() -> None:
    for name, render in (("README.md", render_card), ("discussion.md", render_discussion)):
        path = ROOT / name
        path.write_text(render(path.read_text("utf-8")), "utf-8")
        print(f"{name} holds the numbers of results/")


if __name__ == "__main__":
    main()
