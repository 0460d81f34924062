"""Configuration of the multi-task sentence transformer: which heads there are, and how a text becomes one vector.

`config.json` is the encoder's own configuration (its native `model_type`, its fields at the root) plus the fields
documented in `MultiTaskConfig`. Libraries that do not know this code therefore see a plain encoder.
"""

import copy
import json
import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

try:
    if not TYPE_CHECKING:  # mypy checks these files outside a package
        from .tasks_multitask import GREATEST_DIM, POOLING_MODES, TaskSpec, is_width, require
except ImportError:  # no package around this file: imported from the repository's root, by its own scripts
    from tasks_multitask import GREATEST_DIM, POOLING_MODES, TaskSpec, is_width, require

WEIGHTS_INDEX = "multitask.safetensors.index.json"  # its presence marks a release folder

AUTO_MAP = {
    "AutoConfig": "configuration_multitask.MultiTaskConfig",
    "AutoModel": "modeling_multitask.MultiTaskModel",
    "AutoModelForSequenceClassification": "modeling_multitask.MultiTaskForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_multitask.MultiTaskForTokenClassification",
}
CUSTOM_PIPELINES = {"multitask": {"impl": "pipeline_multitask.MultiTaskPipeline", "pt": ["AutoModel"]}}

_TASK_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_GREATEST_COUNTS = {
    "num_hidden_layers": 256,
    "num_labels": 100_000,
    "hidden_size": GREATEST_DIM,
    "intermediate_size": GREATEST_DIM,
    "vocab_size": 10_000_000,
}


def is_inside(value: object, suffix: str) -> bool:
    """Returns whether `value` names a file by a relative path that ends in `suffix` and cannot leave its folder."""
    if not isinstance(value, str) or not value.endswith(suffix) or not value.isprintable():
        return False
    path = PurePosixPath(value)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in value and ":" not in value


def check_task_name(name: Any) -> None:
    """Raises a ValueError if `name` cannot name a task: the heads live in a ModuleDict, whose attributes cannot."""
    well_formed = isinstance(name, str) and _TASK_NAME.fullmatch(name)
    if not well_formed or hasattr(nn.ModuleDict, name) or name == "training":
        raise ValueError(
            f"tasks has the task name {name!r}; allowed: letters, digits, '_' and '-', starting with a letter, and no name "
            "of a method of torch.nn.ModuleDict, such as 'items' or 'half'."
        )


class MultiTaskConfig(PretrainedConfig):
    """Configuration of `MultiTaskModel`: an encoder's own configuration with pooling, projection and tasks added.

    Args:
        model_type: The encoder's native model type, any that `AutoModel` knows ("bert", "roberta", "modernbert", …).
        pooling_mode: How token vectors become one text vector: "cls", "mean", "max", "mean_sqrt_len_tokens",
            "weightedmean" or "lasttoken", as in sentence-transformers' Pooling.
        embedding_dim: Width of the sentence embedding after a linear projection; None: no projection, the
            embedding is as wide as the encoder.
        num_task_layers: How many layers the task branch has, from 0 to the encoder's depth. With n > 0 the heads read a
            branch of their own, which starts as a copy of the encoder's last n layers and runs on the output of the
            layers below; the encoder and the sentence embedding stay untouched by training. 0: no branch, the heads
            read the encoder's last layer.
        tasks: Maps each task's name to its fields, see `TaskSpec`. The order of heads and labels is kept.
        multitask_weights: Name of the weight index of the release layout; None for a single-file checkpoint.
        **kwargs: The encoder's own fields, and those of `PretrainedConfig`.

    Raises:
        ValueError: A field has a wrong type or value; the message names it and what is allowed.
    """

    keys_to_ignore_at_inference = ["last_hidden_state", "hidden_states", "attentions", "task_losses"]

    def __init__(
        self,
        model_type: str = "bert",
        pooling_mode: str = "mean",
        embedding_dim: int | None = None,
        num_task_layers: int = 0,
        tasks: dict[str, dict[str, Any]] | None = None,
        multitask_weights: str | None = None,
        **kwargs: Any,
    ) -> None:
        require(
            isinstance(model_type, str) and model_type in MODEL_MAPPING_NAMES, "model_type", model_type,
            "the model type of an encoder that AutoModel knows, such as 'bert', 'roberta', 'modernbert' or 'xlm-roberta'",
        )  # fmt: skip
        _check_encoder_fields(model_type, kwargs)
        try:
            native = CONFIG_MAPPING[model_type](**kwargs)
            self.attribute_map = native.attribute_map  # hidden_size is `dim` in DistilBERT, and so on
            super().__init__(**{**kwargs, **native.to_dict()})
        except Exception as error:  # every library below has its own types
            raise ValueError(f"The fields are not those of a {model_type!r} encoder: {error}") from error
        is_float = self.dtype is None or (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point)
        require(is_float, "dtype", self.dtype, "null or a floating-point type such as 'float32'")
        self.model_type = model_type
        if not {"id2label", "num_labels"} & set(kwargs):
            # Labels belong to tasks: what is set later was asked for while loading.
            self.id2label: dict[int, str] = {}
            self.label2id: dict[str, int] = {}
        self.pooling_mode = pooling_mode
        self.embedding_dim = embedding_dim
        self.num_task_layers = num_task_layers
        self.tasks = {} if tasks is None else tasks
        if multitask_weights is not None:
            self.transformers_weights = multitask_weights  # what PreTrainedModel.from_pretrained reads
        self.check()

    def check(self) -> None:
        """Checks this class's own fields, which may have been set after construction.

        Raises:
            ValueError: One of them is not allowed; the message names it.
        """
        modes, dim, layers = ", ".join(POOLING_MODES), self.embedding_dim, self.num_task_layers
        require(self.pooling_mode in POOLING_MODES, "pooling_mode", self.pooling_mode, modes)
        require(is_width(dim), "embedding_dim", dim, f"an integer from 1 to {GREATEST_DIM}, or null for no projection")
        allowed = f"an integer from 0 (no task branch) to {self.num_hidden_layers}, the number of the encoder's layers"
        require(type(layers) is int and 0 <= layers <= self.num_hidden_layers, "num_task_layers", layers, allowed)
        index, suffix = getattr(self, "transformers_weights", None), ".safetensors.index.json"
        allowed = f"the name of an index file inside the model folder that ends in '{suffix}'"
        require(index is None or is_inside(index, suffix), "multitask_weights", index, allowed)
        self.set_tasks(self.tasks)

    def set_tasks(self, tasks: dict[str, dict[str, Any]]) -> None:
        """Replaces the tasks, after checking all names and fields.

        Raises:
            ValueError: A name or a field is not allowed; the tasks stay as they were.
        """
        if not isinstance(tasks, dict):
            raise ValueError(f"tasks is {tasks!r}; it must be an object that maps task names to their fields.")
        for name in tasks:
            check_task_name(name)
        self.tasks = {name: TaskSpec.from_dict(name, fields).to_dict() for name, fields in tasks.items()}

    @property
    def task_specs(self) -> dict[str, TaskSpec]:
        """The checked spec of every task, in order."""
        return {name: TaskSpec.from_dict(name, fields) for name, fields in self.tasks.items()}

    @property
    def encoder_config(self) -> PretrainedConfig:
        """A new native configuration of the encoder alone, for instance a `BertConfig`."""
        own = {"pooling_mode", "embedding_dim", "num_task_layers", "tasks", "transformers_weights"}
        own |= {"model_type", "auto_map", "custom_pipelines"}
        fields = {name: value for name, value in self.to_dict().items() if name not in own}
        return CONFIG_MAPPING[self.model_type](**fields, attn_implementation=self._attn_implementation)

    def pick_task(self, kind: str, name: str | None) -> str:
        """Returns `name` after checking that it is a task of `kind`, or the first task of `kind` if it is None.

        Raises:
            ValueError: There is no such task.
        """
        names = [task for task, spec in self.tasks.items() if spec["kind"] == kind]
        if not names or (name is not None and name not in names):
            wanted = f"no task named {name!r}" if name is not None else "no task"
            raise ValueError(f"This model has {wanted} of kind {kind}; it has: {', '.join(names) or 'none'}.")
        return names[0] if name is None else name

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "MultiTaskConfig":
        """Returns the configuration stored in a folder or on the Hub; takes what `PretrainedConfig` takes.

        The base method would warn that the file's model type is the encoder's and not this class's.

        Raises:
            ValueError: A field has a wrong type or value, or the file holds no JSON object.
        """
        try:
            fields, kwargs = cls.get_config_dict(pretrained_model_name_or_path, **kwargs)
            fields = dict(fields)
        except (RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"{pretrained_model_name_or_path}: config.json holds no JSON object: {error}") from error
        try:
            return cls.from_dict(fields, **kwargs)
        except ValueError as error:
            raise ValueError(f"{pretrained_model_name_or_path}: config.json: {error}") from error

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Writes `config.json`; in a release folder it keeps naming the release's weight index."""
        super().save_pretrained(save_directory, **kwargs)
        if Path(save_directory, WEIGHTS_INDEX).exists():
            path = Path(save_directory, "config.json")
            fields = {**json.loads(path.read_text("utf-8")), "multitask_weights": WEIGHTS_INDEX}
            path.write_text(json.dumps(fields, indent=2) + "\n", "utf-8")

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form, which is the encoder's configuration with this class's fields added."""
        fields = super().to_dict()
        for name in ("attribute_map", "id2label", "label2id", "problem_type"):
            fields.pop(name, None)  # the order of labels lives in `tasks` alone
        architecture = MODEL_MAPPING_NAMES[self.model_type]
        fields["architectures"] = [architecture if isinstance(architecture, str) else architecture[0]]
        fields["model_type"] = self.model_type
        fields["auto_map"] = dict(AUTO_MAP)
        fields["custom_pipelines"] = copy.deepcopy(CUSTOM_PIPELINES)
        return fields

    def to_json_string(self, use_diff: bool = True) -> str:
        """Returns the JSON text with the tasks in their order, which says what the default task of a kind is."""
        fields = json.loads(super().to_json_string(use_diff))
        return json.dumps({**fields, "tasks": self.tasks}, indent=2) + "\n"


def _check_encoder_fields(model_type: str, fields: dict[str, Any]) -> None:
    """Raises a ValueError if a field would replace a method, or is a count, under any name of it, beyond all reason."""
    if methods := sorted(name for name in fields if callable(getattr(MultiTaskConfig, name, None))):
        raise ValueError(f"The fields {methods} are names of methods of the configuration; rename or remove them.")
    aliases = CONFIG_MAPPING[model_type].attribute_map
    for name, greatest in _GREATEST_COUNTS.items():
        for field in {name, aliases.get(name, name)} & set(fields):
            if isinstance(fields[field], int) and fields[field] > greatest:
                raise ValueError(f"{field} is {fields[field]!r}; allowed: at most {greatest}.")


MultiTaskConfig.register_for_auto_class(AutoConfig.__name__)
