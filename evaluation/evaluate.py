"""Evaluates a model on the data sets of a recipe: `python -m evaluation.evaluate . --split test --output results/release.json`.

Everything is measured on what a user gets: the records of the multitask pipeline, made from raw text.
"""

import argparse
import dataclasses
import hashlib
import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, pipeline

from configuration_multitask import SEQUENCE, TOKEN
from evaluation.metrics import (
    classification_metrics,
    entities_to_tags,
    entity_metrics,
    mean_cosine,
    neighbours_kept,
    similarity_metrics,
    token_spans,
)
from training.data import class_names, load_task_split
from training.recipe import Recipe, TaskRecipe
from training.train import encode

ROOT = Path(__file__).resolve().parent.parent
NEIGHBOURS = 10
LIBRARIES = ("torch", "transformers", "sentence-transformers", "datasets", "seqeval", "scikit-learn")


def evaluate_sequence(pipe: Any, name: str, task: TaskRecipe, data: Any) -> dict[str, float]:
    """Returns the classification metrics of one single-label task."""
    names = class_names(data, task.label_column)
    records = pipe(list(data[task.text_columns[0]]), tasks=[name], embedding=False)
    truth = [names[label] for label in data[task.label_column]]
    return classification_metrics(truth, [record["labels"][name]["label"] for record in records])


def evaluate_token(pipe: Any, name: str, task: TaskRecipe, data: Any) -> dict[str, float]:
    """Returns the entity metrics of one token task; the tokens are joined by spaces and found again by the model."""
    names = class_names(data, task.label_column)
    tokens = data[task.text_columns[0]]
    records = pipe([" ".join(row) for row in tokens], tasks=[name], embedding=False)
    truth = [[names[tag] for tag in tags] for tags in data[task.label_column]]
    predicted = [
        entities_to_tags(token_spans(row), record["entities"][name]) for row, record in zip(tokens, records, strict=True)
    ]
    return entity_metrics(truth, predicted)


def evaluate_pairs(
    pipe: Any, task: TaskRecipe, data: Any, prefix_dims: list[int], reference: str | None
) -> dict[str, float]:
    """Returns Spearman's correlation for the embedding, for its prefixes and for the encoder's own pooled vector.

    With `reference`, the starting encoder, also for its pooled vector, and how near the embedding still is to it:
    `cosine_raw`, the mean cosine similarity of the two encoders' pooled vectors, and `neighbours_at_10`, the share of each
    text's ten nearest neighbours under the starting encoder that are so under the model's sentence embedding.
    """
    texts = [text for column in task.text_columns for text in data[column]]
    ids = pipe.tokenizer(texts, truncation=True)["input_ids"]
    mode, pad_token_id = pipe.model.config.pooling_mode, pipe.tokenizer.pad_token_id
    embeddings = np.stack([record["sentence_embedding"] for record in pipe(texts, tasks=[])])
    views = {"spearman": embeddings, "spearman_raw": encode(pipe.model.encoder, ids, mode, pad_token_id).numpy()}
    views.update({f"spearman_{dim}": embeddings[:, :dim] for dim in prefix_dims})
    if reference:
        views["spearman_reference"] = encode(AutoModel.from_pretrained(reference).eval(), ids, mode, pad_token_id).numpy()
    half, scores = len(data), data[task.label_column]
    metrics = {name: similarity_metrics(view[:half], view[half:], scores) for name, view in views.items()}
    if reference:
        distinct = sorted({text: row for row, text in enumerate(texts)}.values())
        before, now = views["spearman_reference"][distinct], views["spearman_raw"][distinct]
        metrics["cosine_raw"] = mean_cosine(before, now)
        metrics[f"neighbours_at_{NEIGHBOURS}"] = neighbours_kept(before, embeddings[distinct], NEIGHBOURS)
    return metrics


def evaluate(model: str, recipe: Recipe, split: str, reference: str | None) -> dict[str, Any]:
    """Returns, for each task of the recipe, its metrics and what it was measured on."""
    pipe = pipeline("multitask", model=model, trust_remote_code=True)
    results = {}
    for name, task in recipe.tasks.items():
        data = load_task_split(task, split)
        if task.kind == SEQUENCE:
            metrics = evaluate_sequence(pipe, name, task, data)
        elif task.kind == TOKEN:
            metrics = evaluate_token(pipe, name, task, data)
        else:
            metrics = evaluate_pairs(pipe, task, data, recipe.model.prefix_dims, reference)
        results[name] = {"metrics": metrics, "split": split, "rows": len(data), "sha256": fingerprint(task, data)}
        print(name, json.dumps(metrics))
    return results


def fingerprint(task: TaskRecipe, data: Any) -> str:
    """Returns a hash of the columns that a task reads, the same wherever the data set was loaded from."""
    digest = hashlib.sha256()
    for column in [*task.text_columns, task.label_column]:
        digest.update(json.dumps([round(x, 6) if isinstance(x, float) else x for x in data[column]]).encode())
    return digest.hexdigest()


def surroundings() -> dict[str, Any]:
    """Returns what a result depends on besides its recipe: revision, libraries, machine."""
    revision = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False)
    return {
        "revision": revision.stdout.strip(),
        "libraries": {name: version(name) for name in LIBRARIES},
        "hardware": {"machine": platform.machine(), "threads": torch.get_num_threads(), "cuda": torch.cuda.is_available()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("--recipe", type=Path, default=ROOT / "training/recipes/release.toml", help="names tasks and data")
    parser.add_argument("--data", type=Path, help="folder with local copies of the data sets")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--reference", help="the starting encoder, to measure how far the embedding has moved from it")
    parser.add_argument("--output", type=Path, help="where to write the results, for instance results/release.json")
    args = parser.parse_args()
    recipe = Recipe.read(args.recipe)
    tasks = evaluate(args.model, Recipe.read(args.recipe, args.data), args.split, args.reference)
    reference = " --reference ENCODER" if args.reference else ""
    result = {
        "command": f"python -m evaluation.evaluate MODEL --split {args.split}{reference}",
        "parameters": sum(x.numel() for x in AutoModel.from_pretrained(args.model, trust_remote_code=True).parameters()),
        "tasks": tasks,
        "recipe": dataclasses.asdict(recipe),
        **surroundings(),
    }
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
