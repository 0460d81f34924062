"""Trains a multi-task sentence transformer: `python -m training.train training/recipes/release.toml --output runs/release`.

Every batch is of one task; tasks share the encoder. The run folder then holds:

    recipe.json       the recipe as it was run
    run.json          command, revision, libraries, hardware, and of each data set its rows and fingerprint
    checkpoint-*/     what --resume continues from
    final/            the trained model and its tokenizer, for release.export
    metrics.json      what the validation splits gave at the end, and the steps and seconds of training, resumed or not
    history.json      losses and metrics over the run, and curves.png, their picture
"""

import argparse
import dataclasses
import json
import os
import shutil
import sys
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase, set_seed

from common.data import (
    DataError,
    Example,
    encode,
    has_split,
    hash_columns,
    load_task_split,
    make_examples,
    rewritten,
    task_labels,
    text_ids,
)
from common.files import environment_info, write_json
from common.recipe import Recipe, RecipeError, TaskRecipe
from configuration_multitask import MultiTaskConfig
from evaluation.calibrate import calibrate
from evaluation.evaluate import average, measure
from evaluation.plots import learning_curves
from modeling_multitask import IGNORE_INDEX, MultiTaskModel
from pipeline_multitask import MultiTaskPipeline
from training.average import average as merge
from training.freezing import UnfreezeOnSchedule, freeze, new_optimizer
from training.objectives import Objective
from training.projection import principal_axes
from training.sampler import BatchPlan, Stream
from training.trainer import COMPLETE, MultiTaskTrainer, TrainingError, newest_checkpoint, training_arguments

REHEARSED_ROWS = 100  # of each validation split
PROJECTION_TEXTS = 10_000  # enough to estimate the principal components of their vectors


def load_streams(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, Stream], dict[str, list[str]], dict[str, Any]]:
    """Returns the run's data sets by name, the label names of each task with a head, and what to note of each data set.

    Data sets that several tasks name alike become one stream, so that one pass over a text trains all their heads. A
    DataError lists all that is not what the recipe says, with split, row and field.
    """
    streams: dict[str, Stream] = {}
    labels: dict[str, list[str]] = {}
    facts, same, problems = {}, {}, []
    for name, task in recipe.tasks.items():
        for key, part in task.parts(name).items():
            try:
                names, examples, facts[key] = load_part(recipe, key, part, tokenizer)
            except ValueError as error:
                problems.append(str(error))
                continue
            if part.has_head:
                labels[name] = names
            place = json.dumps([part.dataset, part.text_columns, part.splits, part.limit, part.passage_rows])
            stream = streams.setdefault(same.setdefault(place, key), Stream({}, [{**x, "labels": {}} for x in examples]))
            stream.add(name, part, [x["labels"] for x in examples])
            if part.rewrites:
                stream.rewrite = partial(rewritten, labels=names, tokenizer=tokenizer)
    problems = problems or [f"tasks.{name}: {x}" for name in labels if (x := label_problem(name, streams))]
    if problems:
        raise DataError("\n".join(problems))
    return streams, labels, facts


def label_problem(name: str, streams: dict[str, Stream]) -> str | None:
    """Returns why the labels of a task's training rows teach a head nothing, or None."""
    given = [example["labels"][name] for x in streams.values() if name in x.tasks for example in x.examples]
    flat = torch.cat([torch.as_tensor(x, dtype=torch.float32).reshape(-1) for x in given])
    distinct = flat[(flat != IGNORE_INDEX) & ~flat.isnan()].unique()
    if len(distinct) > 1:
        return None
    found = "have no label" if not len(distinct) else f"have the same label, number {distinct.item():g}"
    return f"all rows of the train split {found}; there is nothing to learn. Look at label_column, mapping and limit."


def load_part(
    recipe: Recipe, key: str, part: TaskRecipe, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[str], list[Example], dict[str, Any]]:
    """Returns a task's label names (none without a head), its training examples from one data set, and what to note of it."""
    data = load_task_split(part, "train")
    if part.limit is not None and part.limit < len(data):
        chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(recipe.run.seed))[: part.limit]
        data = data.select(sorted(chosen.tolist()))
    labels = task_labels(part, data)
    where = f"tasks.{key} ({part.dataset}, split {part.splits.get('train', 'train')})"
    examples = make_examples(part, data, labels, tokenizer, where)
    longest = tokenizer.model_max_length
    cut = sum(any(len(ids) >= longest for ids in text_ids(example)) for example in examples)  # each may have lost its end
    if cut:
        print(f"{where}: {cut:,} of {len(examples):,} examples fill all {longest} tokens; no more is read.")
    return labels, examples, {"rows": len(data), "sha256": hash_columns(data, part.columns), "cut": cut}


def new_model(recipe: Recipe, labels: dict[str, list[str]]) -> tuple[MultiTaskModel, Any]:
    """Returns a model whose encoder has the pretrained weights and whose heads are random, and the pretrained encoder.

    Raises:
        RecipeError: The recipe asks of the encoder what it does not have, or its earlier model is another one.
    """
    encoder = AutoModel.from_pretrained(recipe.model.encoder, dtype=torch.float32)
    tasks = recipe.tasks
    specs = {name: {"kind": tasks[name].kind, "labels": names, **tasks[name].head} for name, names in labels.items()}
    own = ("tasks", "architectures", "num_task_layers")
    fields = {name: value for name, value in encoder.config.to_dict().items() if name not in own}
    options = {name: getattr(recipe.model, name) for name in ("pooling_mode", "embedding_dim", "num_task_layers")}
    try:
        model = MultiTaskModel(MultiTaskConfig(**{**fields, **options, "tasks": specs}))
    except ValueError as error:
        raise RecipeError(f"model: {error}") from error
    if model.max_length is not None and recipe.model.max_length > model.max_length:
        raise RecipeError(f"model.max_length is {recipe.model.max_length}; this encoder takes {model.max_length} tokens")
    width = recipe.model.embedding_dim or model.config.hidden_size
    if too_long := [dim for dim in recipe.model.matryoshka_dims if dim > width]:
        raise RecipeError(f"model.matryoshka_dims holds {too_long}; the embedding has {width} dimensions")
    model.encoder.load_state_dict(encoder.state_dict())
    model.reset_branch()
    if recipe.model.start is not None:
        try:
            merge(MultiTaskModel.from_pretrained(recipe.model.start), model, 0.0, apart=("linear.",))
        except ValueError as error:
            raise RecipeError(f"model.start is {recipe.model.start!r}: {error}") from error
    for module in (*model.encoder.modules(), *(model.task_branch.modules() if model.task_branch else ())):
        if isinstance(module, torch.nn.Dropout) and recipe.model.encoder_dropout is not None:
            module.p = recipe.model.encoder_dropout  # not in the configuration: it is a matter of this run
    return model, encoder.eval()


def start_projection(model: MultiTaskModel, encoder: Any, recipe: Recipe, streams: dict[str, Stream], pad: int) -> None:
    """Sets the projection to that of the recipe's file, or to the principal components of the starting encoder's vectors."""
    if recipe.model.projection is not None:
        try:
            model.linear.load_state_dict({"weight": load_file(recipe.model.projection)["linear.weight"]})
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            place = f"model.projection is {recipe.model.projection!r}"
            raise RecipeError(f"{place}, no file of this projection: {error}") from error
        return
    rows = [ids for x in streams.values() for example in x.examples for ids in text_ids(example)]
    chosen = torch.randperm(len(rows))[:PROJECTION_TEXTS].tolist()
    vectors = encode(encoder, [rows[i] for i in chosen], model.config.pooling_mode, pad)
    axes = principal_axes(vectors, model.config.embedding_dim)
    model.linear.weight.data[: len(axes)] = axes  # fewer than the embedding's dimensions, if it is wider than the encoder


def add_targets(streams: dict[str, Stream], recipe: Recipe, encoder: Any, pad_token_id: int) -> None:
    """Stores with every example, as `target`, the teacher's vector of each of its texts."""
    losses, width = recipe.losses, encoder.config.hidden_size
    teacher = None if losses.teacher is None else SentenceTransformer(losses.teacher)
    for name, x in streams.items():
        rows = [ids for example in x.examples for ids in text_ids(example)]
        if teacher is None:
            vectors = encode(encoder, rows, recipe.model.pooling_mode, pad_token_id, what=f"vectors to keep, {name}")
        else:
            texts = [example["text"] for example in x.examples]
            texts = texts if isinstance(texts[0], str) else list(chain(*texts))
            vectors = torch.from_numpy(teacher.encode(texts, show_progress_bar=True))
        if losses.preserve_mode != "similarity" and vectors.shape[1] not in (width, recipe.model.embedding_dim):
            raise RecipeError(
                f"losses.teacher has vectors of {vectors.shape[1]} dimensions; preserve_mode {losses.preserve_mode!r} needs the "
                f"encoder's {width} or model.embedding_dim. Use preserve_mode = 'similarity', which compares any dimensions."
            )
        sides = len(text_ids(x.examples[0]))
        for example, target in zip(x.examples, vectors.view(-1, sides, vectors.shape[1]), strict=True):
            example["target"] = target


def preflight(model: MultiTaskModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> None:
    """Reads the validation splits and measures the untrained model on a part of them.

    So a ValueError says what is wrong with them, with a metric or with measuring before the work starts.
    """
    for name, task in recipe.parts.items():
        if not has_split(task, "validation"):
            print(f"tasks.{name}: {task.dataset} has no validation split; it is not measured, and no part of the average.")
            continue
        data = load_task_split(task, "validation")
        make_examples(task, data, task_labels(task, data), tokenizer, f"tasks.{name} ({task.dataset}, validation split)")
    short = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, validation_rows=REHEARSED_ROWS))
    if "average" not in validate(model, tokenizer, short) and recipe.run.evaluations:
        raise RecipeError(f"run.evaluations is {recipe.run.evaluations}, and no task's data set has a validation split")


def validate(model: MultiTaskModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> dict[str, float]:
    """Returns the metrics of the validation splits as "<task>_<metric>", and the "average" of the main ones if there are any."""
    pipe = MultiTaskPipeline(model=model, tokenizer=tokenizer, device=model.device)
    found = measure(pipe, recipe, "validation", limit=recipe.run.validation_rows)
    metrics = {f"{name}_{key}": value for name, x in found.items() for key, value in x["metrics"].items()}
    return {**metrics, "average": average(found, recipe)} if found else metrics


def new_trainer(recipe: Recipe, output: Path) -> tuple[MultiTaskTrainer, dict[str, Any]]:
    """Returns a trainer that is ready to run, and what to note of its data sets.

    Raises:
        RecipeError: The recipe does not fit its encoder or its data.
        ValueError: A data set does not hold what the recipe says.
    """
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.encoder, model_max_length=recipe.model.max_length)
    if tokenizer.pad_token_id is None:
        raise RecipeError(
            f"the tokenizer of {recipe.model.encoder} has no padding token; set its pad_token and save it again"
        )
    streams, labels, facts = load_streams(recipe, tokenizer)
    set_seed(recipe.run.seed)
    model, encoder = new_model(recipe, labels)
    batches = BatchPlan(streams, recipe.sampling, tokenizer.pad_token_id, recipe.run.seed)
    args = training_arguments(output, recipe, len(batches) // recipe.sampling.gradient_accumulation_steps)
    encoder.to(args.device)
    if model.linear is not None:
        start_projection(model, encoder, recipe, streams, tokenizer.pad_token_id)
    if recipe.losses.preserve_weight:
        add_targets(streams, recipe, encoder, tokenizer.pad_token_id)
    adapters = freeze(model, recipe.freezing)
    objective = Objective(streams, recipe, model.config.task_specs)
    trainer = MultiTaskTrainer(
        model=model,
        args=args,
        train_dataset=batches,
        eval_dataset=batches if recipe.run.evaluations else None,  # asked for by the Trainer; the evaluator reads its own
        data_collator=lambda items: items[0],  # an item of the plan is a whole batch
        processing_class=tokenizer,
        optimizers=(new_optimizer(model, recipe.optimizer, objective.loss_weights), None),
        callbacks=[UnfreezeOnSchedule(model, recipe.freezing)],
        objective=objective,
        adapters=adapters,
        evaluator=lambda: validate(model, tokenizer, recipe),
    )
    return trainer, facts


def check_folder(output: Path, recipe: Recipe, resume: bool) -> Path | None:
    """Returns the checkpoint to continue from, after making sure that the folder holds this run, unfinished, or none.

    Checkpoints that were cut short while they were written are removed.
    """
    path = output / "recipe.json"
    if not path.exists():
        if resume:
            raise RecipeError(f"{output} holds no run to resume; drop --resume, or correct --output")
        return None
    if not resume:
        raise RecipeError(f"{output} holds a run already; continue it with --resume, or give another --output")
    stored = json.loads(path.read_text("utf-8"))
    if keys := sorted({key for key, _ in _flat(dataclasses.asdict(recipe)) ^ _flat(stored)}):
        raise RecipeError(f"{output} holds the run of another recipe; these settings differ: {', '.join(keys)}")
    if (output / "metrics.json").exists():
        raise RecipeError(f"{output} holds this run, and it is finished; there is nothing to resume")
    for folder in output.glob("checkpoint-*"):
        if not (folder / COMPLETE).exists():
            print(f"{folder} was cut short while it was written, and is removed.")
            shutil.rmtree(folder)
    return newest_checkpoint(output)


def _flat(fields: dict[str, Any], place: str = "") -> set[tuple[str, str]]:
    """Returns all settings as (key, value); where data sets and encoder lie is left out, they may have moved."""
    found = set()
    for key, value in fields.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{place}{key}.")
        elif key not in ("dataset", "encoder", "start", "teacher"):
            found.add((place + key, json.dumps(value)))
    return found


def train(recipe: Recipe, output: Path, resume: bool = False) -> MultiTaskModel:
    """Trains and returns a model, and fills the run folder `output`; with `resume`, it continues from its newest checkpoint.

    Raises:
        RecipeError: The recipe cannot be run here, or another process is training in the folder.
        ValueError: A data set does not hold what the recipe says.
        TrainingError: A loss or a weight was no longer finite.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise RecipeError("training runs in one process, on one GPU at most; start it without torchrun")
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(output.parent / f".{output.name}.lock").acquire(timeout=0)
    except Timeout as error:
        raise RecipeError(f"{output}: another process is training there; wait for it, or give another --output") from error
    with lock:
        checkpoint = check_folder(output, recipe, resume)
        trainer, facts = new_trainer(recipe, output)
        preflight(trainer.model, trainer.processing_class, recipe)
        before = facts if checkpoint is None else json.loads((output / "run.json").read_text("utf-8"))["data"]
        if changed := ", ".join(name for name, x in facts.items() if before.get(name) != x):
            raise RecipeError(f"{output} was started on other data: the train split of {changed} has changed since")
        sizes = {
            "parameters": sum(x.numel() for x in trainer.model.parameters()),
            "trained": sum(x.numel() for x in trainer.model.parameters() if x.requires_grad),  # at some time
        }
        write_json(output / "recipe.json", dataclasses.asdict(recipe))
        write_json(output / "run.json", {"command": sys.argv, **sizes, "data": facts, **environment_info()})
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finish(trainer, recipe, output)
    return trainer.model


def finish(trainer: MultiTaskTrainer, recipe: Recipe, output: Path) -> None:
    """Merges adapters, fits temperatures, and writes the trained model, its metrics and the run's history."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # measured as it will be used
    tokenizer = trainer.processing_class
    if trainer.adapters is not None:
        trainer.adapters.merge_and_unload()
    tokenizer.save_pretrained(output / "final")
    model.save_pretrained(output / "final")
    if recipe.run.calibrate:
        calibrate(model, tokenizer, recipe)
        model.save_pretrained(output / "final")
    history = trainer.state.log_history
    write_json(output / "history.json", history)
    learning_curves(history, output / "curves.png")
    metrics = validate(model, tokenizer, recipe)
    totals = {"seconds": round(history[-1]["seconds"]), "steps": trainer.state.global_step}
    write_json(output / "metrics.json", {**totals, **metrics})
    mean = metrics.get("average")
    measured = "nothing to validate on" if mean is None else f"average of the validation splits {mean:.4f}"
    print(f"{output}/final holds the trained model; {measured}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="the run folder")
    parser.add_argument("--data", type=Path, help="folder with copies of the data sets, under the recipe's `folder` names")
    parser.add_argument("--encoder", help="folder or Hub id to start from instead of the recipe's")
    parser.add_argument("--only", nargs="+", metavar="TASK", help="train these tasks of the recipe alone")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a setting")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in the run folder")
    args = parser.parse_args()
    try:
        train(Recipe.read(args.recipe, args.data, args.encoder, args.set, args.only or ()), args.output, args.resume)
    except (RecipeError, DataError, TrainingError, OSError, SafetensorError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
