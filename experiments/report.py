"""Writes what was measured into discussion.md: `python -m experiments.report`.

Between its markers, discussion.md holds a table for each table of experiments/grid.toml and budget that has results. Pictures,
of the small budget, go to results/experiments/. Rendering again changes nothing.
"""

import argparse
import json
import statistics
import sys
import tomllib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from scipy.stats import false_discovery_control, ttest_rel

from common.files import ROOT
from evaluation.plots import COLOURS
from experiments.run import GRID, RESULTS
from release.card import fill

GRAY = "#888888"  # readable on white and on black
STYLE = {
    "figure.constrained_layout.use": True, "savefig.transparent": True, "axes.facecolor": "none", "axes.edgecolor": GRAY,
    "axes.labelcolor": GRAY, "xtick.color": GRAY, "ytick.color": GRAY, "axes.grid": True,
    "grid.color": GRAY, "grid.alpha": 0.25, "legend.frameon": False, "legend.labelcolor": GRAY, "legend.fontsize": 8,
}  # fmt: skip
TASKS = ("sentiment", "emotion", "ner", "similarity")
MIN_SEEDS = 3  # of both settings, for a test
RATE = 0.05  # of false discoveries among all bold cells of a budget
Result = dict[str, Any]
Found = dict[str, dict[str, list[Result]]]  # by table and setting
Cell = tuple[str, str, str]  # table, row, key of the column
# What one run gave, and half of the 95 % interval that other rows of the same kind could have given; None: unknown.
Value = tuple[float, float | None]


def _metric(task: str, key: str) -> Callable[[Result], Value | None]:
    return lambda result: _measured(result["tasks"].get(task), key)


def _measured(found: Result | None, key: str) -> Value | None:
    if not found or key not in found["metrics"]:
        return None
    low, high = found["intervals"][key]
    return found["metrics"][key], (high - low) / 2


def _cost(key: str, unit: float = 1.0) -> Callable[[Result], Value | None]:
    return lambda result: None if result.get(key) is None else (result[key] / unit, None)


@dataclass(frozen=True)
class Column:
    """A column of a table: its title, what it reads from a result, how many decimals it shows, and whether rows are compared."""

    title: str
    read: Callable[[Result], Value | None]
    decimals: int = 3
    compared: bool = True


COLUMNS = {
    "sentiment": Column("sentiment, macro recall", _metric("sentiment", "macro_recall")),
    "emotion": Column("emotion, macro F1", _metric("emotion", "macro_f1")),
    "emotion_accuracy": Column("emotion, accuracy", _metric("emotion", "accuracy")),
    "ner": Column("entity F1", _metric("ner", "f1")),
    "ner_recall": Column("entity recall", _metric("ner", "recall")),
    "similarity": Column("STS-B, Spearman", _metric("similarity", "spearman")),
    "average": Column("average", lambda result: (result["average"], None)),
    "kept": Column("overlap@10", lambda result: _measured(result["drift"], "neighbours_at_10")),
    "cosine": Column("cosine to the start", lambda result: _measured(result["drift"], "cosine_raw")),
    "seconds": Column("processor, s", _cost("processor_seconds"), 0, compared=False),
    "memory": Column("memory, MB", _cost("peak_memory_mb"), 0, compared=False),
    "trained": Column("trained, millions", _cost("trained_parameters", 1e6), 1, compared=False),
}


def load(budget: str, folder: Path = RESULTS) -> Found:
    """Returns the results of a budget by table and setting, those of a setting in the order of their seeds."""
    found: Found = defaultdict(lambda: defaultdict(list))
    results = [json.loads(path.read_text("utf-8")) for path in (folder / budget).glob("*/*.json")]
    for result in sorted(results, key=lambda result: result["seed"]):
        found[result["table"]][result["name"]].append(result)
    return found


def rows_of(table: str, grid: dict[str, Any], found: Found) -> dict[str, list[Result]]:
    """Returns the results of a table's settings in the grid's order, those that it is compared with first."""
    names = [cell["name"] for cell in grid["tables"][table]["cells"]]
    rows = {name: found[table][name] for name in names if found.get(table, {}).get(name)}
    return {**(found.get("base", {}) if grid["tables"][table].get("base") else {}), **rows} if rows else {}


def values(results: list[Result], column: Column) -> dict[int, Value]:
    """Returns a column's values by seed."""
    read_all = {result["seed"]: column.read(result) for result in results}
    return {seed: value for seed, value in read_all.items() if value is not None}


def p_value(values: dict[int, Value], reference: dict[int, Value]) -> float | None:
    """Returns the two-sided p-value that two settings are equal, by a paired t-test over the seeds that both have.

    None with fewer than three such seeds: no test is possible.
    """
    seeds = sorted(set(values) & set(reference))
    if len(seeds) < MIN_SEEDS:
        return None
    pairs = [(values[seed][0], reference[seed][0]) for seed in seeds]
    if len({a - b for a, b in pairs}) == 1:  # no variance, no test statistic
        return 1.0 if pairs[0][0] == pairs[0][1] else 0.0
    return float(ttest_rel(*zip(*pairs, strict=True)).pvalue)


def cells_of(name: str, grid: dict[str, Any], found: Found) -> dict[str, dict[str, dict[int, Value]]]:
    """Returns the values by seed of a table's cells, by row and column."""
    keys = grid["tables"][name]["columns"]
    return {row: {key: values(results, COLUMNS[key]) for key in keys} for row, results in rows_of(name, grid, found).items()}


def comparisons(grid: dict[str, Any], found: Found) -> dict[Cell, float]:
    """Returns the p-value of every cell that is compared: with the row that it is named after, or its table's first."""
    tested = {}
    for name in sorted(found.keys() - {"base"}):
        if grid["tables"][name].get("gradients"):
            continue
        rows = cells_of(name, grid, found)
        against = {cell["name"]: cell["against"] for cell in grid["tables"][name]["cells"] if "against" in cell}
        for row, key in product(rows, [key for key in grid["tables"][name]["columns"] if COLUMNS[key].compared]):
            other = against.get(row, next((x for x in rows if rows[x][key]), row))
            p = None if other == row else p_value(rows[row][key], rows.get(other, {}).get(key, {}))
            if p is not None:
                tested[name, row, key] = p
    return tested


def significant(grid: dict[str, Any], found: Found) -> set[Cell]:
    """Returns the cells of all tables that differ at a false discovery rate of `RATE` (Benjamini and Hochberg 1995)."""
    tested = comparisons(grid, found)
    if not tested:
        return set()
    adjusted = false_discovery_control(list(tested.values()), method="bh")
    return {cell for cell, p in zip(tested, adjusted, strict=True) if p <= RATE}


def table(name: str, grid: dict[str, Any], found: Found, budget: str, bold: set[Cell]) -> str:
    """Returns a table of the grid in Markdown, with the budget and the command above it; `bold` cells stand out."""
    rows = cells_of(name, grid, found)
    keys = grid["tables"][name]["columns"]
    titles = [COLUMNS[key].title for key in keys]
    lines = ["| setting | " + " | ".join(titles) + " |", "|---" * (len(keys) + 1) + "|"]
    for row, cells in rows.items():
        shown = [_shown(cells[key], COLUMNS[key], (name, row, key) in bold) for key in keys]
        lines.append(f"| {row} | " + " | ".join(shown) + " |")
    halves = [[half for cells in rows.values() for _, half in cells[key].values() if half] for key in keys]
    shown = [f"*±{statistics.mean(half):.3f}*" if half else "" for half in halves]
    lines.append("| *half of a single value's 95 % interval* | " + " | ".join(shown) + " |")
    return f"{heading(name, rows_of(name, grid, found), grid, budget)}\n\n" + "\n".join(lines) + "\n"


def _shown(cell: dict[int, Value], column: Column, bold: bool) -> str:
    if not cell:
        return ""
    mean = f"{statistics.mean(value for value, _ in cell.values()):.{column.decimals}f}"
    return f"**{mean}**" if bold else mean


def heading(name: str, rows: dict[str, list[Result]], grid: dict[str, Any], budget: str) -> str:
    """Returns how the values of a table were measured."""
    seeds = [len(results) for results in rows.values()]
    count = f"{min(seeds)}" if min(seeds) == max(seeds) else f"{min(seeds)} to {max(seeds)}"
    about = grid["tables"][name].get("about", grid["budgets"][budget]["about"])
    return f"`python -m experiments.run {name} --budget {budget}`: {about}; mean of {count} seed{'' if max(seeds) == 1 else 's'}."


def conflict_table(grid: dict[str, Any], found: Found, budget: str) -> str:
    """Returns the mean cosine of each pair of losses over the run, after its start."""
    rows = rows_of("conflicts", grid, found)
    pairs = sorted({pair for results in rows.values() for x in results for pair in x["gradients"][0]["cosines"]})
    lines = ["| the gradients of | " + " | ".join(rows) + " |", "|---" * (len(rows) + 1) + "|"]
    for pair in sorted(pairs, key=lambda pair: len(set(pair.split())), reverse=True):
        means = [
            [x["cosines"][pair] for y in results for x in y["gradients"][1:] if pair in x["cosines"]]
            for results in rows.values()
        ]
        first, second = pair.split()
        title = f"{first}, two halves of its batches" if first == second else f"{first} and {second}"
        lines.append(
            f"| {title} | " + " | ".join(f"{statistics.mean(x):+.2f}".replace("-", "−") if x else "" for x in means) + " |"
        )
    return f"{heading('conflicts', rows, grid, budget)}\n\n" + "\n".join(lines) + "\n"


def render(text: str, results: Path = RESULTS) -> str:
    """Returns discussion.md with all its tables rendered again."""
    grid = tomllib.loads(GRID.read_text("utf-8"))
    for budget in grid["budgets"]:
        found = load(budget, results)
        bold = significant(grid, found)
        if f"<!-- comparisons-{budget} -->" in text:
            tested = comparisons(grid, found)
            alone = sum(p <= RATE for p in tested.values())
            counts = f"Of {len(tested)} comparisons, {alone} have p ≤ {RATE} and {len(bold)} remain after the correction.\n"
            text = fill(text, f"comparisons-{budget}", counts)
        for name in set(found) - {"base"}:
            gradients = grid["tables"][name].get("gradients")
            made = conflict_table(grid, found, budget) if gradients else table(name, grid, found, budget, bold)
            text = fill(text, f"experiment-{budget}-{name}", made)
    return text


# Pictures


def _finish(figure: Figure, path: Path) -> None:
    if figure.axes[0].get_legend_handles_labels()[1]:
        figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=110)


def draw_trade(found: Found, path: Path) -> None:
    """Draws the average task score over the nearest-neighbour overlap, for all settings that train all tasks."""
    figure = Figure(figsize=(9.5, 5))
    axes = figure.subplots()
    points = [
        (statistics.mean(x["drift"]["metrics"]["neighbours_at_10"] for x in results),
         statistics.mean(x["average"] for x in results), colour, row)
        for colour, name in zip(COLOURS, ("base", "freezing", "preserving"), strict=False)
        for row, results in found.get(name, {}).items()
        if all(len(x["tasks"]) == len(TASKS) for x in results)
    ]  # fmt: skip
    for number, (kept, average, colour, row) in enumerate(sorted(points), 1):
        axes.scatter(kept, average, color=colour, label=f"{number}  {row}")
        above = (-4, 6) if number % 2 else (-4, -14)  # labels next to each other do not overlap
        axes.annotate(str(number), (kept, average), xytext=above, textcoords="offset points", fontsize=8, color=GRAY)
    axes.set(xlabel="nearest-neighbour overlap@10, out-of-domain texts", ylabel="average of the four tasks")
    _finish(figure, path)


def draw_sizes(found: Found, path: Path) -> None:
    """Draws emotion's score over the number of its training texts, alone and with the other tasks."""
    figure = Figure(figsize=(7, 3.5))
    axes = figure.subplots()
    for colour, company in zip(COLOURS, ("alone", "with the others"), strict=False):
        rows = {
            int(row.split()[0].replace(",", "")): r for row, r in found.get("sizes", {}).items() if row.endswith(company)
        }
        scores = {size: list(values(rows[size], COLUMNS["emotion"]).values()) for size in sorted(rows)}
        means = [statistics.mean(value for value, _ in x) for x in scores.values()]
        if scores:
            halves = [x[0][1] for x in scores.values()]
            axes.errorbar(list(scores), means, halves, color=colour, marker="o", capsize=3, label=company)
        axes.set_xscale("log")
        axes.set_xticks(list(scores), [f"{size:,}" for size in scores])
        axes.minorticks_off()
    axes.set(xlabel="tweets of emotion", ylabel="macro F1, with its 95 % interval")
    _finish(figure, path)


def draw_conflicts(found: Found, path: Path) -> None:
    """Draws the cosines between the tasks' gradients over a run."""
    figure = Figure(figsize=(8.5, 4))
    axes = figure.subplots()
    for results, style in zip(found.get("conflicts", {}).values(), ("-", "--"), strict=False):
        points = results[0]["gradients"]
        pairs = [pair for pair in points[0]["cosines"] if len(set(pair.split()) - {"drift"}) == 2 and "drift" not in pair]
        for colour, pair in zip(COLOURS, sorted(pairs), strict=False):
            label = pair.replace(" ", " and ") if style == "-" else None
            axes.plot([x["step"] for x in points], [x["cosines"][pair] for x in points], style, color=colour, label=label)
    axes.axhline(0, color=GRAY, linewidth=1)
    axes.set(xlabel="step (dashed: nothing preserved)", ylabel="cosine of gradients")
    _finish(figure, path)


# By the table that must have results before there is anything to see.
PICTURES = {"preserving": draw_trade, "sizes": draw_sizes, "conflicts": draw_conflicts}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    path = ROOT / "discussion.md"
    try:
        path.write_text(render(path.read_text("utf-8")), "utf-8")
    except ValueError as error:
        sys.exit(f"{path}: {error}")
    found = load("small")
    for name, draw in PICTURES.items():
        if name in found:
            with rc_context(STYLE):
                draw(found, RESULTS / f"{name}.png")
    print("discussion.md, and what pictures there are in results/experiments/, show the results")


if __name__ == "__main__":
    main()
