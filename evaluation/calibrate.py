"""Fits what each head decides by on the validation split: `python -m evaluation.calibrate CHECKPOINT`.

A head's logits are divided by its temperature (Guo et al. 2017, On calibration of modern neural networks), so that scores
say how often the answer is right; which label is the likeliest stays as it is. Where several labels apply, each gets the
threshold with the best F1. For entities, the bias of the labels that begin one is shifted to the best F1.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import expit, log_softmax
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from annotator_multitask import BioScheme
from common.data import DataError, has_split, load_task_split
from common.recipe import Recipe, RecipeError
from configuration_multitask import WEIGHTS_INDEX
from evaluation.evaluate import DEFAULT_RECIPE, MULTI_LABEL, REGRESSION, Predictions, check_splits, predict
from learning_multitask import fit_temperature, fit_thresholds
from modeling_multitask import MultiTaskModel
from pipeline_multitask import MultiTaskPipeline

# Of a logit that no temperature divides; of equally good ones the smallest counts.
SHIFTS = sorted((round(0.1 * step, 1) for step in range(-10, 11)), key=abs)


def calibrate(
    model: MultiTaskModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, split: str = "validation"
) -> dict[str, dict[str, Any]]:
    """Fits each classification head, in the model and its configuration.

    Doing so again changes nothing. A task whose data sets have no such split stays as it is, and so does regression.

    Returns:
        What each head got: `temperature`, for multi-label heads `thresholds`, and for entities `begin_shift`, which the
        biases of its `B-` labels moved by.

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
        spec, shift = found[0].spec, 0.0
        begins = np.array([spec.is_bio and label.startswith("B-") for label in spec.labels])
        logits = [x.logits * spec.temperature for x in found]
        if spec.is_bio:
            shift = fit_begin_shift(BioScheme(spec.labels), logits, found)
            bias = model.heads[name].classifier.bias.data
            bias += torch.from_numpy(shift * begins).to(bias)
        raw, truth = np.concatenate(logits) + shift * begins, np.concatenate([x.truth for x in found])
        fields: dict[str, Any] = {"temperature": fit_temperature(raw, truth)}
        if spec.problem_type == MULTI_LABEL:
            fields["thresholds"] = fit_thresholds(expit(raw / fields["temperature"]), truth)
        model.config.set_tasks({**model.config.tasks, name: {**model.config.tasks[name], **fields}})
        model.heads[name].spec = model.config.task_specs[name]
        fitted[name] = {**fields, "begin_shift": shift} if spec.is_bio else fields
    return fitted


def fit_begin_shift(scheme: BioScheme, logits: list[np.ndarray], found: list[Predictions]) -> float:
    """Returns what to add to the logits of `B-` labels for the best entity F1, the mean over data sets.

    A head that learned word by word tends to begin too many entities: it is judged here by whole ones.

    Args:
        scheme: The head's labels.
        logits: float [W, C] of each data set's words, not divided by a temperature.
        found: The data sets' right labels, and the row of each word.
    """
    starts = [np.flatnonzero(np.diff(x.rows, prepend=-1)) for x in found]
    truth = [whole_entities(scheme, x.truth, first) for x, first in zip(found, starts, strict=True)]

    def mean_f1(shift: float) -> float:
        scores = []
        for values, first, right in zip(logits, starts, truth, strict=True):
            said = whole_entities(scheme, scheme.decode(log_softmax(values + shift * scheme.is_begin, axis=1), first), first)
            scores.append(2 * len(said & right) / max(len(said) + len(right), 1))
        return float(np.mean(scores))

    return max(SHIFTS, key=mean_f1)


def whole_entities(scheme: BioScheme, path: np.ndarray, first_words: np.ndarray) -> set[tuple[int, int, str]]:
    """Returns the first word, end word and group of each entity in the label sequences of several texts."""
    ends = [*first_words[1:].tolist(), len(path)]
    return {
        (start + begin, start + end, group)
        for start, stop in zip(first_words.tolist(), ends, strict=True)
        for begin, end, group in scheme.entities(path[start:stop])
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder of a trained model, which is changed; then export it again")
    parser.add_argument("--recipe", type=Path, default=DEFAULT_RECIPE, help="names tasks and data")
    parser.add_argument("--data", type=Path, help="folder with local copies of the data sets")
    args = parser.parse_args()
    if (args.checkpoint / WEIGHTS_INDEX).exists():
        sys.exit(f"{args.checkpoint} holds a release ({WEIGHTS_INDEX}); fit the checkpoint that it was exported from.")
    try:
        recipe = Recipe.read(args.recipe, args.data)
        check_splits(recipe, "validation")
        model, tokenizer = (x.from_pretrained(args.checkpoint) for x in (MultiTaskModel, AutoTokenizer))
        fitted = calibrate(model, tokenizer, recipe)
    except (RecipeError, DataError) as error:
        sys.exit(str(error))
    model.save_pretrained(args.checkpoint)
    print(f"{args.checkpoint} now holds {fitted}")


if __name__ == "__main__":
    main()
