"""Adds a task to a finished model; its encoder, its embedding and its other heads stay as they are, to the bit:

    python -m training.add_task MODEL training/recipes/add_irony.toml --output my-model

MODEL is a release folder, a checkpoint or a Hub id, and the output is of the same form. The encoder reads every text once;
what the new head reads of it is kept in memory, and the head trains on that, in minutes where training all takes hours.
The head of the epoch with the least validation loss is kept and its temperature fitted. In a release whose card is
rendered from results/, the card gains the new task's row: its test split, or the validation split if there is no other.

Of the recipe, `model.max_length`, the one task, `optimizer`, `run.seed` and `run.calibrate` are used. The model is MODEL,
whatever the recipe names as its encoder. What a release holds besides the model is carried over, except tests/, runs/
and hidden folders. What was made from the model by other means stays as it is: an ONNX file lacks the new task, and
the card's prose and examples do not speak of it.
"""

import argparse
import copy
import dataclasses
import json
import math
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, get_scheduler, set_seed
from transformers.modeling_outputs import BaseModelOutput

from configuration_multitask import SEQUENCE, TOKEN, WEIGHTS_INDEX, TaskSpec
from evaluation.calibrate import calibrate
from evaluation.evaluate import average, has_split, main_metric, measure, public_name, surroundings
from modeling_multitask import IGNORE_INDEX, MultiTaskModel, WeightsError, check_weight_map, pool
from pipeline_multitask import MultiTaskPipeline
from release.card import can_render, read, render_card
from release.export import export
from training.data import Example, load_task_split, make_batch, make_examples, pad_batch
from training.freezing import new_optimizer
from training.objectives import class_weights, classification_loss, hide_casing, label_counts
from training.recipe import Recipe, RecipeError, TaskRecipe
from training.sampler import passes
from training.train import TaskData, as_json, load_task, write_json
from training.trainer import TrainingError, run_schedule

FEATURE_BATCH = 64  # texts that the encoder reads at a time
REHEARSED_ROWS = 50  # are measured before the work starts, so that what measuring takes offence at is known then
MUCH_MEMORY = 4e9  # bytes of features from which on the user is told
NOT_CARRIED = ("tests", "runs", "__pycache__")
METRIC_NAMES = {  # the Hub's name of a metric, and the one in the card's table
    "macro_f1": ("f1", "macro F1"),
    "micro_f1": ("f1", "micro F1"),
    "macro_recall": ("recall", "macro recall"),
    "accuracy": ("accuracy", "accuracy"),
    "exact_match": ("exact_match", "exact match"),
    "spearman": ("spearmanr", "Spearman"),
    "pearson": ("pearsonr", "Pearson"),
}


# What is asked for


def new_task(recipe: Recipe) -> tuple[str, TaskRecipe]:
    """Returns the name and the recipe of the one task that is to be added.

    Raises:
        RecipeError: There are several, or it has no head.
    """
    if len(recipe.tasks) != 1:
        raise RecipeError(f"the recipe has the tasks {', '.join(recipe.tasks)}; one is added at a time: leave one in")
    ((name, task),) = recipe.tasks.items()
    if not task.has_head:
        raise RecipeError(
            f"tasks.{name}.kind is {task.kind!r}, which trains the embedding, and that stays as it is; allowed here: "
            f"{SEQUENCE}, {TOKEN}"
        )
    return name, task


def local_folder(model: str) -> Path:
    """Returns the folder of a model, which is fetched if `model` is a Hub id.

    Raises:
        ValueError: It is neither a folder nor can it be fetched.
    """
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(model))
    except (OSError, ValueError) as error:
        raise ValueError(f"MODEL is {model!r}; allowed: a folder, or a Hub id that can be fetched ({error})") from error


def is_release(folder: Path) -> bool:
    """Returns whether a model's folder has the release layout, and is no training checkpoint."""
    return (folder / WEIGHTS_INDEX).exists()


def stored_dtype(release: Path) -> torch.dtype:
    """Returns the one type in which a release stores its weights.

    Raises:
        ValueError: They have several, which the export cannot write again.
    """
    index = check_weight_map(json.loads((release / WEIGHTS_INDEX).read_text("utf-8")), WEIGHTS_INDEX)
    weights = [x for file in sorted(set(index.values())) for x in load_file(release / file).values()]
    dtypes = {x.dtype for x in weights if x.is_floating_point()}
    if len(dtypes) != 1:
        raise ValueError(
            f"{release} stores weights as {', '.join(sorted(map(str, dtypes)))}; allowed: a single type. Make a release of "
            "it with `python -m release.export` first."
        )
    return dtypes.pop()


def check_request(source: Path, model: MultiTaskModel, recipe: Recipe, output: Path) -> None:
    """Makes sure that nothing is in the way of the result.

    Raises:
        RecipeError: The model has a task of that name, or the output folder holds something.
    """
    name, _ = new_task(recipe)
    if name in model.config.tasks:
        raise RecipeError(
            f"tasks.{name}: {source} has a task of this name; taken are: {', '.join(model.config.tasks)}. Choose another name"
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RecipeError(f"--output {output} exists and is not empty; give a new folder")


# The data, and what the head reads of it


@dataclass
class NewTask:
    """A new task's data: tokenized examples, and what of the splits there is.

    Attributes:
        train: Examples, label names and facts of the train split.
        validation: Examples of the validation split; None if there is no such split.
        measured: The split that the finished model is measured on: "test" or "validation"; None if there is neither.
    """

    train: TaskData
    validation: list[Example] | None
    measured: str | None


def load_new_task(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> NewTask:
    """Returns the new task's data; what will be measured on is looked through as well, before any work starts.

    Raises:
        ValueError: A data set does not hold what the recipe says.
    """
    name, task = new_task(recipe)
    train = load_task(recipe, name, tokenizer)
    plain = dataclasses.replace(task, passage_rows=1)
    splits = [split for split in ("validation", "test") if has_split(task, split)]
    loaded = {
        split: make_examples(
            plain, load_task_split(task, split), train.labels, tokenizer, f"tasks.{name} ({task.dataset}, split {split})"
        )
        for split in splits
    }
    return NewTask(train, loaded.get("validation"), splits[-1] if splits else None)


def pooling_of(model: MultiTaskModel, name: str) -> str:
    """Returns how a head pools: in its own way, or in the model's."""
    return model.heads[name].spec.pooling_mode or model.config.pooling_mode


def reads_tokens(model: MultiTaskModel, name: str) -> bool:
    """Returns whether a head needs every token's vectors: for token labels, and if layers are mixed before a maximum.

    All other poolings are sums, so that mixing the pooled layers is the same as pooling the mixed tokens.
    """
    head, mode = model.heads[name], pooling_of(model, name)
    return head.spec.kind == TOKEN or (head.layer_weights is not None and mode == "max")


@torch.no_grad()  # no inference mode: the head's gradient needs ordinary tensors
def read_layers(model: MultiTaskModel, name: str, batch: dict[str, Tensor]) -> Tensor:
    """Returns what head `name` reads of a batch, float [B, K, T, H].

    K is 1, or L + 1 for a head that mixes all layers; T is 1 for pooled vectors.
    """
    head = model.heads[name]
    out = model(**batch, tasks=[], output_hidden_states=head.layer_weights is not None)
    layers = [out.last_hidden_state] if head.layer_weights is None else out.hidden_states
    if not reads_tokens(model, name):
        layers = [pool(layer, batch["attention_mask"], pooling_of(model, name)).unsqueeze(1) for layer in layers]
    return torch.stack(list(layers), dim=1)


# The head, without the encoder


class CachedHead:
    """A model's head on cached features: the encoder reads a text once, then it gives logits and losses without it.

    Args:
        model: The model, in evaluation mode.
        name: The head.
        task: Its recipe.
        weights: float [C], a factor per class, or None.
        pad_token_id: As for `make_batch`.
    """

    def __init__(
        self, model: MultiTaskModel, name: str, task: TaskRecipe, weights: Tensor | None, pad_token_id: int
    ) -> None:
        self.model, self.name, self.task, self.pad_token_id = model, name, task, pad_token_id
        self.head = model.heads[name]
        self.weights = None if weights is None else weights.to(model.device)

    def memory(self, examples: list[Example]) -> int:
        """Returns how many bytes the examples' features will take."""
        layers = 1 if self.head.layer_weights is None else len(self.head.layer_weights)
        tokens = reads_tokens(self.model, self.name)
        vectors = layers * sum(len(x["input_ids"]) if tokens else 1 for x in examples)
        return 4 * vectors * self.model.config.hidden_size

    def read(self, examples: list[Example], what: str) -> None:
        """Stores with every example, as `features`, what the head reads of it, float [K, T, H] on the CPU.

        Args:
            examples: Examples of one text each.
            what: Names them at the progress bar.
        """
        if (size := self.memory(examples)) > MUCH_MEMORY:
            print(f"Features take {size / 1e9:.1f} GB of memory; with tasks.{self.name}.limit fewer rows are read.")
        order = sorted(range(len(examples)), key=lambda i: -len(examples[i]["input_ids"]))
        for start in tqdm(range(0, len(order), FEATURE_BATCH), desc=f"reading the {what} texts", unit="batch"):
            chosen = [examples[i] for i in order[start : start + FEATURE_BATCH]]
            batch = pad_batch([x["input_ids"] for x in chosen], self.pad_token_id)
            layers = read_layers(self.model, self.name, {key: x.to(self.model.device) for key, x in batch.items()}).cpu()
            for example, found in zip(chosen, layers, strict=True):
                example["features"] = found[:, : len(example["input_ids"])].clone()  # without the batch's padding

    def logits(self, examples: list[Example], casing_ids: Tensor | None = None) -> Tensor:
        """Returns what the model's own forward gives, float [B, C] or [B, T, C]; padding gives something.

        Args:
            examples: Examples with `features`.
            casing_ids: int [B, T], see `MultiTaskModel.forward`.
        """
        features = [x["features"].transpose(0, 1).to(self.model.device) for x in examples]  # [T, K, H] each
        layers = pad_sequence(features, batch_first=True).unbind(dim=2)  # K times [B, T, H]
        mask = pad_sequence([torch.ones(len(x), dtype=torch.long, device=x.device) for x in features], batch_first=True)
        encoded = BaseModelOutput(last_hidden_state=layers[-1], hidden_states=layers)
        casing = torch.zeros_like(mask) if casing_ids is None else casing_ids
        # A pooled vector stands here as a text of one token, which every pooling gives back as it is.
        return self.model.head_logits(self.head, encoded, layers[-1][:, 0], mask, casing)

    def loss(self, examples: list[Example]) -> tuple[Tensor, int]:
        """Returns the mean loss over the examples' labels, and how many of them there are.

        While the head trains, the casing of some texts is hidden, as in the training of a whole model.
        """
        batch = make_batch(self.name, self.task.kind, examples, self.pad_token_id)
        labels, casing = batch["labels"].to(self.model.device), batch.get("casing_ids")
        if casing is not None:
            casing = (hide_casing(casing) if self.head.training else casing).to(self.model.device)
        logits = self.logits(examples, casing)
        loss = classification_loss(self.head.spec, logits, labels, self.task, self.weights)
        return loss, int((labels != IGNORE_INDEX).sum())

    @torch.no_grad()
    def mean_loss(self, examples: list[Example]) -> float:
        """Returns the mean loss over all labels of many examples, without dropout."""
        self.head.eval()
        size = self.task.batch_size
        found = [self.loss(examples[start : start + size]) for start in range(0, len(examples), size)]
        return sum(loss.item() * count for loss, count in found) / max(1, sum(count for _, count in found))


# Training


def step_of(cached: CachedHead, recipe: Recipe, steps: int) -> Callable[[list[Example]], float]:
    """Returns what takes a step of the optimizer on a batch and gives its loss; the learning rate follows the schedule."""
    cached.model.requires_grad_(False)
    cached.head.requires_grad_(True)
    parameters = list(cached.head.parameters())
    optimizer = new_optimizer(cached.model, recipe.optimizer)
    warmup = ceil(recipe.optimizer.warmup_ratio * steps)
    schedule = get_scheduler(run_schedule(recipe), optimizer, num_warmup_steps=warmup, num_training_steps=steps)

    def step(examples: list[Example]) -> float:
        cached.head.train()
        loss, _ = cached.loss(examples)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss of {cached.name!r} is {loss.item()}, nothing was written. Lower optimizer.learning_rate or "
                "optimizer.head_learning_rate, or look for broken values in the data."
            )
        loss.backward()
        if recipe.optimizer.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(parameters, recipe.optimizer.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def train_head(
    cached: CachedHead, examples: list[Example], validation: list[Example] | None, recipe: Recipe
) -> list[dict[str, float]]:
    """Trains the head and leaves it as it was after its best epoch; returns each epoch's losses.

    Args:
        cached: The head.
        examples: Training examples with `features`.
        validation: Those whose loss says which epoch is the best; None: the last one is kept.
        recipe: The recipe, of which the task is one.

    Raises:
        TrainingError: A loss was not finite.
    """
    once = ceil(len(examples) / cached.task.batch_size)
    steps = max(1, ceil(once * cached.task.epochs))
    step = step_of(cached, recipe, steps)
    lengths = [len(x["input_ids"]) for x in examples]
    batches = passes(lengths, cached.task.batch_size, random.Random(f"{recipe.run.seed} {cached.name}"))
    history, best, least = [], None, math.inf
    for start in range(0, steps, once):
        losses = [step([examples[i] for i in next(batches)]) for _ in range(min(once, steps - start))]
        epoch = {"loss": sum(losses) / len(losses)}
        if validation is not None:
            epoch["validation_loss"] = cached.mean_loss(validation)
            if epoch["validation_loss"] < least:
                best, least = copy.deepcopy(cached.head.state_dict()), epoch["validation_loss"]
        history.append(epoch)
        print(f"epoch {len(history)}: " + ", ".join(f"{key} {value:.4f}" for key, value in epoch.items()))
    if best is not None:
        cached.head.load_state_dict(best)
    return history


# The result


def write_model(model: MultiTaskModel, source: Path, output: Path) -> None:
    """Writes the model in the form that `source` has, with what else a release holds."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    if not is_release(source):
        model.save_pretrained(output)
        tokenizer.save_pretrained(output)
        return

    def left_out(folder: str, names: list[str]) -> list[str]:
        paths = [Path(folder, name) for name in names]
        hidden = [x for x in paths if x.is_dir() and (x.name.startswith(".") or (x / "pyvenv.cfg").exists())]
        return [x.name for x in paths if x in hidden or x.name in NOT_CARRIED or x.resolve() == output.resolve()]

    shutil.copytree(source, output, ignore=left_out, dirs_exist_ok=True)
    with tempfile.TemporaryDirectory() as checkpoint:
        model.save_pretrained(checkpoint)
        tokenizer.save_pretrained(checkpoint)
        export(checkpoint, output, stored_dtype(source))


def describe(name: str, task: TaskRecipe, spec: TaskSpec) -> dict[str, Any]:
    """Returns the new task's entry in results/tasks.json.

    Args:
        name: The task, which is also its title.
        task: Its recipe, with the data set's public name.
        spec: Its head.
    """
    dataset, _, subset = task.dataset.partition(":")
    dataset = dataset.partition("@")[0]  # a revision is no part of its name
    key = main_metric(task)
    kind, title = METRIC_NAMES.get(key, (key, key))
    if key == "f1":
        title = "entity F1" if spec.is_bio else "macro F1 of words"
    return {
        "title": name,
        "task_type": "token-classification" if task.kind == TOKEN else "text-classification",
        "dataset": dataset,
        **({"config": subset} if subset else {}),
        "dataset_name": f"{dataset} {subset}".strip(),
        "metrics": [{"key": key, "type": kind, "name": title}],
    }


def record(model: MultiTaskModel, recipe: Recipe, found: dict[str, Any], output: Path) -> None:
    """Adds the new task to a release's results, and renders its card again.

    Args:
        model: The model as written.
        recipe: The recipe, not changed by where local copies of its data set lie.
        found: What `measure` says of the task.
        output: The release, whose card can be rendered.
    """
    name, task = new_task(recipe)
    task = dataclasses.replace(task, dataset=public_name(task.dataset))
    recipe = dataclasses.replace(recipe, tasks={name: task})
    described, results = read("tasks", output), read("release", output)
    described[name] = describe(name, task, model.heads[name].spec)
    results["tasks"][name] = {**found, "added_by": {"recipe": as_json(recipe), **surroundings()}}
    results["parameters"] = sum(x.numel() for x in model.parameters())
    write_json(output / "results/tasks.json", described)
    write_json(output / "results/release.json", results)
    card = output / "README.md"
    card.write_text(render_card(card.read_text("utf-8"), output), "utf-8")


def train_new_task(model: MultiTaskModel, source: Path, recipe: Recipe) -> str | None:
    """Adds the recipe's task to a model and trains its head; returns the split that it can be measured on, if any.

    Raises:
        ValueError: The data set or the head is not as the recipe says.
        TrainingError: A loss was not finite.
    """
    name, task = new_task(recipe)
    tokenizer = AutoTokenizer.from_pretrained(source)
    limits = (recipe.model.max_length, tokenizer.model_max_length, model.max_length)
    tokenizer.model_max_length = min(limit for limit in limits if limit is not None)
    data = load_new_task(recipe, tokenizer)
    set_seed(recipe.run.seed)
    fields = {"kind": task.kind, "labels": data.train.labels, "loss_weight": task.loss_weight, **task.head}
    model.add_task(name, fields)
    model.eval()
    rehearse(model, tokenizer, recipe, data)
    cached = CachedHead(model, name, task, head_weights(model, recipe, data), tokenizer.pad_token_id or 0)
    cached.read(data.train.examples, "training")
    if data.validation is None:
        print(f"{task.dataset} has no validation split: the last epoch is kept, and no temperature is fitted.")
    else:
        cached.read(data.validation, "validation")
    train_head(cached, data.train.examples, data.validation, recipe)
    model.eval()
    return data.measured


def rehearse(model: MultiTaskModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, data: NewTask) -> None:
    """Measures the untrained head on a few rows: what would be wrong with measuring is known before the work starts.

    Raises:
        ValueError: The recipe's metric is none that is measured, or the data are not what the recipe says.
    """
    if data.measured is not None:
        pipe = MultiTaskPipeline(model=model, tokenizer=tokenizer, device=model.device)
        average(measure(pipe, recipe, data.measured, limit=REHEARSED_ROWS), recipe)


def head_weights(model: MultiTaskModel, recipe: Recipe, data: NewTask) -> Tensor | None:
    """Returns the new task's class weights, float [C], or None if the recipe asks for none."""
    name, task = new_task(recipe)
    spec = model.heads[name].spec
    if spec.problem_type == "regression":
        return None
    return class_weights(label_counts(spec, [x["labels"] for x in data.train.examples]), task.class_weights)


def add_task(source: Path, recipe: Recipe, output: Path, public: Recipe | None = None) -> MultiTaskModel:
    """Adds the recipe's task to a model and writes the result; returns the model as it was written.

    Args:
        source: The model's folder.
        recipe: The recipe.
        output: A new or empty folder.
        public: The recipe as it is without local copies of its data set, for the card; None: the same.

    Raises:
        RecipeError: The recipe does not fit the model, or the output folder holds something.
        ValueError: The data set or the head is not as the recipe says.
        TrainingError: A loss was not finite.
        WeightsError: The source is no whole model.
    """
    name, task = new_task(recipe)
    model = MultiTaskModel.from_pretrained(source)
    check_request(source, model, recipe, output)
    if is_release(source):
        stored_dtype(source)  # raises, if it must, before any work is done
    dtype, device = model.dtype, "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device=device, dtype=torch.float32)
    split = train_new_task(model, source, recipe)
    tokenizer = AutoTokenizer.from_pretrained(source)
    if recipe.run.calibrate:
        calibrate(model, tokenizer, recipe)
    write_model(model.to(device="cpu", dtype=dtype), source, output)
    written = MultiTaskModel.from_pretrained(output)  # with the new head as exactly as it is stored
    if split is None:
        print(f"{task.dataset} has neither a test nor a validation split: nothing was measured, and the card has no row.")
        return written
    pipe = MultiTaskPipeline(model=written, tokenizer=tokenizer, device=device)
    found = measure(pipe, recipe, split, intervals=True)[name]
    print(f"{name}, {split} split: {json.dumps(found['metrics'])}")
    if can_render(output):
        record(written, public or recipe, found, output)
    else:
        print(f"{output} has no card with a table of results/release.json: none is written.")
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="release folder, checkpoint folder or Hub id")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--data", type=Path, help="folder with a copy of the data set, under the recipe's `folder` name")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a setting of the recipe"
    )
    args = parser.parse_args()
    try:
        recipe = Recipe.read(args.recipe, args.data, overrides=args.set)
        public = Recipe.read(args.recipe, overrides=args.set)
        add_task(local_folder(args.model), recipe, args.output, public)
    except (TrainingError, WeightsError, ValueError, OSError) as error:
        sys.exit(str(error))
    print(f"{args.output} holds the model with its new task")


if __name__ == "__main__":
    main()
