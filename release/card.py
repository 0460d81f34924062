"""Writes measured results into the card: `python -m release.card [FOLDER]` renders results/ into README.md of a release
folder, by default of this repository. (discussion.md is written by `python -m experiments.report`.)

The data table is rendered from training/sources.toml. Of the card's metadata, the data sets and the model-index are rendered; what else stands there stays. The tables between
markers are rendered whole, so running it again changes nothing.
"""

import argparse
import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from common.files import ROOT

_METADATA = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
_MARKER = "<!-- results -->"


def read(name: str, folder: Path = ROOT) -> dict[str, Any]:
    """Returns a result file by its name without ending.

    Raises:
        ValueError: There is no such file.
    """
    path = folder / "results" / f"{name}.json"
    if not path.exists():
        raise ValueError(f"{path} is missing; the documents of {folder} are rendered from it.")
    return json.loads(path.read_text("utf-8"))


def can_render(folder: Path) -> bool:
    """Returns whether a folder has what its card is rendered from: README.md with its marker, and the results."""
    paths = [folder / "results/tasks.json", folder / "results/release.json", folder / "README.md"]
    return all(path.is_file() for path in paths) and _MARKER in paths[-1].read_text("utf-8")


def data_table(path: Path = ROOT / "training/sources.toml") -> str:
    """Returns the Markdown table of the listed data sets: name and link, license, rows, and what each is used for."""
    lines = ["| data | license | rows: train / validation / test | used here |", "|---|---|---|---|"]
    for source in tomllib.loads(path.read_text("utf-8")).values():
        counts = " / ".join(
            f"{source['rows'][x]:,}" if x in source["rows"] else "–" for x in ("train", "validation", "test")
        )
        allowed = "" if source["commercial"] else " (research only)"
        lines.append(
            f"| [{source['title']}]({source['link']}) | {source['license']}{allowed} | {counts} | {source['use']} |"
        )
    return "\n".join(lines) + "\n"


def metadata(
    card: str, name: str, results: dict[str, Any], described: dict[str, Any], training: dict[str, Any] | None = None
) -> str:
    """Returns a card's YAML metadata with the data sets and the results rendered again.

    Args:
        card: The card with its present metadata, or without any.
        name: The model's name, if the card does not say it yet.
        results: The content of the result files that `described` names, by their names.
        described: That of results/tasks.json.
        training: That of results/training.json, if there is one.
    """
    found = _METADATA.match(card)
    fields = yaml.safe_load(found[1]) if found else {}
    for index in fields.pop("model-index", []):
        name = index["name"]
    evaluations = []
    for key, task in described.items():
        found = results[task.get("results", "release")]["tasks"][key]
        for metric in task["metrics"]:
            evaluation = EvalResult(
                task_type=task["task_type"],
                task_name=task["title"],
                dataset_type=task["dataset"],
                dataset_name=task["dataset_name"],
                dataset_config=task.get("config"),
                dataset_split=found["split"],
                metric_type=metric["type"],
                metric_name=metric["name"],
                metric_value=round(found["metrics"][metric["key"]], 4),
            )
            evaluations.append(evaluation)
    # A data set without an owner is a local one: the Hub could not link to it.
    fields["datasets"] = sorted({task["dataset"] for task in described.values() if "/" in task["dataset"]})
    if training:
        fields["co2_eq_emissions"] = emissions(training)
    return f"---\n{ModelCardData(**fields, model_name=name, eval_results=evaluations).to_yaml()}\n---\n"


def table(results: dict[str, Any], described: dict[str, Any]) -> str:
    """Returns the Markdown table of test results, of lower-cased texts where measured, and of published figures.

    Args:
        results: Result files by name; "<name>_lower" holds the same measured in lower case.
        described: The content of results/tasks.json.
    """
    lines = [
        "| task | test set | metric | this model | lower-cased | published, for comparison |",
        "|---|---|---|---|---|---|",
    ]
    for key, task in described.items():
        name = task.get("results", "release")
        found, lower = results[name]["tasks"][key], results.get(f"{name}_lower", {}).get("tasks", {}).get(key)
        split = "" if found["split"] == "test" else f", {found['split']} split"
        for metric in task["metrics"]:
            others = "; ".join(f"{x['model']} {x['value']:.3f}" for x in metric.get("published", []))
            value = f"**{found['metrics'][metric['key']]:.3f}**"
            rewritten = f"{lower['metrics'][metric['key']]:.3f}" if lower else ""
            rows = f"{task['dataset_name']} ({found['rows']:,}{split})"
            lines.append(f"| {task['title']} | {rows} | {metric['name']} | {value} | {rewritten} | {others} |")
    return "\n".join(lines) + "\n"


PROJECTION_ROWS = {
    ("wnut17", "overlap@10"): "nearest-neighbour overlap@10, WNUT-17",
    ("stsb", "spearman"): "STS-B, Spearman",
    ("sts_unseen", "spearman"): "STS12–16, pairs unseen in STS-B, Spearman",
    ("sick_r", "spearman"): "SICK-R, Spearman",
    ("scifact", "ndcg@10"): "SciFact, nDCG@10",
    ("squad_sentences", "ndcg@10"): "SQuAD sentences, nDCG@10",
    ("squad_sentences", "recall@100"): "SQuAD sentences, recall@100",
}


def projection_table(found: dict[str, Any]) -> str:
    """Returns the Markdown table of what the embedding keeps at each dimension.

    Args:
        found: The content of results/projection.json.
    """
    dims = ["384", "256", "128", "64"]
    lines = [f"| test set | {' | '.join(dims)} |", "|---|" + "---|" * len(dims)]
    for (name, metric), title in PROJECTION_ROWS.items():
        if name in found["test"]:
            values = " | ".join(f"{found['test'][name][dim][metric]:.3f}" for dim in dims)
            lines.append(f"| {title} | {values} |")
    return "\n".join(lines) + "\n"


def single_runs(folder: Path, described: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns, for each task with a results/single_<task>.json, what its single-task run reached."""
    names = [name for name in described if (folder / f"results/single_{name}.json").exists()]
    return {name: read(f"single_{name}", folder)["tasks"][name] for name in names}


def negative_transfer(together: dict[str, Any], alone: dict[str, dict[str, Any]], described: dict[str, Any]) -> str:
    """Returns the Markdown table of each task's main metric, trained alone and together with the others.

    Args:
        together: What one run on all tasks reached, as results/release.json holds it.
        alone: What `single_runs` returns.
        described: The content of results/tasks.json; a task's first metric is its main one.

    Raises:
        ValueError: A single-task run was measured on other rows.
    """
    lines = ["| task | metric | alone | together | difference |", "|---|---|---|---|---|"]
    for name, single in alone.items():
        shared, metric = together["tasks"][name], described[name]["metrics"][0]
        if (single["split"], single["sha256"]) != (shared["split"], shared["sha256"]):
            raise ValueError(
                f"results/single_{name}.json was measured on {single['rows']} rows ({single['split']}) and "
                f"the run on all tasks on {shared['rows']} others ({shared['split']}); measure both on the same."
            )
        # In points: a difference of 0.012 would read like one more measured value.
        points = 100 * (shared["metrics"][metric["key"]] - single["metrics"][metric["key"]])
        difference = f"{round(points, 1) + 0.0:+.1f} points".replace("-", "−")  # + 0.0: never minus zero
        values = " | ".join(_with_interval(x, metric["key"]) for x in (single, shared))
        lines.append(f"| {described[name]['title']} | {metric['name']} | {values} | {difference} |")
    return "\n".join(lines) + "\n"


def speed_table(found: dict[str, Any]) -> str:
    """Returns the Markdown table of how long one way of working takes beside another.

    Args:
        found: The content of results/benchmarks.json.
    """
    lines = [
        f"| {found['texts']:,} texts, {found['tokens']:,} tokens | ratio | interquartile range |",
        "|---|---|---|",
    ]
    for row in found["ratios"]:
        low, high = row["quartiles"]
        lines.append(f"| {row['ratio']} | **{row['median']:.2f}** | {low:.2f} to {high:.2f} |")
    return "\n".join(lines) + "\n"


def backend_table(found: dict[str, Any]) -> str:
    """Returns the Markdown table of what each task reaches on each backend.

    Args:
        found: The content of results/onnx.json.
    """
    lines = ["| task, validation split | torch | ONNX | ONNX, int8 | int8 gives |", "|---|---|---|---|---|"]
    for name, task in found["tasks"].items():
        values = " | ".join(f"{task[backend]:.3f}" for backend in ("torch", "onnx", "onnx-int8"))
        points = f"{round(task['points']['onnx-int8'], 1) + 0.0:+.1f} points".replace("-", "−")  # + 0.0: never minus zero
        lines.append(f"| {name}, {task['metric']} ({task['rows']:,}) | {values} | {points} |")
    return "\n".join(lines) + "\n"


def emissions(training: dict[str, Any]) -> dict[str, Any]:
    """Returns the Hub's metadata on what the training emitted, in grams: time × power × the grid's intensity."""
    hours, kilowatts = training["seconds"] / 3600, training["watts"] / 1000
    return {
        "emissions": round(hours * kilowatts * training["grams_per_kwh"]),
        "source": f"estimated from the run's time, {training['watts_source']} and {training['grams_source']}",
        "training_type": "fine-tuning",
        "hardware_used": training["hardware_used"],
    }


def training_text(training: dict[str, Any]) -> str:
    """Returns the Markdown sentences on what the training took.

    Args:
        training: The content of results/training.json: `seconds`, `steps`, `hardware_used`, and the two assumptions, `watts`
            with `watts_source` and `grams_per_kwh` with `grams_source`.
    """
    hours = training["seconds"] / 3600
    time = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"
    return (
        f"{training['steps']:,} steps took {time} on {training['hardware_used']}. That is about "
        f"{hours * training['watts']:,.0f} Wh at {training['watts']} W ({training['watts_source']}), and "
        f"{emissions(training)['emissions']:,} g of CO₂ at {training['grams_per_kwh']} g/kWh ({training['grams_source']}).\n"
    )


def _with_interval(found: dict[str, Any], key: str) -> str:
    """Returns a metric's value, and its 95 % interval if there is one."""
    value = f"{found['metrics'][key]:.3f}"
    if key not in found.get("intervals", {}):
        return value
    low, high = found["intervals"][key]
    return f"{value} ({low:.3f} to {high:.3f})"


def fill(text: str, marker: str, content: str) -> str:
    """Returns `text` with what stands between the comments `<!-- marker -->` and `<!-- /marker -->` replaced."""
    pattern = re.compile(rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)", re.DOTALL)
    filled, count = pattern.subn(lambda match: match[1] + content + match[2], text)
    if count != 1:
        raise ValueError(f"the document must hold <!-- {marker} --> and <!-- /{marker} --> once; it does {count} times.")
    return filled


def render_card(card: str, folder: Path = ROOT) -> str:
    """Returns a folder's README.md with its metadata and tables rendered again."""
    described = read("tasks", folder)
    names = {task.get("results", "release") for task in described.values()}
    lower = {f"{name}_lower" for name in names if (folder / f"results/{name}_lower.json").exists()}
    results = {name: read(name, folder) for name in sorted(names | lower)}
    text = fill(_METADATA.sub("", card), "results", table(results, described))
    if alone := single_runs(folder, described):
        text = fill(text, "negative-transfer", negative_transfer(read("release", folder), alone, described))
    tables = {"benchmarks": speed_table, "onnx": backend_table, "projection": projection_table, "training": training_text}
    for name, render in tables.items():
        if (folder / f"results/{name}.json").exists():
            text = fill(text, name, render(read(name, folder)))
    if "<!-- data -->" in text:
        text = fill(text, "data", data_table())
    training = read("training", folder) if (folder / "results/training.json").exists() else None
    return metadata(card, folder.resolve().name, results, described, training) + text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT)
    folder = parser.parse_args().folder
    path = folder / "README.md"
    if not path.exists():
        print(f"{path} does not exist, and is not made")
        return
    try:
        path.write_text(render_card(path.read_text("utf-8"), folder), "utf-8")
    except ValueError as error:
        sys.exit(f"{path}: {error}")
    print(f"{path} holds the numbers of results/")


if __name__ == "__main__":
    main()
