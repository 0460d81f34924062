"""Writes measured results into the documents: `python -m release.card [FOLDER]`, by default of this repository.

README.md, discussion.md and docs/*.md show what results/ holds: single figures in placeholders (see `release.figures`), tables
between `<!-- NAME -->` and `<!-- /NAME -->` (`release.tables.RENDERERS`), and the output of the command between `example`
markers. Of the card's metadata, data sets, model-index and emissions are rendered. Everything else stays, and rendering again
changes nothing. The tables of experiments in discussion.md are written by `python -m experiments.report`.
"""

import argparse
import re
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from common.files import ROOT
from release.figures import MISSING, render_figures
from release.tables import RENDERERS, emissions, measured_tasks, read_some

_MARKER = "<!-- results -->"
_EXAMPLE = re.compile(r"(<!-- example -->\n```console\n\$ (.*?)\n).*?(```\n<!-- /example -->)", re.DOTALL)


def can_render(folder: Path) -> bool:
    """Returns whether a folder has what its card is rendered from: README.md with its marker, and the results."""
    paths = [folder / "results/tasks.json", folder / "results/release.json", folder / "README.md"]
    return all(path.is_file() for path in paths) and _MARKER in paths[-1].read_text("utf-8")


def _evaluation(task: dict[str, Any], metric: dict[str, Any], found: dict[str, Any]) -> EvalResult:
    return EvalResult(
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


def fill(text: str, marker: str, content: str) -> str:
    """Returns `text` with what stands between the comments `<!-- marker -->` and `<!-- /marker -->` replaced.

    Raises:
        ValueError: The document does not hold the two once.
    """
    pattern = re.compile(rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)", re.DOTALL)
    filled, count = pattern.subn(lambda match: match[1] + content + match[2], text)
    if count != 1:
        raise ValueError(f"the document must hold <!-- {marker} --> and <!-- /{marker} --> once; it does {count} times.")
    return filled


def render(text: str, folder: Path = ROOT) -> str:
    """Returns a document with its figures and tables rendered again; what has not been measured says so."""
    for marker, renderer in RENDERERS.items():
        if f"<!-- {marker} -->" in text:
            table = ""
            with suppress(FileNotFoundError):
                table = renderer(folder)
            text = fill(text, marker, table or f"*{MISSING.capitalize()}.*\n")
    return render_figures(text, folder)


def render_card(text: str, folder: Path = ROOT) -> str:
    """Returns a folder's README.md with its figures and tables and, in the metadata, data sets, results and emissions again.

    Raises:
        FileNotFoundError: A result file of the tasks is missing.
        ValueError: A marker is missing, or a placeholder names what results/ does not hold.
    """
    card, tasks = ModelCard(fill(text, "results", "")), measured_tasks(folder)
    card.data.model_name = card.data.model_name or folder.resolve().name
    card.data.eval_results = [_evaluation(task, metric, found) for _, task, found in tasks for metric in task["metrics"]]
    # A data set without an owner is a local one: the Hub could not link to it.
    card.data.datasets = sorted({task["dataset"] for _, task, _ in tasks if "/" in task["dataset"]})
    if training := read_some("training", folder):
        card.data["co2_eq_emissions"] = emissions(training)
    card.text = render(card.text, folder)
    return str(card)


def run_examples(text: str, folder: Path = ROOT) -> str:
    """Returns a document with the output of the commands between its `example` markers, run in the folder."""

    def run(found: re.Match[str]) -> str:
        command = [sys.executable, *shlex.split(found[2])[1:]]
        return found[1] + subprocess.check_output(command, cwd=folder, text=True) + found[3]

    return _EXAMPLE.sub(run, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT)
    folder = parser.parse_args().folder
    card = folder / "README.md"
    if not card.exists():
        print(f"{card} does not exist; nothing to render")
        return
    documents = [folder / "discussion.md", *sorted((folder / "docs").glob("*.md"))]
    for path in (card, *(path for path in documents if path.is_file())):
        text = path.read_text("utf-8")
        try:
            rendered = render_card(text, folder) if path == card else render(text, folder)
        except (FileNotFoundError, ValueError) as error:
            sys.exit(f"{path}: {error}")
        partial = path.with_suffix(".partial")  # the document is written whole or not at all
        partial.write_text(run_examples(rendered, folder), "utf-8")
        partial.replace(path)
    print(f"README.md, discussion.md and docs/ of {folder} show what results/ holds")


if __name__ == "__main__":
    main()
