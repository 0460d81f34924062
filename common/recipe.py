"""Recipes: one TOML file describes a training run; `Recipe.read` checks all of it and reports every problem at once."""

import dataclasses
import json
import re
import tomllib
import typing
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from configuration_multitask import check_task_name
from tasks_multitask import TOKEN, TaskSpec

SCORED_PAIRS = "scored_pairs"  # the kind of task that trains the embedding, and has no head
GRADIENT_SURGERY = "pcgrad"
Rewrite = Literal["lower", "upper", "title", "bare"]  # how else a training text may be written
REWRITES = typing.get_args(Rewrite)
NO_LABEL = ""  # what a data set's label is mapped to if its rows have no label for this task

Count = Annotated[int, Field(ge=1)]
Number = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
CONFIG = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class RecipeError(ValueError):
    """A recipe cannot be used; the message lists every problem with its place in the file."""


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class ModelRecipe:
    """The model: a pretrained encoder (Hub id or folder), how it pools, and the embedding's width.

    Attributes:
        encoder: Hub id or folder of the encoder to start from.
        max_length: Tokens of a text that are read in training, special tokens included.
        pooling_mode: One of `POOLING_MODES`.
        embedding_dim: Dimension of the projected embedding; left out: no projection.
        projection: File that holds the projection as `linear.weight`, see `training.projection`; left out: the principal
            components of the training texts' vectors.
        start: Hub id or folder of an earlier model with the same tasks, labels and layers, whose branch and heads training
            continues from; left out: the branch starts as a copy of the encoder's layers, heads at random.
        num_task_layers: Layers of the task branch, see `MultiTaskConfig`. Above 0, the encoder and the projection are
            frozen: the tasks train the branch and the heads.
        matryoshka_dims: Prefix lengths of the embedding that embedding tasks train as well (Kusupati et al. 2022, Matryoshka
            representation learning).
        encoder_dropout: Dropout inside the layers that train, in [0, 1); left out: the encoder's own. Frozen layers have none.
    """

    encoder: str
    max_length: Annotated[int, Field(ge=3)]
    pooling_mode: str = "mean"
    embedding_dim: int | None = None
    projection: str | None = None
    start: str | None = None
    num_task_layers: Annotated[int, Field(ge=0)] = 0
    matryoshka_dims: list[Count] = Field(default_factory=list)
    encoder_dropout: Share | None = None


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class SourceRecipe:
    """How a data set is read, whether it is a task's only one or one of several.

    Attributes:
        dataset: Hub id, with its subset after a colon, or folder.
        text_columns: The column of texts (or of tokens), or the two of a pair.
        label_column: The column of labels, tags or scores.
        folder: Name of the data set's local copy under the command line's --data.
        splits: The data set's own names of the splits "train", "validation" and "test", where they differ.
        mapping: The data set's label names (for entities: its types) to the task's; "" for rows that then have no label, or
            for types that are not entities. Left out: the names are the task's own. Where the column holds a list and the task
            one label, rows whose labels map to different ones have none.
        unsaid: Types of entities that this data set never marks, so that their absence means nothing: the loss takes the
            probability of an "O" as that of "O" or any of them.
        limit: Maximum number of rows of the train split, sampled with the run's seed.
        passage_rows: Token tasks: number of consecutive rows that are also joined into one passage, so that the head learns
            from longer texts as well.
        epochs: How often each example is seen in sampling mode "epochs"; in other modes, the task's share of the run's length.
    """

    dataset: str = ""
    text_columns: list[str] = Field(default_factory=list)
    label_column: str = ""
    folder: str | None = None
    splits: dict[Literal["train", "validation", "test"], str] = Field(default_factory=dict)
    mapping: dict[str, str] = Field(default_factory=dict)
    unsaid: list[str] = Field(default_factory=list)
    limit: Count | None = None
    passage_rows: Count = 1
    epochs: Annotated[float, Field(gt=0)] = 1.0


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class TaskRecipe(SourceRecipe):
    """One task: its data set and columns, how much of it is seen, and its loss.

    Attributes:
        kind: A head's kind, or "scored_pairs", which trains the embedding to rank pairs by their scores (CoSENT).
        labels: Label names in the order of the data set's ids, if the data set does not declare them.
        datasets: Several data sets in place of one, by name; the task then gives its `labels`, and none of the fields that
            say how one data set is read. A data set that several tasks share trains their heads together, in one pass over
            its texts.
        rewrites: Augmentation: shares of the training texts that are seen in "lower", "upper" or "title" case, or "bare",
            without their final punctuation; sampled again in each epoch.
        batch_size: Texts (or pairs) in one batch.
        loss_weight: Factor of this task's loss.
        class_weights: "none", "inverse_frequency" or "effective_number" (Cui et al. 2019).
        focal_gamma: Exponent of the focal loss (Lin et al. 2017); 0: cross-entropy.
        metric: The validation metric; left out: the usual one of the kind.
        head: Further fields of the head's `TaskSpec`.
    """

    kind: Literal["sequence_classification", "token_classification", "scored_pairs"]
    labels: list[str] | None = None
    datasets: dict[str, SourceRecipe] = Field(default_factory=dict)
    rewrites: dict[Rewrite, Number] = Field(default_factory=dict)
    batch_size: Count = 32
    loss_weight: Number = 1.0
    class_weights: Literal["none", "inverse_frequency", "effective_number"] = "none"
    focal_gamma: Number = 0.0
    metric: str | None = None
    head: dict[str, Any] = Field(default_factory=dict)

    def parts(self, name: str) -> dict[str, "TaskRecipe"]:
        """Returns the same task on each of its data sets alone, by "<task>/<data set>"; on a single one, itself by its name."""
        if not self.datasets:
            return {name: self}
        return {f"{name}/{key}": dataclasses.replace(self, datasets={}, **vars(part)) for key, part in self.datasets.items()}

    @property
    def has_head(self) -> bool:
        """Whether the task has a head, and does not train the embedding itself."""
        return self.kind != SCORED_PAIRS

    @property
    def columns(self) -> list[str]:
        """The columns of its data set that are read."""
        return [*self.text_columns, self.label_column]


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class SamplingRecipe:
    """Which task a batch is of.

    Attributes:
        mode: "epochs" (each task exactly its own number of epochs, shuffled), or drawn at each step: "proportional" to
            the task's batches, their number to the power of 1/"temperature", "uniform", or "annealed" from proportional to
            nearly uniform (Stickland and Murray 2019).
        temperature: Of the mode "temperature", at least 1; 1 is proportional.
        batches: Batches of the whole run; left out: as many as mode "epochs" has. Not for mode "epochs".
        gradient_accumulation_steps: Batches, of any tasks, per optimizer step.
    """

    mode: Literal["epochs", "proportional", "temperature", "uniform", "annealed"] = "epochs"
    temperature: Annotated[float, Field(ge=1)] = 2.0
    batches: Count | None = None
    gradient_accumulation_steps: Count = 1


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class LossesRecipe:
    """How the tasks' losses are weighted, and how the embedding is preserved.

    Attributes:
        weighting: "fixed" (each task's `loss_weight`), or besides it "uncertainty" (Kendall et al. 2018) or "pcgrad",
            gradient surgery over the step's tasks (Yu et al. 2020), which needs torchjd.
        preserve_weight: Factor of the loss that holds every text's vectors to the teacher's.
        preserve_mode: "cosine": each pooled vector on its own; "similarity": the similarities between the embeddings of
            a batch; "both": the sum.
        teacher: Hub id or folder of the sentence transformer that is followed; left out: the starting encoder.
    """

    weighting: Literal["fixed", "uncertainty", "pcgrad"] = "fixed"
    preserve_weight: Number = 0.0
    preserve_mode: Literal["cosine", "similarity", "both"] = "cosine"
    teacher: str | None = None


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class FreezingRecipe:
    """What of the encoder is trained, and when.

    Attributes:
        freeze: What never trains: "nothing", "word_embeddings", all "embeddings" or the whole "encoder", which is the only
            choice with `model.num_task_layers`. Left out: "encoder" there, else "nothing".
        num_frozen_layers: Number of lowest layers that stay frozen, together with all embeddings.
        gradual: Whether layers start to train one after the other, from the top, over the first half of the run
            (Howard and Ruder 2018).
        linear_probe_ratio: Share of the run, in [0, 1), in which only heads and projection train (Kumar et al. 2022, linear
            probe, then fine-tune).
        lora_rank: If above 0, the encoder trains through low-rank adapters of this rank (Hu et al. 2022), which are
            merged into its weights at the end.
    """

    freeze: Literal["nothing", "word_embeddings", "embeddings", "encoder"] | None = None
    num_frozen_layers: Annotated[int, Field(ge=0)] = 0
    gradual: bool = False
    linear_probe_ratio: Share = 0.0
    lora_rank: Annotated[int, Field(ge=0)] = 0


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class GroupRecipe:
    """Parameters whose names match a regular expression (`re.search`), and their learning rate."""

    pattern: str
    learning_rate: Number


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class OptimizerRecipe:
    """AdamW; after the warm-up, rates fall to zero along a line.

    Attributes:
        learning_rate: Of the encoder's top layer and the projection.
        head_learning_rate: Of the heads; left out: `learning_rate`.
        layer_decay: Factor in (0, 1] by which each lower layer's rate is smaller than the next one's.
        weight_decay: Of matrices; biases and norms do not decay.
        warmup_ratio: Share of the run in which rates rise from zero.
        groups: Rates of parameters by name; the first pattern that matches wins, before all rules above.
    """

    learning_rate: Number
    head_learning_rate: Number | None = None
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    weight_decay: Number = 0.01
    warmup_ratio: Share = 0.06
    groups: list[GroupRecipe] = Field(default_factory=list)


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class RunRecipe:
    """The run itself.

    Attributes:
        seed: Of heads, dropout, sampling and the order of batches.
        evaluations: How many times the validation splits are measured; the checkpoint with the best average is kept.
        validation_rows: Rows of each validation split that are measured then; left out: all.
        calibrate: Whether each head's temperature is fitted on the validation split at the end.
        precision: "float32" or "bfloat16" (by autocast).
        save_steps: Steps between checkpoints.
    """

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 13
    evaluations: Annotated[int, Field(ge=0)] = 0
    validation_rows: Count | None = None
    calibrate: bool = True
    precision: Literal["float32", "bfloat16"] = "float32"
    save_steps: Count = 500


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Recipe:
    """A training run."""

    model: ModelRecipe
    tasks: dict[str, TaskRecipe]
    optimizer: OptimizerRecipe
    sampling: SamplingRecipe = Field(default_factory=SamplingRecipe)
    losses: LossesRecipe = Field(default_factory=LossesRecipe)
    freezing: FreezingRecipe = Field(default_factory=FreezingRecipe)
    run: RunRecipe = Field(default_factory=RunRecipe)

    @classmethod
    def read(
        cls,
        path: str | Path,
        data: Path | None = None,
        encoder: str | None = None,
        overrides: Iterable[str] = (),
        only: Iterable[str] = (),
    ) -> "Recipe":
        """Returns the checked recipe of a TOML file.

        Args:
            path: The file.
            data: If given, data sets are read from the folders there that the tasks' `folder` keys name.
            encoder: If given, the encoder to start from in place of the file's.
            overrides: Settings of the form "section.key=value", the value written as in TOML; a bare word is a string.
            only: Names of the tasks to keep; what does not fit the others is then no problem. Empty: all.

        Raises:
            RecipeError: Keys are unknown, missing or of a wrong type or value, a task is not there, or the file is not TOML.
        """
        try:
            fields = tomllib.loads(Path(path).read_text("utf-8"))
        except (OSError, RecursionError, ValueError) as error:
            raise RecipeError(f"{path} cannot be read: {error}") from error
        for setting in overrides:
            _override(fields, setting)
        if encoder and isinstance(fields.setdefault("model", {}), dict):
            fields["model"]["encoder"] = encoder
        if only := list(only):
            tasks = fields.get("tasks", {})
            if unknown := [name for name in only if name not in tasks]:
                raise RecipeError(f"no task {unknown}; the recipe's tasks are: {', '.join(tasks)}")
            fields["tasks"] = {name: tasks[name] for name in only}
        return cls.build(fields, str(path), data)

    @classmethod
    def build(cls, fields: dict[str, Any], source: str, data: Path | None = None) -> "Recipe":
        """Returns the checked recipe of parsed TOML; `source` names it in errors.

        Raises:
            RecipeError: Keys are unknown, missing or of a wrong type or value.
        """
        try:
            # As JSON, strictness allows tables for sections; what TOML alone has (dates) fits no key in any form.
            recipe = TypeAdapter(cls).validate_json(json.dumps(fields, default=str))
            problems = _check_values(recipe, data)
        except ValidationError as error:
            problems = [describe(x, cls) for x in error.errors()]
        if problems:
            raise RecipeError("\n  ".join([f"{source}:", *problems]))
        if data is None:
            return recipe
        tasks = {}
        for name, task in recipe.tasks.items():
            place = "" if task.datasets else str(data / str(task.folder))
            parts = {key: dataclasses.replace(x, dataset=str(data / str(x.folder))) for key, x in task.datasets.items()}
            tasks[name] = dataclasses.replace(task, dataset=place, datasets=parts)
        return dataclasses.replace(recipe, tasks=tasks)

    @property
    def parts(self) -> dict[str, TaskRecipe]:
        """Every task on each of its data sets alone, see `TaskRecipe.parts`."""
        return {key: part for name, task in self.tasks.items() for key, part in task.parts(name).items()}


def _override(fields: dict[str, Any], setting: str) -> None:
    """Puts one "section.key=value" into the parsed file."""
    path, equals, text = setting.partition("=")
    *sections, key = path.strip().split(".")
    if not equals or not sections or not all((*sections, key)):
        raise RecipeError(f"--set {setting}: it must have the form section.key=value, such as run.seed=7")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except ValueError:  # no TOML, or a number of thousands of digits
        value = text.strip()
    for section in sections:
        fields = fields.setdefault(section, {})
        if not isinstance(fields, dict):
            raise RecipeError(f"--set {setting}: {section} is not a section")
    fields[key] = value


# Keys of earlier releases, and what they are called now.
_RENAMED = {
    "prefix_dims": "matryoshka_dims",
    "tasks_per_step": "gradient_accumulation_steps",
    "first_layers": "num_frozen_layers",
    "probe_ratio": "linear_probe_ratio",
}


def describe(error: Any, kind: Any) -> str:
    """Returns one of pydantic's errors on a dataclass `kind` in a line that names the key, the value and what is allowed."""
    loc = [x for x in error["loc"] if x != "[key]"]
    place = "".join(f"[{x}]" if isinstance(x, int) else f".{x}" for x in loc).removeprefix(".")
    if error["type"] == "missing":
        return f"{place} is missing"
    if error["type"] != "unexpected_keyword_argument":
        wanted = re.sub("^(Input|String) should", "it must", error["msg"])
        return f"{place} is {error['input']!r}; {wanted}" if place else wanted
    for step in loc[:-1]:
        is_section = dataclasses.is_dataclass(kind)
        kind = typing.get_type_hints(kind)[str(step)] if is_section else typing.get_args(kind)[-1]
    known = [x.name for x in dataclasses.fields(kind)]
    if (renamed := _RENAMED.get(str(loc[-1]))) in known:
        return f"{place} is now called {renamed}; rename it in the recipe"
    return f"{place} is unknown; known keys: {', '.join(known)}"


def _found(*checks: tuple[object, str]) -> list[str]:
    """Returns the messages of the checks that found something, each given as (finding, message)."""
    return [message for finding, message in checks if finding]


def _check_values(recipe: Recipe, data: Path | None) -> list[str]:
    """Returns a line for each value that has the right type and is still not allowed."""
    problems = _found((not recipe.tasks, "tasks is empty; a run needs at least one task"))
    for name, task in recipe.tasks.items():
        check = _datasets_problems if task.datasets else _dataset_problems
        problems += [f"tasks.{name}.{x}" for x in check(task, data is not None) + _head_problems(task)]
        if name in ("loss", "drift"):
            problems.append(f"tasks has the task name {name!r}, under which training reports something else")
        try:
            check_task_name(name)
        except ValueError as error:
            problems.append(str(error))
    return problems + _contradictions(recipe)


def _dataset_problems(task: TaskRecipe, needs_folder: bool) -> list[str]:
    """Returns what is wrong with a task's only data set, or one of them as `TaskRecipe.parts` gives it."""
    rows, needed = task.passage_rows, 1 if task.has_head else 2
    if not task.dataset:
        return ["dataset is missing; name one, or several under `datasets`"]
    return _mapping_problems(task) + _found(
        (len(task.text_columns) != needed, f"text_columns is {task.text_columns}; a {task.kind} task needs {needed}"),
        (not task.label_column, "label_column is missing; name the column of labels, tags or scores"),
        (rows > 1 and task.kind != TOKEN, f"passage_rows is {rows}; only {TOKEN} tasks join their rows"),
        (needs_folder and task.folder is None, "folder is missing; --data needs the folder's name"),
    )


def _datasets_problems(task: TaskRecipe, needs_folder: bool) -> list[str]:
    given = [key for key, value in vars(SourceRecipe()).items() if getattr(task, key) != value]
    is_unnamed = task.labels is None and task.head.get("problem_type") != "regression"
    counts = Counter(x.dataset for x in task.datasets.values())
    problems = [f"{key} is given beside datasets; give it for each data set" for key in given] + _found(
        (not task.has_head, f"datasets is given; a {task.kind} task has a single data set"),
        (is_unnamed, "labels is missing; a task with several data sets names its own labels"),
        *((count > 1, f"datasets names {place!r} {count} times") for place, count in sorted(counts.items())),
    )
    parts = task.parts("").items()
    return problems + [f"datasets.{key[1:]}.{x}" for key, part in parts for x in _dataset_problems(part, needs_folder)]


def label_names(task: TaskRecipe) -> list[str]:
    """Returns the names that a mapping maps to: the task's labels, for entities their types."""
    labels = task.labels or []
    return list(dict.fromkeys(x[2:] for x in labels if x != "O")) if is_entities(task) else labels


def is_entities(task: TaskRecipe) -> bool:
    """Returns whether the task's labels are a BIO scheme."""
    return task.kind == TOKEN and any(x.startswith(("B-", "I-")) for x in task.labels or [])


def _mapping_problems(task: TaskRecipe) -> list[str]:
    if not task.mapping and not task.unsaid:
        return []
    if task.labels is None:
        return ["mapping and unsaid need the task's labels"]
    names = label_names(task)
    problems = [
        f"mapping.{source} is {target!r}; allowed: {', '.join(names)}, or an empty string for no label"
        for source, target in task.mapping.items()
        if target not in (*names, NO_LABEL)
    ]
    if task.unsaid and not is_entities(task):
        problems.append(f"unsaid is {task.unsaid}; it is for entities, whose absence an 'O' tells: leave it out")
    problems += [f"unsaid holds {name!r}; allowed: {', '.join(names)}" for name in task.unsaid if name not in names]
    said = set(task.unsaid) & set(task.mapping.values())
    return problems + [f"unsaid holds {name!r}, which mapping says" for name in sorted(said)]


def _head_problems(task: TaskRecipe) -> list[str]:
    """Returns what is wrong with the head's fields, and with the fields that only heads understand."""
    classifies = task.has_head and task.head.get("problem_type") != "regression"
    weighs, total = task.class_weights != "none" or task.focal_gamma, sum(task.rewrites.values())
    fixed = sorted({"kind", "labels", "loss_weight", "thresholds"} & set(task.head)) if task.has_head else []
    problems = _found(
        (task.rewrites and not task.has_head, f"rewrites is given; a {task.kind} task has none"),
        (total > 1, f"rewrites adds up to {total:g}; shares of all texts are at most 1 together"),
        (weighs and not classifies, "class_weights and focal_gamma are for classification only"),
        (task.head and not task.has_head, f"head is {task.head}; a {task.kind} task has no head"),
        (fixed, f"head holds {fixed}; kind, labels and loss_weight belong to the task, and thresholds are fitted later"),
    )
    if task.has_head and not fixed:
        try:
            TaskSpec.from_dict("head", {"labels": task.labels or ["O", "B-X"], **task.head, "kind": task.kind})
        except ValueError as error:
            problems.append(str(error).removeprefix("tasks."))
    return problems


def _contradictions(recipe: Recipe) -> list[str]:
    model, sampling, losses, freezing = recipe.model, recipe.sampling, recipe.losses, recipe.freezing
    has_branch, layers = model.num_task_layers > 0, f"model.num_task_layers is {model.num_task_layers}"
    is_frozen, by_layers = freezing.freeze == "encoder" and not has_branch, freezing.gradual or freezing.num_frozen_layers
    problems = []
    if sampling.mode == "epochs" and sampling.batches is not None:
        problems.append(f"sampling.batches is {sampling.batches}; in mode 'epochs' the tasks' epochs set the length")
    if losses.weighting == GRADIENT_SURGERY and sampling.gradient_accumulation_steps < 2:
        problems.append("losses.weighting is 'pcgrad'; it needs sampling.gradient_accumulation_steps of at least 2")
    if is_frozen and (freezing.lora_rank or by_layers):
        problems.append("freezing.freeze is 'encoder'; lora_rank, gradual and num_frozen_layers then have no effect")
    if freezing.lora_rank and by_layers:
        problems.append("freezing.lora_rank trains adapters alone; it cannot be combined with gradual or num_frozen_layers")
    if has_branch and (freezing.freeze not in (None, "encoder") or freezing.num_frozen_layers):
        problems.append(f"freezing.freeze is {freezing.freeze!r}; {layers}, which freezes the encoder whole: leave it out")
    if has_branch and losses.preserve_weight:
        problems.append(f"losses.preserve_weight is {losses.preserve_weight}; {layers}: the embedding cannot move")
    for name in [name for name, task in recipe.tasks.items() if not task.has_head]:
        if has_branch:
            problems.append(f"tasks.{name} trains the embedding; {layers}, which freezes it")
        elif model.embedding_dim is None and (is_frozen or freezing.linear_probe_ratio):
            why = "and the encoder is frozen; without model.embedding_dim nothing is left"
            problems.append(f"tasks.{name} trains the embedding alone, {why}")
    for dim in model.matryoshka_dims:
        if model.embedding_dim is not None and dim > model.embedding_dim:
            problems.append(f"model.matryoshka_dims holds {dim}; allowed: 1 to {model.embedding_dim} dimensions")
    for i, group in enumerate(recipe.optimizer.groups):
        try:
            re.compile(group.pattern)
        except re.error as error:
            problems.append(f"optimizer.groups[{i}].pattern is {group.pattern!r}, not a valid regular expression: {error}")
    return problems
