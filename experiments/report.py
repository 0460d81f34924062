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
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
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


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    title: str
    place: str  # keys that lead to its value in a result, "metrics" and "intervals" left out
    decimals: int = 3
    unit: float = 1.0  # what values are divided by
    compared: bool = True  # whether rows are

    def read(self, result: Result) -> Value | None:
        """Returns the column's value in a result, if it was measured."""
        *parents, key = self.place.split()
        for parent in parents:
            result = result.get(parent) or {}
        value, interval = result.get("metrics", result).get(key), result.get("intervals", {}).get(key)
        return None if value is None else (value / self.unit, (interval[1] - interval[0]) / 2 if interval else None)


COLUMNS = {
    "sentiment": Column("sentiment, macro recall", "tasks sentiment macro_recall"),
    "emotion": Column("emotion, macro F1", "tasks emotion macro_f1"),
    "emotion_accuracy": Column("emotion, accuracy", "tasks emotion accuracy"),
    "ner": Column("entity F1", "tasks ner f1"),
    "ner_recall": Column("entity recall", "tasks ner recall"),
    "similarity": Column("STS-B, Spearman", "tasks similarity spearman"),
    "average": Column("average", "average"),
    "kept": Column("overlap@10", "drift neighbours_at_10"),
    "cosine": Column("cosine to the start", "drift cosine_raw"),
    "seconds": Column("processor, s", "processor_seconds", 0, compared=False),
    "memory": Column("memory, MB", "peak_memory_mb", 0, compared=False),
    "trained": Column("trained, millions", "trained_parameters", 1, 1e6, compared=False),
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
    pairs = [(values[seed][0], reference[seed][0]) for seed in sorted(set(values) & set(reference))]
    if len(pairs) < MIN_SEEDS:
        return None
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
    for name in sorted(x for x in found if "columns" in grid["tables"].get(x, {})):
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
    rows, columns = cells_of(name, grid, found), {key: COLUMNS[key] for key in grid["tables"][name]["columns"]}
    lines = [["setting", *(column.title for column in columns.values())]]
    for row, cells in rows.items():
        shown = {key: _mean([x for x, _ in cells[key].values()], f".{columns[key].decimals}f") for key in columns}
        lines.append([row, *(f"**{x}**" if (name, row, key) in bold else x for key, x in shown.items())])
    halves = [[half for cells in rows.values() for _, half in cells[key].values() if half] for key in columns]
    lines.append(["*half of a single value's 95 % interval*", *(f"*±{_mean(x, '.3f')}*" if x else "" for x in halves)])
    return _with_heading(name, grid, found, budget, lines)


def conflict_table(grid: dict[str, Any], found: Found, budget: str) -> str:
    """Returns the mean cosine of each pair of losses over the run, after its start."""
    rows = rows_of("conflicts", grid, found)
    pairs = {pair for results in rows.values() for x in results for pair in x["gradients"][0]["cosines"]}
    lines = [["the gradients of", *rows]]
    for first, second in sorted((pair.split() for pair in pairs), key=lambda pair: (pair[0] == pair[1], pair)):
        pair = f"{first} {second}"
        cosines = [
            [x["cosines"][pair] for y in results for x in y["gradients"][1:] if pair in x["cosines"]]
            for results in rows.values()
        ]
        title = f"{first}, two halves of its batches" if first == second else f"{first} and {second}"
        lines.append([title, *(_mean(x, "+.2f").replace("-", "−") for x in cosines)])
    return _with_heading("conflicts", grid, found, budget, lines)


def _mean(values: list[float], spec: str) -> str:
    return format(statistics.mean(values), spec) if values else ""


def _with_heading(name: str, grid: dict[str, Any], found: Found, budget: str, lines: list[list[str]]) -> str:
    """Returns a table in Markdown, the first of its lines being its header, below how it was measured."""
    seeds = [len(results) for results in rows_of(name, grid, found).values()]
    count = " to ".join(str(x) for x in sorted({min(seeds), max(seeds)}))
    about = grid["tables"][name].get("about", grid["budgets"][budget]["about"])
    header, *rows = (f"| {' | '.join(cells)} |\n" for cells in lines)
    return (
        f"`python -m experiments.run {name} --budget {budget}`: {about}; mean of {count} seed{'' if max(seeds) == 1 else 's'}."
        f"\n\n{header}{'|---' * len(lines[0])}|\n{''.join(rows)}"
    )


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


def draw_trade(found: Found, axes: Axes) -> None:
    """Draws the average task score over the nearest-neighbour overlap, for all settings that train all tasks."""
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


def draw_sizes(found: Found, axes: Axes) -> None:
    """Draws emotion's score over the number of its training texts, alone and with the other tasks."""
    for colour, company in zip(COLOURS, ("alone", "with the others"), strict=False):
        rows = {int(row.split()[0].replace(",", "")): r for row, r in found["sizes"].items() if row.endswith(company)}
        scores = {size: list(values(rows[size], COLUMNS["emotion"]).values()) for size in sorted(rows)}
        means = [statistics.mean(value for value, _ in x) for x in scores.values()]
        halves = [x[0][1] for x in scores.values()]
        axes.errorbar(list(scores), means, halves, color=colour, marker="o", capsize=3, label=company)
        axes.set_xscale("log")
        axes.set_xticks(list(scores), [f"{size:,}" for size in scores])
        axes.minorticks_off()
    axes.set(xlabel="tweets of emotion", ylabel="macro F1, with its 95 % interval")


def draw_conflicts(found: Found, axes: Axes) -> None:
    """Draws the cosines between the tasks' gradients over a run."""
    for results, style in zip(found["conflicts"].values(), ("-", "--"), strict=False):
        points = results[0]["gradients"]
        pairs = [pair for pair in points[0]["cosines"] if len(set(pair.split()) - {"drift"}) == 2 and "drift" not in pair]
        for colour, pair in zip(COLOURS, sorted(pairs), strict=False):
            label = pair.replace(" ", " and ") if style == "-" else None
            axes.plot([x["step"] for x in points], [x["cosines"][pair] for x in points], style, color=colour, label=label)
    axes.axhline(0, color=GRAY, linewidth=1)
    axes.set(xlabel="step (dashed: nothing preserved)", ylabel="cosine of gradients")


# By the table that must have results before there is anything to see, with its size in inches.
PICTURES = {"preserving": (draw_trade, (9.5, 5)), "sizes": (draw_sizes, (7, 3.5)), "conflicts": (draw_conflicts, (8.5, 4))}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    path = ROOT / "discussion.md"
    try:
        path.write_text(render(path.read_text("utf-8")), "utf-8")
    except ValueError as error:
        sys.exit(f"{path}: {error}")
    found = load("small")
    for name, (draw, size) in PICTURES.items():
        if name in found:
            with rc_context(STYLE):
                figure = Figure(figsize=size)
                draw(found, figure.subplots())
                figure.legend(loc="outside right upper")
                figure.savefig(RESULTS / f"{name}.png", dpi=110)
    print("discussion.md, and what pictures there are in results/experiments/, show the results")


if __name__ == "__main__":
    main()
