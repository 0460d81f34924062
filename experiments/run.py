"""Runs the experiments behind discussion.md: `python -m experiments.run [TABLE ...] [--seeds 0 1 2] [--budget small]`.

experiments/grid.toml says what they are. Each cell, one setting and one seed, is a run of `training.train` in a process of
its own, measured on the validation splits; what it gave is one file in results/experiments/. A cell that has its file is
skipped, and one that was interrupted continues from its last checkpoint. `python -m experiments.report` shows the results.
"""

import argparse
import json
import multiprocessing
import re
import resource
import shutil
import sys
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import pipeline

from common.data import DataError
from common.files import ROOT, environment_info, write_json
from common.recipe import Recipe, RecipeError
from evaluation.evaluate import average, measure, measure_drift
from experiments.conflicts import gradient_conflicts
from experiments.encoders import shaped_encoder
from training.train import train

GRID = ROOT / "experiments/grid.toml"
RESULTS = ROOT / "results/experiments"
CHECKPOINT_STEPS = 200


@dataclass(frozen=True)
class Cell:
    """One setting of one table, with one seed."""

    recipe: str  # the recipe's file in this repository
    unseen: tuple[str, str, str, str]  # data set, its folder under --data, split and column of texts that no task trains on
    budget: str
    table: str
    name: str  # what the setting is called in the table
    seed: int  # the run's; it also picks the training rows
    settings: tuple[str, ...]  # overrides of the recipe, as `--set` takes them
    only: tuple[str, ...] = ()  # the tasks that train; none: all
    rows: int | None = None  # so many of each validation split are measured; None: all
    gradients: bool = False  # whether the tasks' gradients are compared, and nothing else is measured
    # Changes of the starting encoder that stand for a branch of another shape, see `experiments.encoders`.
    shape: dict[str, int] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """The name of its result file, in the folder of all results."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        return Path(self.budget, self.table, f"{slug}-{self.seed}.json")

    @property
    def command(self) -> str:
        """The command that trains the same model."""
        parts = [f"--only {' '.join(self.only)}"] if self.only else []
        parts += [f"--set '{setting}'" for setting in self.settings]
        return " ".join([f"python -m training.train {self.recipe} --output RUN", *parts])


def read_grid(budget: str, seeds: list[int], tables: list[str], path: Path = GRID) -> list[Cell]:
    """Returns the cells of the tables (all, if none is named) in the order in which they run.

    Raises:
        RecipeError: There is no such budget or table.
    """
    grid = tomllib.loads(path.read_text("utf-8"))
    for kind, names in (("budgets", [budget]), ("tables", tables)):
        if unknown := [name for name in names if name not in grid[kind]]:
            raise RecipeError(f"{path.name} has no {kind} {unknown}; it has: {', '.join(grid[kind])}")
    chosen = [table for table in grid["tables"] if not tables or table in tables]
    return [cell for seed in seeds for table in chosen for cell in _table_cells(grid, budget, table, seed)]


def _table_cells(grid: dict[str, Any], budget: str, table: str, seed: int) -> Iterator[Cell]:
    limits, fields = grid["budgets"][budget], grid["tables"][table]
    for cell in fields["cells"]:
        written = [*limits["settings"], *fields.get("settings", []), *cell.get("settings", [])]
        settings = tuple(x for setting in written for x in grid["lists"].get(setting.strip("{}"), [setting]))
        only = tuple(cell.get("only", fields.get("only", [])))
        how = {"rows": limits.get("rows"), "gradients": fields.get("gradients", False), "shape": cell.get("shape", {})}
        yield Cell(grid["recipe"], tuple(grid["unseen"]), budget, table, cell["name"], seed, settings, only, **how)


def cell_recipe(cell: Cell, data: Path | None, encoder: str) -> Recipe:
    """Returns a cell's recipe."""
    run = [f"run.seed={cell.seed}", "run.validation_rows=50", "run.calibrate=false", f"run.save_steps={CHECKPOINT_STEPS}"]
    settings = [setting.replace("{encoder}", encoder) for setting in cell.settings]
    return Recipe.read(ROOT / cell.recipe, data, encoder, [*settings, *run], cell.only)


def run_cell(cell: Cell, args: argparse.Namespace) -> None:
    """Runs one cell and writes its result file."""
    started = time.monotonic()
    folder = args.runs / cell.path.with_suffix("")
    start = folder.with_name(f"{folder.name}-start")
    recipe = cell_recipe(cell, args.data, shaped_encoder(args.encoder, cell.shape, start) if cell.shape else args.encoder)
    found = gradient_conflicts(recipe, folder) if cell.gradients else train_and_measure(cell, recipe, folder, args)
    result = {**asdict(cell), "command": cell.command, **found, "cell_seconds": round(time.monotonic() - started)}
    target = args.output / cell.path
    part = target.with_suffix(".part")
    write_json(part, {**result, **environment_info()})
    part.rename(target)
    for used in (folder, start):
        shutil.rmtree(used, ignore_errors=True)


def train_and_measure(cell: Cell, recipe: Recipe, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Returns what a cell's model costs and gives."""
    resumed = (folder / "recipe.json").exists()
    started = time.process_time()  # of the processor, not the clock: other processes do not count
    if not (folder / "metrics.json").exists():  # written when the training is over
        train(recipe, folder, resume=resumed)
    seconds = time.process_time() - started
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB
    costs = not resumed and not torch.accelerator.is_available()  # on a GPU, the processor's share says nothing
    metrics, run = (json.loads((folder / f"{name}.json").read_text("utf-8")) for name in ("metrics", "run"))
    pipe = pipeline("multitask", model=str(folder / "final"), trust_remote_code=True)
    tasks = measure(pipe, recipe, "validation", intervals=True, limit=cell.rows)
    dataset, folder_name, *place = cell.unseen
    unseen = str(args.data / folder_name) if args.data else dataset
    return {
        "processor_seconds": round(seconds) if costs else None,
        "peak_memory_mb": round(memory) if costs else None,
        "steps": metrics["steps"],
        "trained_parameters": run["trained"],
        "data": run["data"],
        "tasks": tasks,
        "average": average(tasks, recipe),
        "drift": None if cell.shape else measure_drift(pipe, unseen, *place, args.encoder, intervals=True),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help="tables of the grid; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budget", default="small", help="a budget of the grid (default: small)")
    parser.add_argument("--data", type=Path, help="folder with local copies of the data sets; default: from the Hub")
    parser.add_argument("--encoder", default="sentence-transformers/all-MiniLM-L6-v2", help="what all runs start from")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/experiments", help="where unfinished runs lie")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the results go")
    parser.add_argument("--grid", type=Path, default=GRID, help="the file that says what there is to run")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    try:
        cells = read_grid(args.budget, args.seeds, args.tables, args.grid)
    except RecipeError as error:
        sys.exit(str(error))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.train"])  # the slow imports, once
    # A process for each cell, so that its memory is its own too.
    with ProcessPoolExecutor(max_workers=1, mp_context=context, max_tasks_per_child=1) as pool:
        for number, cell in enumerate(cells, 1):
            finished = (args.output / cell.path).exists()
            print(f"{number} of {len(cells)}: {cell.path}{', finished' if finished else ''}", flush=True)
            if finished:
                continue
            try:
                pool.submit(run_cell, cell, args).result()
            except (RecipeError, DataError, BrokenProcessPool) as error:
                sys.exit(f"{cell.path}: {error}")


if __name__ == "__main__":
    main()
