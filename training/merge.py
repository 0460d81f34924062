"""Merges runs of one recipe into one model: `python -m training.merge RECIPE runs/a runs/b … --scale 1.1 --output runs/merged`.

Runs that differ in `sampling.seed` alone begin with the same weights and see the same rows in another order. The mean of what
they end with is often better than any of them and costs no more than one (Wortsman et al. 2022, Model soups: averaging weights
of multiple fine-tuned models improves accuracy without increasing inference time).

`--scale` then moves the encoder along the line from the starting encoder through that mean: 0 is the start, 1 the mean. Below 1
more of the starting embedding is kept (Wortsman et al. 2022, Robust fine-tuning of zero-shot models); above 1 less of it, and a
task may gain that the loss which holds the embedding has made stop short (Ilharco et al. 2023, Editing models with task
arithmetic). The validation splits, in metrics.json, say whether it did.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from evaluation.calibrate import calibrate
from evaluation.evaluate import surroundings
from modeling_multitask import MultiTaskModel
from training.data import DataError
from training.recipe import Recipe, RecipeError
from training.train import as_json, changed_settings, validate, write_json

MAY_DIFFER = {"sampling.seed", "run.save_steps", "run.report_to"}


def read_runs(runs: list[Path], recipe: Recipe) -> dict[str, Any]:
    """Returns what the runs say of their data, after making sure that they can be merged.

    Raises:
        RecipeError: A run is not finished, named twice, not of this recipe, or of other data than the first.
    """
    if len({run.resolve() for run in runs}) < len(runs):
        raise RecipeError(f"the runs are {', '.join(map(str, runs))}; name each of them once")
    facts: dict[str, Any] = {}
    for run in runs:
        if not (run / "metrics.json").exists():
            raise RecipeError(f"{run} holds no finished run; train it with training.train, or go on with --resume")
        if keys := [key for key in changed_settings(run, recipe) if key not in MAY_DIFFER]:
            raise RecipeError(
                f"{run} holds the run of another recipe; besides sampling.seed these differ: {', '.join(keys)}"
            )
        found = json.loads((run / "run.json").read_text("utf-8"))["data"]
        if found != (facts := facts or found):
            raise RecipeError(f"{run} was trained on other data than {runs[0]}: compare the fingerprints in their run.json")
    return facts


def mean(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the mean of several models' weights."""
    return {name: torch.stack([state[name].float() for state in states]).mean(dim=0) for name in states[0]}


def scaled(start: dict[str, Tensor], end: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Returns the weights at `scale` on the line through `start` (0) and `end` (1)."""
    return {name: torch.lerp(start[name].float(), x, scale) for name, x in end.items()}


def merged_model(folders: list[Path], encoder: str, scale: float) -> MultiTaskModel:
    """Returns the mean of some models, its encoder moved to `scale` as seen from the starting `encoder`."""
    models = [MultiTaskModel.from_pretrained(folder, dtype=torch.float32) for folder in folders]
    model = models[0]
    model.load_state_dict(mean([x.state_dict() for x in models]))
    if scale != 1:
        start = AutoModel.from_pretrained(encoder, dtype=torch.float32).state_dict()
        model.encoder.load_state_dict(scaled(start, model.encoder.state_dict(), scale))
    return model


def merge(runs: list[Path], recipe: Recipe, output: Path, scale: float = 1.0) -> dict[str, float]:
    """Writes what some runs merge to as a run folder of its own, and returns what the validation splits give.

    Temperatures are fitted anew. Heads and projection are those of the mean, at any scale.

    Args:
        runs: Finished run folders, one or more.
        recipe: Their recipe, with any `sampling.seed`; it names the starting encoder.
        output: The new folder.
        scale: Where the encoder goes, at least 0: 0 is the start, 1 the mean of the runs.

    Raises:
        RecipeError: The runs cannot be merged, there is a run in `output`, or the scale is below 0.
        ValueError: A validation split is not what the recipe says.
    """
    if (output / "run.json").exists():
        raise RecipeError(f"{output} holds a run already; give another --output")
    if not 0 <= scale < float("inf"):
        raise RecipeError(f"--scale is {scale}; it must be at least 0: 0 is the starting encoder, 1 the mean of the runs")
    facts = read_runs(runs, recipe)
    model = merged_model([run / "final" for run in runs], recipe.model.encoder, scale)
    tokenizer = AutoTokenizer.from_pretrained(runs[0] / "final")
    if recipe.run.calibrate:
        calibrate(model, tokenizer, recipe)
    model.save_pretrained(output / "final")
    tokenizer.save_pretrained(output / "final")
    trained = [json.loads((run / "metrics.json").read_text("utf-8")) for run in runs]
    totals = {key: sum(metrics[key] for metrics in trained) for key in ("seconds", "steps")}
    metrics = {**totals, **validate(model, tokenizer, recipe)}
    origin = {"command": sys.argv, "runs": list(map(str, runs)), "scale": scale}
    write_json(output / "recipe.json", as_json(recipe))
    write_json(output / "run.json", {**origin, "data": facts, **surroundings()})
    write_json(output / "metrics.json", metrics)
    return metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("runs", type=Path, nargs="+", help="finished run folders of the recipe")
    parser.add_argument("--scale", type=float, default=1.0, help="where the encoder goes; default: 1, the mean of the runs")
    parser.add_argument("--output", type=Path, required=True, help="the new run folder")
    parser.add_argument("--data", type=Path, help="as for training.train")
    parser.add_argument("--encoder", help="as for training.train")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="as for training.train")
    args = parser.parse_args()
    try:
        recipe = Recipe.read(args.recipe, args.data, args.encoder, args.set)
        metrics = merge(args.runs, recipe, args.output, args.scale)
    except (RecipeError, DataError, OSError) as error:
        sys.exit(str(error))
    print(f"{args.output}/final holds what {len(args.runs)} runs merge to; {json.dumps(metrics)}")


if __name__ == "__main__":
    main()
