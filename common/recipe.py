"""Recipes: one TOML file describes a training run; `Recipe.read` checks all of it and reports every problem at once."""

import dataclasses
import re
import tomllib
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configuration_multitask import KINDS, SEQUENCE, TOKEN, TaskSpec, check_task_name, is_number

SCORED_PAIRS, POSITIVE_PAIRS, TRIPLETS = "scored_pairs", "positive_pairs", "triplets"
EMBEDDING_KINDS = (SCORED_PAIRS, POSITIVE_PAIRS, TRIPLETS)  # these train the embedding, and have no head
TEXTS = {SEQUENCE: 1, TOKEN: 1, SCORED_PAIRS: 2, POSITIVE_PAIRS: 2, TRIPLETS: 3}  # text columns of each kind
SPLITS = ("train", "validation", "test")
CLASS_WEIGHTS = ("none", "inverse_frequency", "effective_number")
SAMPLING_MODES = ("epochs", "proportional", "temperature", "uniform", "round_robin", "annealed")
GRADIENT_SURGERY = ("pcgrad", "upgrad")
WEIGHTINGS = ("fixed", "log_labels", "uncertainty", *GRADIENT_SURGERY)
PRESERVE_MODES = ("cosine", "similarity", "both")
FROZEN_PARTS = ("nothing", "word_embeddings", "embeddings", "encoder")
PRECISIONS = ("float32", "bfloat16", "float16")
REWRITES = ("lower", "upper", "title", "bare")  # how else a training text may be written
NO_LABEL = ""  # what a data set's label is mapped to if its rows have no label for this task


class RecipeError(ValueError):
    """A recipe cannot be used; the message lists every problem with its place in the file."""


@dataclass(frozen=True, kw_only=True)
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
    max_length: int
    pooling_mode: str = "mean"
    embedding_dim: int | None = None
    projection: str | None = None
    start: str | None = None
    num_task_layers: int = 0
    matryoshka_dims: list[int] = field(default_factory=list)
    encoder_dropout: float | None = None


@dataclass(frozen=True, kw_only=True)
class DatasetRecipe:
    """One of several data sets of a task; the fields mean what they mean in `TaskRecipe`.

    Attributes:
        source_labels: Label names in the order of the data set's ids, if the data set does not declare them.
        mapping: The data set's label names (for entities: its types) to the task's; "" for rows that then have no label, or
            for types that are no entity. Left out: the names are the task's own. Where the column holds a list and the task
            one label, rows whose labels map to different ones have none.
        unsaid: Labels of the task (for entities: types) that this data set never marks, so that their absence means
            nothing: the loss takes the probability of an "O" as that of "O" or any of them.
    """

    dataset: str
    text_columns: list[str]
    label_column: str
    folder: str | None = None
    splits: dict[str, str] = field(default_factory=dict)
    source_labels: list[str] | None = None
    mapping: dict[str, str] = field(default_factory=dict)
    unsaid: list[str] = field(default_factory=list)
    limit: int | None = None
    passage_rows: int = 1
    epochs: float = 1.0


@dataclass(frozen=True, kw_only=True)
class TaskRecipe:
    """One task: its data set and columns, how much of it is seen, and its loss.

    Attributes:
        datasets: Several data sets in place of one, by name; the task then gives its `labels`, and no `dataset`,
            `text_columns`, `label_column`, `folder`, `splits`, `limit`, `passage_rows` and `epochs` of its own. A data set
            that several tasks share trains their heads together, in one pass over its texts.
        rewrites: Augmentation: shares of the training texts that are seen in "lower", "upper" or "title" case, or "bare",
            without their final punctuation; sampled again in each epoch.
        kind: A head's kind, or what trains the embedding: "scored_pairs" (ranks pairs by their scores, CoSENT),
            "positive_pairs" or "triplets" (a text's partner among all partners of the batch).
        dataset: Hub id, with its subset after a colon, or folder.
        folder: Name of the data set's local copy under the command line's --data.
        text_columns: The column of texts (or of tokens), or those of a pair or a triplet (anchor, positive, negative).
        label_column: The column of labels, tags or scores; none for positive pairs and triplets.
        splits: The data set's own names of the splits "train", "validation" and "test", where they differ.
        labels: Label names in the order of the data set's ids, if the data set does not declare them.
        limit: Maximum number of rows of the train split, sampled with the run's seed.
        passage_rows: Token tasks: number of consecutive rows that are also joined into one passage, so that the head learns
            from longer texts as well.
        batch_size: Texts (or pairs) in one batch.
        epochs: How often each example is seen in sampling mode "epochs"; in other modes, the task's share of the run's length.
        loss_weight: Factor of this task's loss.
        class_weights: "none", "inverse_frequency" or "effective_number" (Cui et al. 2019).
        focal_gamma: Exponent of the focal loss (Lin et al. 2017); 0: cross-entropy.
        label_smoothing: Probability mass spread over all labels, in [0, 1).
        metric: The validation metric; left out: the usual one of the kind.
        head: Further fields of the head's `TaskSpec`.
    """

    kind: str
    dataset: str = ""
    text_columns: list[str] = field(default_factory=list)
    label_column: str | None = None
    folder: str | None = None
    splits: dict[str, str] = field(default_factory=dict)
    labels: list[str] | None = None
    source_labels: list[str] | None = None
    mapping: dict[str, str] = field(default_factory=dict)
    unsaid: list[str] = field(default_factory=list)
    datasets: dict[str, DatasetRecipe] = field(default_factory=dict)
    rewrites: dict[str, float] = field(default_factory=dict)
    limit: int | None = None
    passage_rows: int = 1
    batch_size: int = 32
    epochs: float = 1.0
    loss_weight: float = 1.0
    class_weights: str = "none"
    focal_gamma: float = 0.0
    label_smoothing: float = 0.0
    metric: str | None = None
    head: dict[str, Any] = field(default_factory=dict)

    def parts(self, name: str) -> dict[str, "TaskRecipe"]:
        """Returns the same task on each of its data sets alone, by "<task>/<data set>"; on a single one, itself by its name."""
        if not self.datasets:
            return {name: self}
        fields = {
            key: {x.name: getattr(part, x.name) for x in dataclasses.fields(part)} for key, part in self.datasets.items()
        }
        return {f"{name}/{key}": dataclasses.replace(self, datasets={}, **values) for key, values in fields.items()}

    @property
    def has_head(self) -> bool:
        """Whether the task has a head, and does not train the embedding itself."""
        return self.kind in KINDS


@dataclass(frozen=True, kw_only=True)
class SamplingRecipe:
    """Which task a batch is of.

    Attributes:
        mode: "epochs" (each task exactly its own number of epochs, shuffled), or drawn at each step: "proportional" to
            the task's batches, their number to the power of 1/"temperature", "uniform", in turn ("round_robin"), or
            "annealed" from proportional to nearly uniform (Stickland and Murray 2019).
        temperature: Of the mode "temperature", at least 1; 1 is proportional.
        batches: Batches of the whole run; left out: as many as mode "epochs" has. Not for mode "epochs".
        gradient_accumulation_steps: Batches, of any tasks, per optimizer step.
        seed: Seed of the order of tasks and rows alone; left out: `run.seed`.
    """

    mode: str = "epochs"
    temperature: float = 2.0
    batches: int | None = None
    gradient_accumulation_steps: int = 1
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class LossesRecipe:
    """How the tasks' losses are weighted, and how the embedding is preserved.

    Attributes:
        weighting: "fixed" (each task's `loss_weight`), or besides it: "log_labels" (loss ÷ log of the number of labels,
            Aghajanyan et al. 2021), "uncertainty" (Kendall et al. 2018), or gradient surgery over the step's tasks,
            "pcgrad" (Yu et al. 2020) or "upgrad" (Quinton and Rey 2024), which needs torchjd.
        preserve_weight: Factor of the loss that holds every text's vectors to the teacher's.
        preserve_mode: "cosine": each pooled vector on its own; "similarity": the similarities between the embeddings of
            a batch; "both": the sum.
        teacher: Hub id or folder of the sentence transformer that is followed; left out: the starting encoder.
    """

    weighting: str = "fixed"
    preserve_weight: float = 0.0
    preserve_mode: str = "cosine"
    teacher: str | None = None


@dataclass(frozen=True, kw_only=True)
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

    freeze: str | None = None
    num_frozen_layers: int = 0
    gradual: bool = False
    linear_probe_ratio: float = 0.0
    lora_rank: int = 0


@dataclass(frozen=True, kw_only=True)
class GroupRecipe:
    """Parameters whose names match a regular expression (`re.search`), and their learning rate."""

    pattern: str
    learning_rate: float


@dataclass(frozen=True, kw_only=True)
class OptimizerRecipe:
    """AdamW.

    Attributes:
        learning_rate: Of the encoder's top layer and the projection.
        head_learning_rate: Of the heads; left out: `learning_rate`.
        layer_decay: Factor in (0, 1] by which each lower layer's rate is smaller than the next one's.
        weight_decay: Of matrices; biases and norms do not decay.
        warmup_ratio: Share of the run in which rates rise from zero.
        schedule: "linear", "cosine" or "constant" after that.
        max_grad_norm: Gradients are scaled down to this norm; 0: never.
        groups: Rates of parameters by name; the first pattern that matches wins, before all rules above.
    """

    learning_rate: float
    head_learning_rate: float | None = None
    layer_decay: float = 1.0
    weight_decay: float = 0.01
    warmup_ratio: float = 0.06
    schedule: str = "linear"
    max_grad_norm: float = 1.0
    groups: list[GroupRecipe] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class RunRecipe:
    """The run itself.

    Attributes:
        seed: Of heads, dropout, sampling and the order of batches.
        evaluations: How many times the validation splits are measured; the checkpoint with the best average is kept.
        validation_rows: Rows of each validation split that are measured then; left out: all.
        patience: Evaluations without a better average after which the run stops; left out: it runs to the end.
        calibrate: Whether each head's temperature is fitted on the validation split at the end.
        precision: "float32", "bfloat16" or "float16" (the latter two by autocast).
        save_steps: Steps between checkpoints.
        report_to: Where losses and metrics are reported besides the log: "none", "tensorboard" or "trackio".
    """

    seed: int = 13
    evaluations: int = 0
    validation_rows: int | None = None
    patience: int | None = None
    calibrate: bool = True
    precision: str = "float32"
    save_steps: int = 500
    report_to: str = "none"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run."""

    model: ModelRecipe
    tasks: dict[str, TaskRecipe]
    optimizer: OptimizerRecipe
    sampling: SamplingRecipe = field(default_factory=SamplingRecipe)
    losses: LossesRecipe = field(default_factory=LossesRecipe)
    freezing: FreezingRecipe = field(default_factory=FreezingRecipe)
    run: RunRecipe = field(default_factory=RunRecipe)

    @classmethod
    def read(
        cls, path: str | Path, data: Path | None = None, encoder: str | None = None, overrides: Iterable[str] = ()
    ) -> "Recipe":
        """Returns the checked recipe of a TOML file.

        Args:
            path: The file.
            data: If given, data sets are read from the folders there that the tasks' `folder` keys name.
            encoder: If given, the encoder to start from in place of the file's.
            overrides: Settings of the form "section.key=value", the value written as in TOML; a bare word is a string.

        Raises:
            RecipeError: Keys are unknown, missing or of a wrong type or value, or the file is not TOML.
        """
        try:
            fields = tomllib.loads(Path(path).read_text("utf-8"))
        except (OSError, RecursionError, ValueError) as error:
            raise RecipeError(f"{path} cannot be read: {error}") from error
        for setting in overrides:
            _override(fields, setting)
        if encoder and isinstance(fields.setdefault("model", {}), dict):
            fields["model"]["encoder"] = encoder
        return cls.build(fields, str(path), data)

    @classmethod
    def build(cls, fields: dict[str, Any], source: str, data: Path | None = None) -> "Recipe":
        """Returns the checked recipe of parsed TOML; `source` names it in errors.

        Raises:
            RecipeError: Keys are unknown, missing or of a wrong type or value.
        """
        problems: list[str] = []
        recipe = _build(cls, fields, "", problems)
        if not problems:
            problems = _check_values(recipe, data)
        if problems:
            raise RecipeError("\n  ".join([f"{source}:", *problems]))
        if data is None:
            return recipe
        return dataclasses.replace(recipe, tasks={name: _local(task, data) for name, task in recipe.tasks.items()})

    @property
    def parts(self) -> dict[str, TaskRecipe]:
        """Every task on each of its data sets alone, see `TaskRecipe.parts`."""
        return {key: part for name, task in self.tasks.items() for key, part in task.parts(name).items()}

    def only(self, *names: str) -> "Recipe":
        """Returns the same recipe with these tasks alone, for instance the single-task run of one.

        Raises:
            RecipeError: There is no such task.
        """
        if unknown := [name for name in names if name not in self.tasks]:
            raise RecipeError(f"no task {unknown}; the recipe's tasks are: {', '.join(self.tasks)}")
        return dataclasses.replace(self, tasks={name: self.tasks[name] for name in names})


def _local(task: TaskRecipe, data: Path) -> TaskRecipe:
    """Returns a task that reads its data sets from the folders of `data`."""
    if not task.datasets:
        return dataclasses.replace(task, dataset=str(data / str(task.folder)))
    moved = {name: dataclasses.replace(x, dataset=str(data / str(x.folder))) for name, x in task.datasets.items()}
    return dataclasses.replace(task, datasets=moved)


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


def _build(kind: Any, value: Any, place: str, problems: list[str]) -> Any:
    """Returns `value` as an instance of the type `kind`, adding a line to `problems` for all that does not fit."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):  # in recipes: a type, or None
        return value if value is None else _build(arguments[0], value, place, problems)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _build_dataclass(kind, value, place, problems)
    if origin is dict and isinstance(value, dict):
        return {key: _build(arguments[1], item, f"{place}.{key}", problems) for key, item in value.items()}
    if origin is list and isinstance(value, list):
        return [_build(arguments[0], item, f"{place}[{i}]", problems) for i, item in enumerate(value)]
    if kind is Any or type(value) is kind:
        return value
    if kind is float and type(value) is int and is_number(value):
        return float(value)
    name = "table" if dataclasses.is_dataclass(kind) or origin is dict else getattr(origin or kind, "__name__", str(kind))
    problems.append(f"{place} is {value!r}; it must be of type {name}")
    return None


# Keys of earlier releases, and what they are called now.
_RENAMED = {
    "prefix_dims": "matryoshka_dims",
    "tasks_per_step": "gradient_accumulation_steps",
    "first_layers": "num_frozen_layers",
    "probe_ratio": "linear_probe_ratio",
}


def _build_dataclass(kind: Any, fields: dict[str, Any], place: str, problems: list[str]) -> Any:
    hints, known = typing.get_type_hints(kind), {x.name: x for x in dataclasses.fields(kind)}
    prefix = f"{place}." if place else ""
    for name in fields:
        if _RENAMED.get(name) in known:
            problems.append(f"{prefix}{name} is now called {_RENAMED[name]}; rename it in the recipe")
        elif name not in known:
            problems.append(f"{prefix}{name} is unknown; known keys: {', '.join(known)}")
    for name, x in known.items():
        if name not in fields and x.default is dataclasses.MISSING and x.default_factory is dataclasses.MISSING:
            problems.append(f"{prefix}{name} is missing")
    values = {name: _build(hints[name], value, prefix + name, problems) for name, value in fields.items() if name in known}
    return None if problems else kind(**values)


_CHOICES = {
    "sampling.mode": SAMPLING_MODES,
    "losses.weighting": WEIGHTINGS,
    "losses.preserve_mode": PRESERVE_MODES,
    "freezing.freeze": FROZEN_PARTS,
    "optimizer.schedule": ("linear", "cosine", "constant"),
    "run.precision": PRECISIONS,
    "run.report_to": ("none", "tensorboard", "trackio"),
}
# Smallest and greatest value allowed; None: no greatest one.
_RANGES = {
    "model.max_length": (3, None),
    "model.encoder_dropout": (0, 0.99),
    "model.num_task_layers": (0, None),
    "sampling.temperature": (1, None),
    "sampling.batches": (1, None),
    "sampling.gradient_accumulation_steps": (1, None),
    "sampling.seed": (0, 2**32 - 1),
    "losses.preserve_weight": (0, None),
    "freezing.num_frozen_layers": (0, None),
    "freezing.linear_probe_ratio": (0, 0.99),
    "freezing.lora_rank": (0, None),
    "optimizer.learning_rate": (0, None),
    "optimizer.head_learning_rate": (0, None),
    "optimizer.layer_decay": (0.01, 1),
    "optimizer.weight_decay": (0, None),
    "optimizer.warmup_ratio": (0, 0.99),
    "optimizer.max_grad_norm": (0, None),
    "run.seed": (0, 2**32 - 1),
    "run.evaluations": (0, None),
    "run.validation_rows": (1, None),
    "run.patience": (1, None),
    "run.save_steps": (1, None),
}
_TASK_RANGES = {
    "limit": (1, None),
    "passage_rows": (1, None),
    "batch_size": (1, None),
    "epochs": (0.001, None),
    "loss_weight": (0, None),
    "focal_gamma": (0, None),
    "label_smoothing": (0, 0.99),
}


def _check_values(recipe: Recipe, data: Path | None) -> list[str]:
    """Returns a line for each value that has the right type and is still not allowed."""
    problems = [] if recipe.tasks else ["tasks is empty; a run needs at least one task"]
    for path, allowed in _CHOICES.items():
        section, key = path.split(".")
        value = getattr(getattr(recipe, section), key)
        problems += [] if value is None else _choice(path, value, allowed)
    for path, limits in _RANGES.items():
        section, key = path.split(".")
        problems += _range(path, getattr(getattr(recipe, section), key), *limits)
    for name, task in recipe.tasks.items():
        problems += [f"tasks.{name}.{problem}" for problem in _task_problems(task, data)]
        if name in ("loss", "drift"):
            problems.append(f"tasks has the task name {name!r}, under which training reports something else")
        try:
            check_task_name(name)
        except ValueError as error:
            problems.append(str(error))
    return problems + _contradictions(recipe)


def _choice(path: str, value: str, allowed: Iterable[str]) -> list[str]:
    return [] if value in allowed else [f"{path} is {value!r}; allowed: {', '.join(allowed)}"]


def _range(path: str, value: float | None, least: float, greatest: float | None) -> list[str]:
    if value is None or (is_number(value) and least <= value <= (value if greatest is None else greatest)):
        return []
    return [
        f"{path} is {value}; it must be at least {least} and " + ("finite" if greatest is None else f"at most {greatest}")
    ]


def _task_problems(task: TaskRecipe, data: Path | None) -> list[str]:
    kinds = (*KINDS, *EMBEDDING_KINDS)
    problems = _choice("kind", task.kind, kinds) + _choice("class_weights", task.class_weights, CLASS_WEIGHTS)
    for key, limits in _TASK_RANGES.items():
        problems += _range(key, getattr(task, key), *limits)
    if problems:
        return problems
    problems += _rewrite_problems(task)
    if task.datasets:
        return problems + _datasets_problems(task, data) + _head_problems(task)
    return problems + _dataset_problems(task, data) + _head_problems(task)


def _dataset_problems(task: TaskRecipe, data: Path | None) -> list[str]:
    """Returns what is wrong with a task's only data set, or one of them as `TaskRecipe.parts` gives it."""
    if not task.dataset:
        return ["dataset is missing; name one, or several under `datasets`"]
    problems = []
    if len(task.text_columns) != TEXTS[task.kind]:
        problems.append(f"text_columns is {task.text_columns}; a {task.kind} task needs {TEXTS[task.kind]}")
    if (task.label_column is None) == (task.kind in (*KINDS, SCORED_PAIRS)):
        needs = "needs one" if task.label_column is None else "has none"
        problems.append(f"label_column is {task.label_column!r}; a {task.kind} task {needs}")
    if unknown := sorted(set(task.splits) - set(SPLITS)):
        problems.append(f"splits names {unknown}; allowed: {', '.join(SPLITS)}")
    if data is not None and task.folder is None:
        problems.append("folder is missing; --data needs to know the name of the data set's folder")
    if task.passage_rows > 1 and task.kind != TOKEN:
        problems.append(f"passage_rows is {task.passage_rows}; only {TOKEN} tasks join their rows")
    return problems + _mapping_problems(task)


def _datasets_problems(task: TaskRecipe, data: Path | None) -> list[str]:
    single = ("dataset", "text_columns", "label_column", "folder", "splits", "source_labels", "mapping", "unsaid", "limit")
    problems = [f"{key} is given beside datasets; give it for each data set" for key in single if getattr(task, key)]
    if not task.has_head:
        problems.append(f"datasets is given; a {task.kind} task has a single data set")
    if task.labels is None and task.head.get("problem_type") != "regression":
        problems.append("labels is missing; a task with several data sets names its own labels")
    places = [x.dataset for x in task.datasets.values()]
    problems += [
        f"datasets names {place!r} {places.count(place)} times" for place in sorted(set(places)) if places.count(place) > 1
    ]
    for key, part in task.parts("").items():
        for name, limits in _TASK_RANGES.items():
            problems += [f"datasets.{key[1:]}.{x}" for x in _range(name, getattr(part, name), *limits)]
        problems += [f"datasets.{key[1:]}.{x}" for x in _dataset_problems(part, data)]
    return problems


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
    problems += [f"unsaid holds {name!r}; allowed: {', '.join(names)}" for name in task.unsaid if name not in names]
    said = set(task.unsaid) & set(task.mapping.values())
    return problems + [f"unsaid holds {name!r}, which mapping says" for name in sorted(said)]


def _rewrite_problems(task: TaskRecipe) -> list[str]:
    problems = [f"rewrites names {name!r}; allowed: {', '.join(REWRITES)}" for name in task.rewrites if name not in REWRITES]
    problems += [x for name, share in task.rewrites.items() for x in _range(f"rewrites.{name}", share, 0, 1)]
    if not problems and sum(task.rewrites.values()) > 1:
        problems.append(f"rewrites adds up to {sum(task.rewrites.values()):g}; shares of all texts are at most 1 together")
    return problems + ([f"rewrites is given; a {task.kind} task has none"] if task.rewrites and not task.has_head else [])


def _head_problems(task: TaskRecipe) -> list[str]:
    """Returns what is wrong with the head's fields, and with the fields that only heads understand."""
    classifies = task.has_head and task.head.get("problem_type") != "regression"
    problems = []
    if not classifies and (task.class_weights != "none" or task.focal_gamma or task.label_smoothing):
        problems.append("class_weights, focal_gamma and label_smoothing are for classification only")
    if not task.has_head:
        return problems + ([f"head is {task.head}; a {task.kind} task has no head"] if task.head else [])
    if fixed := sorted({"kind", "labels", "loss_weight", "thresholds"} & set(task.head)):
        return [*problems, f"head holds {fixed}; kind, labels and loss_weight stand beside it, thresholds come later"]
    try:
        TaskSpec.from_dict("head", {"labels": task.labels or ["O", "B-X"], **task.head, "kind": task.kind})
    except ValueError as error:
        problems.append(str(error).removeprefix("tasks."))
    return problems


def _contradictions(recipe: Recipe) -> list[str]:
    problems = []
    sampling, freezing = recipe.sampling, recipe.freezing
    if sampling.mode == "epochs" and sampling.batches is not None:
        problems.append(f"sampling.batches is {sampling.batches}; in mode 'epochs' the tasks' epochs set the length")
    if recipe.losses.weighting in GRADIENT_SURGERY and sampling.gradient_accumulation_steps < 2:
        problems.append(
            f"losses.weighting is {recipe.losses.weighting!r}; it needs sampling.gradient_accumulation_steps of at least 2"
        )
    if recipe.run.patience is not None and not recipe.run.evaluations:
        problems.append("run.patience needs run.evaluations of at least 1")
    frozen = freezing.freeze == "encoder" and not recipe.model.num_task_layers
    if frozen and (freezing.lora_rank or freezing.gradual or freezing.num_frozen_layers):
        problems.append("freezing.freeze is 'encoder'; lora_rank, gradual and num_frozen_layers then have no effect")
    if freezing.lora_rank and (freezing.gradual or freezing.num_frozen_layers):
        problems.append("freezing.lora_rank trains adapters alone; it cannot be combined with gradual or num_frozen_layers")
    for i, group in enumerate(recipe.optimizer.groups):
        problems += _range(f"optimizer.groups[{i}].learning_rate", group.learning_rate, 0, None)
        try:
            re.compile(group.pattern)
        except re.error as error:
            problems.append(f"optimizer.groups[{i}].pattern is {group.pattern!r}, not a valid regular expression: {error}")
    problems += _branch_contradictions(recipe)
    wide = recipe.model.embedding_dim
    problems += [
        f"model.matryoshka_dims holds {dim}; allowed: 1 to {wide} dimensions"
        for dim in recipe.model.matryoshka_dims
        if dim < 1 or (wide is not None and dim > wide)
    ]
    if wide is None and not recipe.model.num_task_layers and (freezing.freeze == "encoder" or freezing.linear_probe_ratio):
        problems += [
            f"tasks.{name} trains the embedding alone, and the encoder is frozen; without model.embedding_dim nothing is left"
            for name, task in recipe.tasks.items()
            if not task.has_head
        ]
    return problems


def _branch_contradictions(recipe: Recipe) -> list[str]:
    """Returns what conflicts with the frozen encoder of a model with a task branch."""
    if not recipe.model.num_task_layers:
        return []
    layers, freezing = f"model.num_task_layers is {recipe.model.num_task_layers}", recipe.freezing
    problems = [
        f"tasks.{name} trains the embedding; {layers}, which freezes it"
        for name, x in recipe.tasks.items()
        if not x.has_head
    ]
    if freezing.freeze not in (None, "encoder") or freezing.num_frozen_layers:
        problems.append(f"freezing.freeze is {freezing.freeze!r}; {layers}, which freezes the encoder whole: leave it out")
    if recipe.losses.preserve_weight:
        problems.append(f"losses.preserve_weight is {recipe.losses.preserve_weight}; {layers}: the embedding cannot move")
    return problems
