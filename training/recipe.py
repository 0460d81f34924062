"""Recipes: one TOML file says all of a training run; `Recipe.read` checks it whole and reports everything wrong at once."""

import dataclasses
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configuration_multitask import KINDS, SEQUENCE, TOKEN

PAIRS = "scored_pairs"
FROZEN_PARTS = ("nothing", "word_embeddings", "encoder")


class RecipeError(ValueError):
    """A recipe cannot be used; the message lists every problem with its place in the file."""


@dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """The model: a pretrained encoder (Hub id or folder), how it pools, and the embedding's width."""

    encoder: str
    max_length: int
    pooling_mode: str = "mean"
    embedding_dim: int | None = None
    prefix_dims: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class TaskRecipe:
    """One task: its data set and columns, and how much of it is seen.

    Attributes:
        kind: A head's kind, or "scored_pairs", which trains the embedding to rank pairs of texts by their scores.
        dataset: Hub id, with its subset after a colon, or folder.
        folder: Name of the data set's local copy under the command line's --data.
        text_columns: The column of texts (or of tokens), or the two columns of a pair.
        label_column: The column of labels, of tags, or of scores.
        batch_size: Examples in one batch.
        epochs: How often each example is seen.
        head: Further fields of the head's `TaskSpec`.
    """

    kind: str
    dataset: str
    folder: str
    text_columns: list[str]
    label_column: str
    batch_size: int
    epochs: int
    head: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """The optimization: AdamW with linear decay, and how strongly the embedding is held to the starting encoder's."""

    learning_rate: float
    head_learning_rate: float
    weight_decay: float
    warmup_ratio: float
    preserve_weight: float
    freeze: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run."""

    model: ModelRecipe
    tasks: dict[str, TaskRecipe]
    training: TrainingRecipe

    @classmethod
    def read(cls, path: str | Path, data: Path | None = None, encoder: str | None = None) -> "Recipe":
        """Returns the checked recipe of a TOML file.

        Args:
            path: The file.
            data: If given, data sets are read from the folders there that the tasks' `folder` keys name.
            encoder: If given, the encoder to start from in place of the file's.

        Raises:
            RecipeError: Keys are unknown, missing or of a wrong type or value, or the file is no TOML.
        """
        try:
            fields = tomllib.loads(Path(path).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise RecipeError(f"{path} cannot be read: {error}") from error
        problems: list[str] = []
        recipe = _build(cls, fields, "", problems)
        if not problems:
            problems = _check_values(recipe)
        if problems:
            raise RecipeError("\n  ".join([f"{path}:", *problems]))
        if data:
            tasks = {name: dataclasses.replace(x, dataset=str(data / x.folder)) for name, x in recipe.tasks.items()}
            recipe = dataclasses.replace(recipe, tasks=tasks)
        return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, encoder=encoder)) if encoder else recipe


def _build(kind: Any, value: Any, place: str, problems: list[str]) -> Any:
    """Returns `value` as an instance of the type `kind`, adding a line to `problems` for all that does not fit."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _build_dataclass(kind, value, place, problems)
    if origin is dict and isinstance(value, dict):
        return {key: _build(arguments[1], item, f"{place}.{key}", problems) for key, item in value.items()}
    if origin is list and isinstance(value, list):
        return [_build(arguments[0], item, f"{place}[{i}]", problems) for i, item in enumerate(value)]
    allowed = arguments if origin in (typing.Union, types.UnionType) else (kind,)
    if kind is Any or type(value) in allowed:
        return value
    if float in allowed and type(value) is int:
        return float(value)
    names = " or ".join(
        "table" if dataclasses.is_dataclass(x) or x is dict else getattr(x, "__name__", str(x)) for x in allowed
    )
    problems.append(f"{place} is {value!r}; it must be of type {names}")
    return None


def _build_dataclass(kind: Any, fields: dict[str, Any], place: str, problems: list[str]) -> Any:
    hints, known = typing.get_type_hints(kind), {x.name: x for x in dataclasses.fields(kind)}
    prefix = f"{place}." if place else ""
    problems += [f"{prefix}{name} is unknown; known here: {', '.join(known)}" for name in fields if name not in known]
    for name, x in known.items():
        if name not in fields and x.default is dataclasses.MISSING and x.default_factory is dataclasses.MISSING:
            problems.append(f"{prefix}{name} is missing")
    values = {name: _build(hints[name], value, prefix + name, problems) for name, value in fields.items() if name in known}
    return None if problems else kind(**values)


def _check_values(recipe: Recipe) -> list[str]:
    """Returns a line for each value that has the right type and is still not allowed."""
    problems = [] if recipe.tasks else ["tasks is empty; a run needs at least one task"]
    for name, task in recipe.tasks.items():
        if task.kind not in (*KINDS, PAIRS):
            problems.append(f"tasks.{name}.kind is {task.kind!r}; allowed: {', '.join((*KINDS, PAIRS))}")
        count = {SEQUENCE: 1, TOKEN: 1, PAIRS: 2}.get(task.kind, len(task.text_columns))
        if len(task.text_columns) != count:
            problems.append(f"tasks.{name}.text_columns is {task.text_columns}; a {task.kind} task needs {count}")
        for key in ("batch_size", "epochs"):
            if getattr(task, key) < 1:
                problems.append(f"tasks.{name}.{key} is {getattr(task, key)}; it must be at least 1")
    if recipe.training.freeze not in FROZEN_PARTS:
        problems.append(f"training.freeze is {recipe.training.freeze!r}; allowed: {', '.join(FROZEN_PARTS)}")
    for key in ("learning_rate", "head_learning_rate", "weight_decay", "warmup_ratio", "preserve_weight"):
        if not 0 <= getattr(recipe.training, key) < float("inf"):
            problems.append(f"training.{key} is {getattr(recipe.training, key)}; it must be a number of at least 0")
    return problems
