"""The multi-task sentence transformer: one pass gives a sentence embedding, text labels and word labels.

Read it from the top: pooling, casing, one head, its loss, the task branch, the model around them, and the two views that
show a single head through transformers' standard classes.

        embeddings + layers 1 … L−n        the trunk, shared
             /                 \\
    layers L−n+1 … L        task branch: n layers, a trained copy of them (num_task_layers = n)
    pooling → linear        heads
    sentence embedding      logits of each task

Axes: B batch, T tokens, H hidden, E embedding, C labels, L layers.
"""

import copy
import inspect
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MODEL_MAPPING, PretrainedConfig, PreTrainedModel  # names that transformers 4 knows too: handler.py
from transformers import __version__ as transformers_version
from transformers.modeling_outputs import BaseModelOutput, ModelOutput, SequenceClassifierOutput, TokenClassifierOutput
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

try:
    if not TYPE_CHECKING:  # mypy checks these files outside a package
        from .configuration_multitask import WEIGHTS_INDEX, MultiTaskConfig
        from .tasks_multitask import CASINGS, READS, SEQUENCE, TOKEN, TaskSpec
        from .weights_multitask import WeightsError, check_stored, loading_problems, not_finite, refuse
except ImportError:  # no package around this file: imported from the repository's root, by its own scripts
    from configuration_multitask import WEIGHTS_INDEX, MultiTaskConfig
    from tasks_multitask import CASINGS, READS, SEQUENCE, TOKEN, TaskSpec
    from weights_multitask import WeightsError, check_stored, loading_problems, not_finite, refuse

logger = logging.get_logger(__name__)

IGNORE_INDEX = -100
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


@dataclass
class MultiTaskOutput(ModelOutput):
    """Everything that one pass gives.

    Attributes:
        last_hidden_state: float [B, T, H], the encoder's last layer; None with a task branch and `output_embedding=False`.
        sentence_embedding: float [B, E], unit length (zero for a row whose attention mask is all zero); None with
            `output_embedding=False`.
        encoder_embedding: float [B, H], the encoder's own sentence embedding: pooled and unit length, before the
            projection; None with `output_embedding=False`.
        logits: Maps each requested task to float [B, C] (sequence tasks) or [B, T, C] (token tasks).
        loss: float [], the sum of the labelled tasks' losses; None without labels.
        task_losses: Maps each labelled task to its loss, float [].
        hidden_states: L + 1 tensors [B, T, H] of the encoder, if asked for.
        attentions: L tensors [B, heads, T, T] of the encoder, if asked for.
    """

    last_hidden_state: Tensor | None = None
    sentence_embedding: Tensor | None = None
    encoder_embedding: Tensor | None = None
    logits: dict[str, Tensor] | None = None
    loss: Tensor | None = None
    task_losses: dict[str, Tensor] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def pool(hidden: Tensor, mask: Tensor, mode: str) -> Tensor:
    """Returns one vector per text, as sentence-transformers' Pooling computes it, whatever side the padding is on.

    Args:
        hidden: float [B, T, H], token vectors.
        mask: int [B, T], 1 for a token and 0 for padding.
        mode: One of `POOLING_MODES`.

    Returns:
        float [B, H] in the dtype of `hidden`; zero for a row without any token.
    """
    some = mask.any(dim=1, keepdim=True)  # [B, 1]
    if mode in ("cls", "lasttoken"):
        first = mask.int().argmax(dim=1)
        last = mask.shape[1] - 1 - mask.int().flip(1).argmax(dim=1)
        row = torch.arange(len(hidden), device=hidden.device)
        return hidden[row, first if mode == "cls" else last] * some
    if mode == "max":
        return hidden.masked_fill(mask.unsqueeze(-1) == 0, float("-inf")).amax(dim=1).masked_fill(~some, 0.0)
    weights = mask.float()  # sums are taken in float32, also for half-precision models
    if mode == "weightedmean":
        weights = weights * weights.cumsum(dim=1)  # the i-th token of a text weighs i
    total = (hidden * weights.unsqueeze(-1)).sum(dim=1)  # [B, H]
    norm = weights.sum(dim=1, keepdim=True).clamp(min=1e-9)  # [B, 1]
    return (total / (norm.sqrt() if mode == "mean_sqrt_len_tokens" else norm)).to(hidden.dtype)


def normalize(vectors: Tensor) -> Tensor:
    """Returns vectors of unit length along the last axis, in their dtype; a zero vector stays zero."""
    # In float32: half precision cannot hold the bound that keeps a zero vector zero.
    return F.normalize(vectors.float(), dim=-1).to(vectors.dtype)


class CasingEmbedding(nn.Module):
    """A vector for how each word is written, seen together with its two neighbours on either side.

    A capital says less in a headline where every word has one.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(CASINGS), dim)
        self.context = nn.Conv1d(dim, dim, kernel_size=5, padding=2)

    def forward(self, casing_ids: Tensor, mask: Tensor) -> Tensor:
        """Returns float [B, T, casing_dim] for indices into `CASINGS`, int [B, T]; padding has no influence."""
        vectors = self.embedding(casing_ids) * mask.unsqueeze(-1)
        return F.gelu(self.context(vectors.transpose(1, 2)).transpose(1, 2))


class TaskHead(nn.Module):
    """One classifier: optional casing features and hidden layer, dropout, linear."""

    def __init__(self, spec: TaskSpec, hidden_size: int) -> None:
        super().__init__()
        self.spec = spec
        self.casing = CasingEmbedding(spec.casing_dim) if spec.casing_dim else None
        features = len(READS[spec.reads]) * hidden_size + (spec.casing_dim or 0)
        self.dense = nn.Linear(features, spec.hidden_dim) if spec.hidden_dim else None
        self.dropout = nn.Dropout(spec.classifier_dropout)
        self.classifier = nn.Linear(spec.hidden_dim or features, len(spec.labels))

    def forward(self, hidden: dict[str, Tensor], mask: Tensor, casing_ids: Tensor, pooling_mode: str) -> Tensor:
        """Returns the logits, float [B, C] for a text head and [B, T, C] for a token head.

        Args:
            hidden: float [B, T, H] each, the token vectors of the "branch" and of the "encoder", where the head reads them.
            mask: int [B, T].
            casing_ids: int [B, T], indices into `CASINGS`.
            pooling_mode: How a text head pools, unless its own spec says otherwise.
        """
        if self.spec.kind == TOKEN:
            casing = [] if self.casing is None else [self.casing(casing_ids, mask)]
            return self.classify(torch.cat([hidden["branch"], *casing], dim=-1))
        pooled = [pool(hidden[name], mask, self.spec.pooling_mode or pooling_mode) for name in READS[self.spec.reads]]
        return self.classify(pooled[0] if self.spec.reads == "branch" else torch.cat([normalize(x) for x in pooled], dim=-1))

    def classify(self, features: Tensor) -> Tensor:
        """Returns logits, float [..., C], for features, float [..., H], or wider by casing features or a second H."""
        if self.dense is not None:
            features = F.gelu(self.dense(features))
        return self.classifier(self.dropout(features)) / self.spec.temperature


def task_loss(spec: TaskSpec, logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the mean loss over the labels that are not missing; zero (with a graph) if there are none.

    Args:
        spec: The task.
        logits: float [B, C] or, for token tasks, [B, T, C].
        labels: int [B] (single label) or [B, T] (token); 0/1 [B, C] (multi-label), -100 where missing; float [B] or [B, C]
            (regression), NaN where missing.

    Raises:
        ValueError: The labels have another shape.
    """
    per_label = spec.problem_type in ("multi_label_classification", "regression")
    expected = logits.shape if per_label else logits.shape[:-1]
    if spec.problem_type == "regression" and len(spec.labels) == 1 and labels.dim() == 1:
        labels = labels.unsqueeze(-1)  # [B] → [B, 1]
    if labels.shape != expected:
        raise ValueError(f"labels have shape {list(labels.shape)}; a {spec.problem_type or TOKEN} head of "
                         f"{len(spec.labels)} labels takes {list(expected)} here.")  # fmt: skip
    logits, kept = logits.float(), labels == labels if spec.problem_type == "regression" else labels != IGNORE_INDEX
    if spec.problem_type == "regression":
        losses = (logits - labels.nan_to_num()) ** 2
    elif spec.problem_type == "multi_label_classification":
        losses = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none")
    else:
        losses = F.cross_entropy(logits.flatten(0, -2), labels.flatten().long(), reduction="none").view_as(labels)
    return losses.masked_fill(~kept, 0.0).sum() / kept.sum().clamp(min=1)


class TaskBranch(nn.Module):
    """The layers that the tasks train: a copy of the encoder's last n, which also sees how each word is written."""

    def __init__(self, layers: Iterable[nn.Module], hidden_size: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(copy.deepcopy(layer) for layer in layers)
        self.casing = nn.Embedding(len(CASINGS), hidden_size)  # training starts it at zero, see `reset_branch`

    def forward(self, hidden: Tensor, casing_ids: Tensor) -> Tensor:
        """Returns what enters the first of the layers, float [B, T, H], for the trunk's output."""
        return hidden + self.casing(casing_ids)


class _HiddenAsEmbeddings(nn.Module):
    """Stands in for an encoder's embeddings where token vectors are passed in that have gone through lower layers."""

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, *args: Any, **kwargs: Any) -> Any:
        return inputs_embeds


def _find_layers(encoder: nn.Module, count: int) -> tuple[list[str], nn.ModuleList]:
    """Returns the attribute path to the encoder's list of `count` layers, such as ["encoder", "layer"], and the list."""
    for name, module in encoder.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and hasattr(encoder, "embeddings"):
            return name.split("."), module
    raise ValueError(
        f"num_task_layers needs an encoder with a list of its {count} layers and 'embeddings'; {type(encoder).__name__} has "
        "none. Use num_task_layers=0, or another encoder."
    )


def _with_layers(encoder: nn.Module, path: list[str], layers: nn.ModuleList, is_trunk: bool = False) -> Any:
    """Returns a view of an encoder that runs other layers: its own forward pass, sharing all remaining modules.

    Masks, positions and whatever else an architecture prepares for its layers stay its own business. A trunk leaves out the
    norm that some architectures, such as ModernBERT, apply to their last layer's output.
    """
    view = copy.copy(encoder)
    view._modules, view._forward_hooks = dict(encoder._modules), type(encoder._forward_hooks)()
    name, *rest = path
    view._modules[name] = _with_layers(encoder.get_submodule(name), rest, layers, is_trunk) if rest else layers
    if "pooler" in view._modules:
        view._modules["pooler"] = None  # a projection of the first token that nobody reads
    if is_trunk and "final_norm" in view._modules:
        view._modules["final_norm"] = nn.Identity()
    return view


class MultiTaskModel(PreTrainedModel):
    """One encoder with a sentence embedding and any number of classification heads, all from a single pass.

    The encoder is any that `AutoModel` knows. It is built from the configuration, with random weights; pretrained
    weights come from `from_pretrained`, which raises `WeightsError` rather than leave any weight random.
    """

    config_class = MultiTaskConfig
    supports_gradient_checkpointing = True
    hub_options: dict[str, Any] = {}  # revision and the like, with which `from_pretrained` was called
    accepts_loss_kwargs = False  # the loss is a mean per task: the Trainer must not rescale it by item counts
    # The encoder checks each of these for itself when it is built.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: MultiTaskConfig) -> None:
        config.check()  # `from_pretrained(..., field=value)` sets fields without checking them
        encoder_config = config.encoder_config  # read first: the base class resolves the attention implementation
        super().__init__(config)
        encoder = MODEL_MAPPING[type(encoder_config)](encoder_config)
        # Under its native prefix, so that a checkpoint of the bare encoder loads into it.
        self.base_model_prefix = encoder.base_model_prefix
        setattr(self, self.base_model_prefix, encoder)
        self._encoder_inputs = set(inspect.signature(encoder.forward).parameters)
        self.linear = nn.Linear(config.hidden_size, config.embedding_dim, bias=False) if config.embedding_dim else None
        self.task_branch: TaskBranch | None = None
        if config.num_task_layers:
            path, layers = _find_layers(encoder, config.num_hidden_layers)
            below, above = layers[: -config.num_task_layers], layers[-config.num_task_layers :]
            self.task_branch = TaskBranch(above, config.hidden_size)
            trunk = _with_layers(encoder, path, below, is_trunk=True)
            top, branch = (_with_layers(encoder, path, layers) for layers in (above, self.task_branch.layers))
            top.embeddings = branch.embeddings = _HiddenAsEmbeddings()
            # In a tuple, so that their shared modules are not registered a second time.
            self._views = trunk, top, branch
        self.heads: Any = nn.ModuleDict({name: self.new_head(spec) for name, spec in config.task_specs.items()})
        self.post_init()

    def new_head(self, spec: TaskSpec) -> TaskHead:
        """Returns an untrained head for this encoder; the model keeps it only as `add_task` does."""
        return TaskHead(spec, self.config.hidden_size)

    @property
    def encoder(self) -> PreTrainedModel:
        """The shared encoder, for instance a `BertModel`."""
        return getattr(self, self.base_model_prefix)

    @property
    def max_length(self) -> int | None:
        """The greatest number of tokens, special tokens included, that the encoder takes; None if unlimited."""
        table = getattr(getattr(self.encoder, "embeddings", None), "position_embeddings", None)
        if table is None:
            return getattr(self.config, "max_position_embeddings", None)
        # RoBERTa counts positions from padding_idx + 1.
        return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)

    @torch.no_grad()
    def reset_branch(self) -> None:
        """Makes the task branch a copy of the encoder's last layers again, without casing features."""
        if self.task_branch is not None:
            _, layers = _find_layers(self.encoder, self.config.num_hidden_layers)
            self.task_branch.layers.load_state_dict(layers[-self.config.num_task_layers :].state_dict())
            self.task_branch.casing.weight.zero_()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        casing_ids: Tensor | None = None,
        tasks: Iterable[str] | None = None,
        labels: dict[str, Tensor] | None = None,
        output_embedding: bool = True,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> MultiTaskOutput:
        """Returns embedding, logits and, where labels are given, losses. Only what is asked for is computed.

        Args:
            input_ids: int [B, T].
            attention_mask: int [B, T], 1 for tokens and 0 for padding; None: every position is a token.
            token_type_ids: int [B, T]; not passed on to encoders that know none.
            position_ids: int [B, T].
            inputs_embeds: float [B, T, H] in place of `input_ids`.
            casing_ids: int [B, T], indices into `CASINGS`, which the branch and heads with a `casing_dim` read; None: unknown.
            tasks: Names of the heads to compute; None: all; empty: the embedding alone, without the task branch.
            labels: Maps any subset of the computed tasks to its labels, see `task_loss`.
            output_embedding: Whether to compute the embedding. Without it, a model with a task branch does not run the
                encoder's upper layers.
            output_hidden_states: Whether to return the token vectors of all the encoder's layers.
            output_attentions: Whether to return attention probabilities (needs `attn_implementation="eager"`).
            **kwargs: Passed to the encoder.

        Raises:
            ValueError: An unknown task, labels of another shape or for a task that is not computed, or too many tokens.
        """
        names = self._requested(tasks, labels)
        inputs = {
            "input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids,
            "position_ids": position_ids, "inputs_embeds": inputs_embeds,
        }  # fmt: skip
        inputs, mask, casing = self._given(inputs, casing_ids)
        output_hidden_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        options = {**kwargs, "output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        sources = {source for name in names for source in READS[self.heads[name].spec.reads]}
        sources |= {"encoder"} if output_embedding else set()
        encoded, forked = self._encode(inputs, casing, sources, options)
        hidden = {"branch": forked, "encoder": encoded.last_hidden_state}

        logits = {name: self.heads[name](hidden, mask, casing, self.config.pooling_mode) for name in names}
        task_losses = {name: task_loss(self.heads[name].spec, logits[name], y) for name, y in (labels or {}).items()}
        embeddings = self._embed(encoded.last_hidden_state, mask) if output_embedding else {}
        return MultiTaskOutput(
            last_hidden_state=encoded.last_hidden_state,
            **embeddings,
            logits=logits,
            loss=torch.stack([*task_losses.values()]).sum() if task_losses else None,
            task_losses=task_losses or None,
            hidden_states=encoded.hidden_states if output_hidden_states else None,
            attentions=encoded.attentions,
        )

    def _embed(self, hidden: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Returns the sentence embedding, float [B, E], and the encoder's own, float [B, H]."""
        pooled = pool(hidden, mask, self.config.pooling_mode)
        projected = pooled if self.linear is None else self.linear(pooled)
        return {"sentence_embedding": normalize(projected), "encoder_embedding": normalize(pooled)}

    def _encode(
        self, inputs: dict[str, Any], casing: Tensor, sources: set[str], options: dict[str, Any]
    ) -> tuple[Any, Tensor]:
        """Returns the encoder's output, and the branch's, float [B, T, H]; runs only the layers that `sources` need."""
        options = {**options, "return_dict": True}
        if self.task_branch is None or "branch" not in sources:
            encoded = self.encoder(**inputs, **options)
            return encoded, encoded.last_hidden_state
        trunk, top, branch = self._views
        plain = {**options, "output_hidden_states": False, "output_attentions": False}
        above = {name: inputs[name] for name in ("attention_mask", "position_ids") if name in inputs}
        if options["output_hidden_states"] or options["output_attentions"]:
            encoded = self.encoder(**inputs, **{**options, "output_hidden_states": True})
            forked = encoded.hidden_states[-1 - self.config.num_task_layers]
        else:  # layer by layer the same, without keeping what each of them gives
            forked = trunk(**inputs, **plain).last_hidden_state
            encoded = top(inputs_embeds=forked, **above, **plain) if "encoder" in sources else BaseModelOutput()
        return encoded, branch(inputs_embeds=self.task_branch(forked, casing), **above, **plain).last_hidden_state

    def _requested(self, tasks: Iterable[str] | None, labels: dict[str, Tensor] | None) -> list[str]:
        names = list(self.heads) if tasks is None else [tasks] if isinstance(tasks, str) else list(tasks)
        if unknown := [name for name in names if name not in self.heads]:
            raise ValueError(f"tasks holds {unknown}; this model's tasks are: {', '.join(self.heads) or 'none'}.")
        if labels is not None and not isinstance(labels, dict):
            raise ValueError(f"labels is a {type(labels).__name__}; it must be a dict that maps tasks to their labels.")
        if unused := [name for name in labels or {} if name not in names]:
            raise ValueError(f"labels are given for {unused}; the tasks computed here are: {', '.join(names) or 'none'}.")
        return names

    def _given(self, inputs: dict[str, Any], casing_ids: Tensor | None) -> tuple[dict[str, Any], Tensor, Tensor]:
        """Returns the inputs that are given and that the encoder knows, the mask and the casing, int [B, T] each."""
        inputs = {name: value for name, value in inputs.items() if value is not None}
        if "token_type_ids" not in self._encoder_inputs:
            inputs.pop("token_type_ids", None)
        tokens = inputs.get("input_ids", inputs.get("inputs_embeds"))
        if tokens is None:
            raise ValueError("Neither input_ids nor inputs_embeds is given; the encoder needs one of them.")
        length, limit = tokens.shape[1], self.max_length
        if not torch.compiler.is_compiling() and limit is not None and length > limit:
            raise ValueError(
                f"The input has {length} tokens; this encoder takes {limit}. Tokenize with truncation=True, or use "
                'pipeline("multitask"), which reads long texts in windows.'
            )
        mask = inputs.get("attention_mask")
        mask = tokens.new_ones(tokens.shape[:2], dtype=torch.long) if mask is None else mask
        casing = torch.zeros_like(mask, dtype=torch.long) if casing_ids is None else casing_ids  # 0: unknown
        if casing.shape != mask.shape:
            raise ValueError(f"casing_ids have shape {list(casing.shape)}; the input has {list(mask.shape)} tokens.")
        return inputs, mask, casing

    def add_task(self, name: str, spec: dict[str, Any]) -> None:
        """Adds a head with random weights, to be trained; every other output stays as it is, to the bit.

        Args:
            name: Name of the new task.
            spec: Its fields, see `TaskSpec`.

        Raises:
            ValueError: The name is taken or not allowed, or the spec is not well-formed.
        """
        if name in self.heads:
            raise ValueError(f"tasks has {name!r} already; remove_task({name!r}) first, or choose another name.")
        self.config.set_tasks({**self.config.tasks, name: spec})
        head = self.new_head(self.config.task_specs[name])
        for module in head.modules():
            self._init_weights(module)
        self.heads[name] = head.to(device=self.device, dtype=self.dtype).train(self.training)

    def remove_task(self, name: str) -> None:
        """Removes a head and its configuration; every other output stays as it is, to the bit.

        Raises:
            ValueError: There is no such task.
        """
        self._requested([name], None)
        self.config.set_tasks({task: spec for task, spec in self.config.tasks.items() if task != name})
        del self.heads[name]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *args: Any, config: Any = None, **kwargs: Any
    ) -> "MultiTaskModel":
        """Returns the model stored in a folder or on the Hub; takes what `PreTrainedModel.from_pretrained` takes.

        Raises:
            WeightsError: A weight is missing, unexpected, of another shape or unreadable, or the index is malformed.
            ImportError: The installed transformers cannot read a release's index.
        """
        if int(transformers_version.split(".")[0]) < 5:
            raise ImportError(
                f"transformers {transformers_version} is installed; a MultiTaskModel loads with 5.23 or newer: pip install -U "
                "transformers. With 4.51 or newer, SentenceTransformer gives the embedding, and handler.py everything."
            )
        hub = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
        with_info = kwargs.pop("output_loading_info", False)
        if not isinstance(config, PretrainedConfig):
            source = pretrained_model_name_or_path if config is None else config
            config, kwargs = cls.config_class.from_pretrained(source, return_unused_kwargs=True, **kwargs)
            kwargs = {**kwargs, **hub}
        # Mismatched sizes are reported below, with the field that disagrees.
        kwargs |= {"config": config, "output_loading_info": True, "ignore_mismatched_sizes": True}
        folder = pretrained_model_name_or_path
        weight_map = check_stored(folder, config, hub)
        try:
            model, info = super().from_pretrained(folder, *args, **kwargs)
        except (ImportError, ValueError):
            raise
        except Exception as error:  # of as many types as there are encoders and files
            raise WeightsError(
                f"{folder}: config.json describes no model that loads from these weights: {error!r}"
            ) from error
        refuse(folder, loading_problems(info, weight_map, config) or not_finite(model.named_parameters()))
        model.hub_options = hub
        return (model, info) if with_info else model  # type: ignore[return-value]  # a pair on request, as everywhere

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Writes a checkpoint: all weights unsplit, and the code. Save the tokenizer beside it.

        It loads through this class, the Auto classes and, if its code can be found, the pipeline. What
        sentence-transformers needs is written by `python -m release.export`.

        Raises:
            ValueError: `save_directory` holds a release, whose index and split weights would go stale.
        """
        if Path(save_directory, WEIGHTS_INDEX).exists():
            raise ValueError(
                f"{save_directory} holds a release ({WEIGHTS_INDEX}). Save to another folder, and write a release "
                "from it with `python -m release.export`."
            )
        super().save_pretrained(save_directory, **kwargs)
        # Transformers does not count the pipeline's files as the model's. Beside this file and in the local folder that the
        # model came from, they are of its own revision.
        for name in ("pipeline_multitask.py", "annotator_multitask.py", "learning_multitask.py"):
            target = Path(save_directory, name)
            sources = [Path(folder, name) for folder in (Path(__file__).parent, self.name_or_path) if folder]
            source = next((path for path in sources if path.exists()), target)
            if not source.exists():
                logger.warning(
                    f'{name} was not found; copy it into {save_directory} to load pipeline("multitask") from there.'
                )
            elif source.resolve() != target.resolve():
                shutil.copyfile(source, target)

    def push_to_hub(self, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """Uploads a checkpoint, see `save_pretrained`, and says that it is no release; returns what the base method does."""
        logger.warning(
            f"{repo_id} gets a checkpoint. SentenceTransformer cannot give its sentence embedding: it takes the mean of the "
            "encoder alone. Write a release with `python -m release.export` and publish it with `python -m release.publish`."
        )
        return super().push_to_hub(repo_id, *args, **kwargs)


class _HeadView(MultiTaskModel):
    """The whole model, seen through one of its heads: the standard output and configuration of that one task.

    The task, by default the first of the view's kind, becomes the first of the configuration, which is copied: a saved view
    opens on the same head.

    Raises:
        ValueError: There is no such task, or the configuration asks for labels that no task has.
    """

    kind: ClassVar[str]
    output_class: ClassVar[type[ModelOutput]]

    def __init__(self, config: MultiTaskConfig, task: str | None = None) -> None:
        config = copy.deepcopy(config)
        config.check()
        self.task = config.pick_task(self.kind, task)
        config.tasks = {self.task: config.tasks[self.task], **config.tasks}
        given = list(config.id2label.values())  # none, unless somebody asked for them while loading
        if given and given not in [fields["labels"] for fields in config.tasks.values()]:
            raise ValueError(
                f"num_labels or id2label asks for the labels {given}; the head {self.task!r} has "
                f"{config.tasks[self.task]['labels']}. Labels are part of a task: add_task(name, spec) makes a new head, "
                "remove_task(name) drops one."
            )
        super().__init__(config)
        spec = self.heads[self.task].spec
        self.config.id2label = dict(enumerate(spec.labels))
        self.config.label2id = {label: i for i, label in enumerate(spec.labels)}
        self.config.problem_type = spec.problem_type

    def remove_task(self, name: str) -> None:
        """Removes another head than the one that is shown; raises a ValueError for that one, or if there is none."""
        if name == self.task:
            raise ValueError(f"This view shows the task {name!r}; load the model with another task= to remove it.")
        super().remove_task(name)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        casing_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput | TokenClassifierOutput:
        """Returns the head's logits, float [B, C] or [B, T, C], and its loss if labels are given.

        The arguments are those of `MultiTaskModel.forward`, `labels` those of the one task. Texts beyond the encoder's
        length lose their end, with a warning: the standard pipelines do not truncate by themselves.
        """
        inputs: dict[str, Any] = {
            "input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids,
            "position_ids": position_ids, "inputs_embeds": inputs_embeds, "casing_ids": casing_ids,
        }  # fmt: skip
        inputs, labels = self._cut({name: x for name, x in inputs.items() if x is not None}, labels)
        labelled = None if labels is None else {self.task: labels}
        options = {"tasks": [self.task], "labels": labelled, "output_embedding": False, "return_dict": True}
        out = super().forward(**inputs, **{**kwargs, **options})
        return self.output_class(
            loss=out.loss, logits=out.logits[self.task], hidden_states=out.hidden_states, attentions=out.attentions
        )

    def _cut(self, inputs: dict[str, Tensor], labels: Tensor | None) -> tuple[dict[str, Tensor], Tensor | None]:
        """Returns inputs and labels without what the encoder cannot take."""
        length, limit = max((x.shape[1] for x in inputs.values()), default=0), self.max_length
        if limit is None or length <= limit:
            return inputs, labels
        mask = inputs.get("attention_mask")
        if mask is not None and not mask[:, 0].all():
            raise ValueError(
                f"A text of {length} tokens in a batch padded on the left cannot be cut to the {limit} that this "
                "encoder takes. Tokenize with truncation=True."
            )
        logger.warning_once(
            f"A text of {length} tokens is cut to the first {limit}, which is all that this encoder takes; "
            'pipeline("multitask") reads long texts in windows.'
        )
        labels = labels[:, :limit] if labels is not None and self.kind == TOKEN else labels
        return {name: x[:, :limit] for name, x in inputs.items()}, labels


class MultiTaskForSequenceClassification(_HeadView):
    """A `MultiTaskModel` that answers like transformers' sequence classifiers; `task=` picks the head."""

    kind = SEQUENCE
    output_class = SequenceClassifierOutput


class MultiTaskForTokenClassification(_HeadView):
    """A `MultiTaskModel` that answers like transformers' token classifiers; `task=` picks the head."""

    kind = TOKEN
    output_class = TokenClassifierOutput


MultiTaskModel.register_for_auto_class("AutoModel")
MultiTaskForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
MultiTaskForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
