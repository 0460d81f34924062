"""Fits each head's temperature and thresholds on the validation split: `python -m evaluation.calibrate FOLDER`.

A head's logits are divided by its temperature (Guo et al. 2017, On calibration of modern neural networks), so that
scores say how often the answer is right. Which label is the likeliest stays as it is. Where several labels apply, each gets the
threshold with the best F1.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from common.data import DataError, has_split, load_task_split
from common.recipe import Recipe, RecipeError
from evaluation.evaluate import DEFAULT_RECIPE, MULTI_LABEL, REGRESSION, check_splits, predict
from learning_multitask import fit_temperature, fit_thresholds
from modeling_multitask import MultiTaskModel
from pipeline_multitask import MultiTaskPipeline


def calibrate(
    model: MultiTaskModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, split: str = "validation"
) -> dict[str, dict[str, Any]]:
    """Sets temperature and thresholds of each classification head, in the model and its configuration.

    Doing so again changes nothing. Heads for regression have neither, and a task whose data sets have no such split keeps its
    own.

    Returns:
        The new fields of each task's spec: `temperature`, and for multi-label heads `thresholds`.

    Raises:
        ValueError: The model does not fit the recipe, or the data are not what the recipe says.
    """
    pipe = MultiTaskPipeline(model=model, tokenizer=tokenizer, device=model.device)
    fitted: dict[str, dict[str, Any]] = {}
    for name, task in recipe.tasks.items():
        if not task.has_head or task.head.get("problem_type") == REGRESSION:
            continue
        parts = [part for part in task.parts(name).values() if has_split(part, split)]
        found = [predict(pipe, name, part, load_task_split(part, split)) for part in parts]
        if not found:
            continue
        logits = np.concatenate([x.logits for x in found]) * found[0].spec.temperature
        truth = np.concatenate([x.truth for x in found])
        fields: dict[str, Any] = {"temperature": fit_temperature(logits, truth)}
        if found[0].spec.problem_type == MULTI_LABEL:
            fields["thresholds"] = fit_thresholds(expit(logits / fields["temperature"]), truth)
        fitted[name] = fields
        model.config.set_tasks({**model.config.tasks, name: {**model.config.tasks[name], **fields}})
        model.heads[name].spec = model.config.task_specs[name]
    return fitted


def write_fields(path: Path, fitted: dict[str, dict[str, Any]]) -> None:
    """Writes new fields of tasks into a `config.json`; everything else in it stays as it is."""
    text = path.read_text("utf-8")
    fields: dict[str, Any] = json.loads(text)
    for name, values in fitted.items():
        fields["tasks"][name].update(values)
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=text.isascii()) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a release or a checkpoint; its config.json is changed")
    parser.add_argument("--recipe", type=Path, default=DEFAULT_RECIPE, help="names tasks and data")
    parser.add_argument("--data", type=Path, help="folder with local copies of the data sets")
    args = parser.parse_args()
    try:
        recipe = Recipe.read(args.recipe, args.data)
        check_splits(recipe, "validation")
        model, tokenizer = MultiTaskModel.from_pretrained(args.folder), AutoTokenizer.from_pretrained(args.folder)
        fitted = calibrate(model, tokenizer, recipe)
    except (RecipeError, DataError) as error:
        sys.exit(str(error))
    write_fields(args.folder / "config.json", fitted)
    print(f"{args.folder}/config.json now holds {json.dumps(fitted)}")


if __name__ == "__main__":
    main()
