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
    neighbours_kept,
    similarity_metrics,
    token_spans,
)
from training.data import class_names, load_task_split
from training.recipe import Recipe, TaskRecipe
from training.train import encode

ROOT = Path(__file__).resolve().parent.parent
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


def evaluate_pairs(pipe: Any, task: TaskRecipe, data: Any, prefix_dims: list[int]) -> dict[str, float]:
    """Returns Spearman's correlation for the embedding, for its prefixes and for the encoder's own pooled vector."""
    texts, half = [text for column in task.text_columns for text in data[column]], len(data)
    embeddings = np.stack([record["sentence_embedding"] for record in pipe(texts, tasks=[])])
    ids = pipe.tokenizer(texts, truncation=True)["input_ids"]
    pooled = encode(pipe.model.encoder, ids, pipe.model.config.pooling_mode, pipe.tokenizer.pad_token_id).numpy()
    views = {"spearman": embeddings, "spearman_raw": pooled}
    views.update({f"spearman_{dim}": embeddings[:, :dim] for dim in prefix_dims})
    scores = data[task.label_column]
    return {name: similarity_metrics(view[:half], view[half:], scores) for name, view in views.items()}


def evaluate_drift(pipe: Any, reference: str, texts: list[str]) -> dict[str, float]:
    """Returns how near the embedding of `texts` still is to the starting encoder's.

    `cosine_raw`: mean cosine similarity of the two encoders' pooled vectors; `neighbours_at_10`: share of each text's
    ten nearest neighbours under the starting encoder that are so under the model's sentence embedding.
    """
    ids = pipe.tokenizer(texts, truncation=True)["input_ids"]
    mode, pad = pipe.model.config.pooling_mode, pipe.tokenizer.pad_token_id
    start, now = (
        encode(encoder, ids, mode, pad) for encoder in (AutoModel.from_pretrained(reference).eval(), pipe.model.encoder)
    )
    embeddings = np.stack([record["sentence_embedding"] for record in pipe(texts, tasks=[])])
    return {
        "cosine_raw": float(torch.nn.functional.cosine_similarity(start, now).mean()),
        "neighbours_at_10": neighbours_kept(start.numpy(), embeddings),
    }


def evaluate(model: str, recipe: Recipe, split: str, reference: str | None) -> dict[str, Any]:
    """Returns, for each task of the recipe, its metrics and what it was measured on; with `reference`, pairs get the drift."""
    pipe = pipeline("multitask", model=model, trust_remote_code=True)
    results = {}
    for name, task in recipe.tasks.items():
        data = load_task_split(task, split)
        if task.kind == SEQUENCE:
            metrics = evaluate_sequence(pipe, name, task, data)
        elif task.kind == TOKEN:
            metrics = evaluate_token(pipe, name, task, data)
        else:
            metrics = evaluate_pairs(pipe, task, data, recipe.model.prefix_dims)
            if reference:
                texts = sorted({text for column in task.text_columns for text in data[column]})
                metrics.update(evaluate_drift(pipe, reference, texts))
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
