"""The multi-task sentence transformer: one encoder pass gives a sentence embedding, text labels and word labels.

Read it from the top: pooling, one head, its loss, the model around them, the two views that show a single head through
transformers' standard classes, and at the end what makes sure that all weights are there.

Axes: B batch, T tokens, H hidden, E embedding, C labels, L layers.
"""

import copy
import inspect
import json
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import MODEL_MAPPING, PretrainedConfig, PreTrainedModel  # names that transformers 4 knows too: handler.py
from transformers import __version__ as transformers_version
from transformers.modeling_outputs import ModelOutput, SequenceClassifierOutput, TokenClassifierOutput
from transformers.utils import cached_file, logging
from transformers.utils.generic import can_return_tuple

try:
    if not TYPE_CHECKING:  # mypy checks these files as they lie in the repository, without a package
        from .configuration_multitask import CASINGS, SEQUENCE, TOKEN, WEIGHTS_INDEX, MultiTaskConfig, TaskSpec, is_inside
except ImportError:  # no package around this file: imported from the repository's root, by its own scripts
    from configuration_multitask import CASINGS, SEQUENCE, TOKEN, WEIGHTS_INDEX, MultiTaskConfig, TaskSpec, is_inside

logger = logging.get_logger(__name__)

IGNORE_INDEX = -100
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class WeightsError(Exception):
    """The stored weights and the configuration do not make a whole model.

    Neither a ValueError nor an OSError: `transformers.pipeline` answers those by trying the plain encoder instead.
    """


@dataclass
class MultiTaskOutput(ModelOutput):
    """Everything that one pass gives.

    Attributes:
        last_hidden_state: float [B, T, H], the encoder's last layer.
        sentence_embedding: float [B, E], unit length (zero for a row whose attention mask is all zero).
        logits: Maps each requested task to float [B, C] (sequence tasks) or [B, T, C] (token tasks).
        loss: float [], the sum of `loss_weight` times each labelled task's loss; None without labels.
        task_losses: Maps each labelled task to its unweighted loss, float [].
        hidden_states: L + 1 tensors [B, T, H], if asked for.
        attentions: L tensors [B, heads, T, T], if asked for.
    """

    last_hidden_state: Tensor | None = None
    sentence_embedding: Tensor | None = None
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


def mix_layers(weights: Tensor, hidden_states: tuple[Tensor, ...]) -> Tensor:
    """Returns the sum of the L + 1 layers' token vectors by the softmax of `weights`, float [B, T, H]."""
    weighted = [weight * layer for weight, layer in zip(weights.softmax(dim=0), hidden_states, strict=True)]
    return sum(weighted[1:], start=weighted[0])


class TokenWindow(nn.Conv1d):
    """A linear layer that reads each token together with its neighbours on either side; there are zeros around a text."""

    def __init__(self, in_dim: int, out_dim: int, kernel_size: int) -> None:
        super().__init__(in_dim, out_dim, kernel_size, padding=kernel_size // 2)

    def forward(self, vectors: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]  # it must know the padding
        """Returns float [B, T, out_dim] for vectors [B, T, in_dim]; what stands in the padding has no influence."""
        return super().forward((vectors * mask.unsqueeze(-1)).transpose(1, 2)).transpose(1, 2)


class CasingEmbedding(nn.Module):
    """A vector for how each word is written, seen together with its two neighbours on either side.

    A capital says less in a headline where every word has one.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(CASINGS), dim)
        self.context = TokenWindow(dim, dim, kernel_size=5)

    def forward(self, casing_ids: Tensor, mask: Tensor) -> Tensor:
        """Returns float [B, T, casing_dim] for indices into `CASINGS`, int [B, T]; padding has no influence."""
        return F.gelu(self.context(self.embedding(casing_ids), mask))


class TaskHead(nn.Module):
    """One classifier on the shared encoder: optional layer mix, casing and hidden layer, dropout, linear."""

    def __init__(self, spec: TaskSpec, hidden_size: int, num_layers: int) -> None:
        super().__init__()
        self.spec = spec
        self.layer_weights = nn.Parameter(torch.zeros(num_layers + 1)) if spec.layer_mix else None
        self.casing = CasingEmbedding(spec.casing_dim) if spec.casing_dim else None
        features = hidden_size + (spec.casing_dim or 0)
        self.dense: nn.Module | None = None
        if spec.hidden_dim is not None:
            new = nn.Linear if spec.kernel_size == 1 else partial(TokenWindow, kernel_size=spec.kernel_size)
            self.dense = new(features, spec.hidden_dim)
        self.dropout = nn.Dropout(spec.classifier_dropout)
        self.classifier = nn.Linear(spec.hidden_dim or features, len(spec.labels))

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns logits, float [..., C], for features [..., H]; a head with a kernel reads tokens, of `mask`, int [B, T]."""
        if self.dense is not None:
            features = F.gelu(self.dense(features, mask) if isinstance(self.dense, TokenWindow) else self.dense(features))
        return self.classifier(self.dropout(features)) / self.spec.temperature


def task_loss(spec: TaskSpec, logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the mean loss over the labels that are not -100; zero (with a graph) if there are none.

    Args:
        spec: The task.
        logits: float [B, C] or, for token tasks, [B, T, C].
        labels: int [B] (single label) or [B, T] (token); 0/1 [B, C] (multi-label); float [B] or [B, C] (regression).

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
    logits, kept = logits.float(), labels != IGNORE_INDEX
    if spec.problem_type == "regression":
        losses = (logits - labels) ** 2
    elif spec.problem_type == "multi_label_classification":
        losses = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none")
    else:
        losses = F.cross_entropy(logits.flatten(0, -2), labels.flatten().long(), reduction="none").view_as(labels)
    return losses.masked_fill(~kept, 0.0).sum() / kept.sum().clamp(min=1)


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
        self.heads = nn.ModuleDict({name: self._new_head(spec) for name, spec in config.task_specs.items()})
        self.post_init()

    def _new_head(self, spec: TaskSpec) -> TaskHead:
        return TaskHead(spec, self.config.hidden_size, self.config.num_hidden_layers)

    def _head(self, name: str) -> TaskHead:
        return cast(TaskHead, self.heads[name])

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TaskHead) and module.layer_weights is not None:
            nn.init.zeros_(module.layer_weights)

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
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> MultiTaskOutput:
        """Returns embedding, logits and, where labels are given, losses.

        Args:
            input_ids: int [B, T].
            attention_mask: int [B, T], 1 for tokens and 0 for padding; None: every position is a token.
            token_type_ids: int [B, T]; not passed on to encoders that know none.
            position_ids: int [B, T].
            inputs_embeds: float [B, T, H] in place of `input_ids`.
            casing_ids: int [B, T], how each token's word is written, as indices into `CASINGS`; None: unknown. Only heads
                with a `casing_dim` read them; the embedding never does.
            tasks: Names of the heads to compute; None: all; empty: the embedding alone.
            labels: Maps any subset of the computed tasks to its labels, see `task_loss`. -100 marks what has no label.
            output_hidden_states: Whether to return all layers' token vectors.
            output_attentions: Whether to return attention probabilities (needs `attn_implementation="eager"`).
            **kwargs: Passed to the encoder.

        Raises:
            ValueError: An unknown task, labels for a task that is not computed, labels of another shape, or more
                tokens than the encoder takes.
        """
        names = self._requested(tasks, labels)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        heads = {name: self._head(name) for name in names}
        mixing = any(head.layer_weights is not None for head in heads.values())
        inputs: dict[str, Any] = {
            "input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids,
            "position_ids": position_ids, "inputs_embeds": inputs_embeds, "output_attentions": output_attentions,
        }  # fmt: skip
        inputs = {name: value for name, value in inputs.items() if value is not None}
        if "token_type_ids" not in self._encoder_inputs:
            inputs.pop("token_type_ids", None)
        self._check_length(inputs)
        encoded = self.encoder(**inputs, output_hidden_states=output_hidden_states or mixing, return_dict=True, **kwargs)

        hidden = encoded.last_hidden_state  # [B, T, H]
        mask = hidden.new_ones(hidden.shape[:2], dtype=torch.long) if attention_mask is None else attention_mask
        pooled = pool(hidden, mask, self.config.pooling_mode)  # [B, H]
        casing = torch.zeros_like(mask) if casing_ids is None else casing_ids  # 0: unknown
        if casing.shape != mask.shape:
            raise ValueError(f"casing_ids have shape {list(casing.shape)}; the input has {list(mask.shape)} tokens.")
        logits = {name: self.head_logits(head, encoded, pooled, mask, casing) for name, head in heads.items()}
        task_losses = {name: task_loss(heads[name].spec, logits[name], y) for name, y in (labels or {}).items()}
        embedding = pooled if self.linear is None else self.linear(pooled)  # [B, E]
        weighted = [heads[name].spec.loss_weight * loss for name, loss in task_losses.items()]
        return MultiTaskOutput(
            last_hidden_state=hidden,
            # In float32: half precision cannot hold the bound that keeps a zero vector zero.
            sentence_embedding=F.normalize(embedding.float(), dim=-1).to(embedding.dtype),
            logits=logits,
            loss=sum(weighted[1:], start=weighted[0]) if weighted else None,
            task_losses=task_losses or None,
            hidden_states=encoded.hidden_states if output_hidden_states else None,
            attentions=encoded.attentions,
        )

    def _requested(self, tasks: Iterable[str] | None, labels: dict[str, Tensor] | None) -> list[str]:
        names = list(self.heads) if tasks is None else [tasks] if isinstance(tasks, str) else list(tasks)
        if unknown := [name for name in names if name not in self.heads]:
            raise ValueError(f"tasks holds {unknown}; this model's tasks are: {', '.join(self.heads) or 'none'}.")
        if labels is not None and not isinstance(labels, dict):
            raise ValueError(f"labels is a {type(labels).__name__}; it must be a dict that maps tasks to their labels.")
        if unused := [name for name in labels or {} if name not in names]:
            raise ValueError(f"labels are given for {unused}; the tasks computed here are: {', '.join(names) or 'none'}.")
        return names

    def _check_length(self, inputs: dict[str, Any]) -> None:
        if "input_ids" not in inputs and "inputs_embeds" not in inputs:
            raise ValueError("Neither input_ids nor inputs_embeds is given; the encoder needs one of them.")
        length, limit = inputs["input_ids" if "input_ids" in inputs else "inputs_embeds"].shape[1], self.max_length
        if not torch.compiler.is_compiling() and limit is not None and length > limit:
            raise ValueError(
                f"The input has {length} tokens; this encoder takes {limit}. Tokenize with truncation=True, or use "
                'pipeline("multitask"), which reads long texts in windows.'
            )

    def head_logits(self, head: TaskHead, encoded: ModelOutput, pooled: Tensor, mask: Tensor, casing_ids: Tensor) -> Tensor:
        """Returns one head's logits, float [B, C] or [B, T, C], from what the encoder has given.

        Args:
            head: One of `heads`.
            encoded: Its `last_hidden_state` [B, T, H] and, for a head that mixes layers, `hidden_states` are read.
            pooled: float [B, H], its pooled vectors.
            mask: int [B, T].
            casing_ids: int [B, T], see `forward`.
        """
        weights = head.layer_weights
        hidden = encoded.last_hidden_state if weights is None else mix_layers(weights, encoded.hidden_states)  # [B, T, H]
        if head.spec.kind == TOKEN:
            casing = [] if head.casing is None else [head.casing(casing_ids, mask)]
            return head(torch.cat([hidden, *casing], dim=-1), mask)
        if weights is not None or head.spec.pooling_mode is not None:
            pooled = pool(hidden, mask, head.spec.pooling_mode or self.config.pooling_mode)
        return head(pooled)

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
        head = self._new_head(self.config.task_specs[name])
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
        kwargs.pop("ignore_mismatched_sizes", None)  # never: it would leave random weights
        if not isinstance(config, PretrainedConfig):
            source = pretrained_model_name_or_path if config is None else config
            config, kwargs = cls.config_class.from_pretrained(source, return_unused_kwargs=True, **kwargs)
            kwargs = {**kwargs, **hub}
        weight_map = _read_weight_map(pretrained_model_name_or_path, config, hub)
        _refuse(pretrained_model_name_or_path, _misfits(pretrained_model_name_or_path, weight_map, config, hub))
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path,
                *args,
                config=config,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are reported below, with the field that disagrees
                **kwargs,
            )
        except (OSError, SafetensorError) as error:
            files = sorted(set(weight_map.values())) or ["model.safetensors"]
            raise WeightsError(_unreadable(pretrained_model_name_or_path, files, hub, error)) from error
        _refuse(pretrained_model_name_or_path, _loading_problems(info, weight_map, config))
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
        self._save_pipeline_code(save_directory)

    def push_to_hub(self, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """Uploads a checkpoint, see `save_pretrained`, and says that it is no release; returns what the base method does."""
        logger.warning(
            f"{repo_id} gets a checkpoint. SentenceTransformer cannot give its sentence embedding: it takes the mean of the "
            "encoder alone. Write a release with `python -m release.export` and publish it with `python -m release.publish`."
        )
        return super().push_to_hub(repo_id, *args, **kwargs)

    def _save_pipeline_code(self, save_directory: str | Path) -> None:
        """Copies the pipeline's file, which transformers does not count as the model's.

        It is looked for beside this file and in the local folder that the model came from: both are of its own revision.
        """
        target = Path(save_directory, "pipeline_multitask.py")
        for folder in filter(None, (Path(__file__).parent, self.name_or_path)):
            source = Path(folder, target.name)
            if source.exists() and source.resolve() != target.resolve():
                shutil.copyfile(source, target)
                return
        if not target.exists():
            logger.warning(
                f'{target.name} was not found; copy it into {save_directory} to load pipeline("multitask") from there.'
            )


class _HeadView(MultiTaskModel):
    """The whole model, seen through one of its heads: the standard output and configuration of that one task.

    The task becomes the first of the configuration, so that a saved view opens on the same head.

    Args:
        config: The model's configuration, which is copied.
        task: Name of a task of the view's kind; None: the first one.

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
        _refuse_other_labels(config, self.task)
        super().__init__(config)
        spec = self._head(self.task).spec
        self.config.id2label = dict(enumerate(spec.labels))
        self.config.label2id = {label: i for i, label in enumerate(spec.labels)}
        self.config.problem_type = spec.problem_type

    def remove_task(self, name: str) -> None:
        """Removes another head than the one that is shown.

        Raises:
            ValueError: There is no such task, or it is the one that this view shows.
        """
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
        out = super().forward(**inputs, tasks=[self.task], labels=labelled, return_dict=True, **kwargs)
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


def _refuse_other_labels(config: MultiTaskConfig, task: str) -> None:
    """Raises a ValueError if `num_labels` or `id2label` was passed while loading, and asks for another head than stored."""
    given = list(config.id2label.values())
    if given != ["LABEL_0", "LABEL_1"] and given not in [fields["labels"] for fields in config.tasks.values()]:
        raise ValueError(
            f"num_labels or id2label asks for the labels {given}; the head {task!r} has {config.tasks[task]['labels']}. "
            "Labels are part of a task: add_task(name, spec) makes a new head, remove_task(name) drops one."
        )


class MultiTaskForSequenceClassification(_HeadView):
    """A `MultiTaskModel` that answers like transformers' sequence classifiers; `task=` picks the head."""

    kind = SEQUENCE
    output_class = SequenceClassifierOutput


class MultiTaskForTokenClassification(_HeadView):
    """A `MultiTaskModel` that answers like transformers' token classifiers; `task=` picks the head."""

    kind = TOKEN
    output_class = TokenClassifierOutput


# Reading stored weights: what `from_pretrained` checks, and how it says what is wrong


def check_weight_map(index: Any, source: str) -> dict[str, str]:
    """Returns the weight map of a parsed index after checking its form.

    Raises:
        WeightsError: It is no index, or names a file outside its folder or one that is not safetensors.
    """
    fields = index if isinstance(index, dict) else {}
    weight_map = fields.get("weight_map")
    if not isinstance(fields.get("metadata"), dict) or not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{source}: needs the objects 'metadata' and 'weight_map' at its root, the latter not empty.")
    for key, file in weight_map.items():
        if not is_inside(file, ".safetensors"):
            raise WeightsError(
                f"{source}: weight_map[{key!r}] is {file!r}; allowed: a *.safetensors file inside the model's folder."
            )
    return weight_map


def _read_weight_map(folder: str | Path | None, config: MultiTaskConfig, hub: dict[str, Any]) -> dict[str, str]:
    index_name = getattr(config, "transformers_weights", None)
    if folder is None or index_name is None:
        return {}
    try:
        return check_weight_map(json.loads(Path(cached_file(folder, index_name, **hub)).read_text("utf-8")), index_name)
    except (OSError, RecursionError, ValueError) as error:  # no such file, JSON nested too deep, no JSON or no UTF-8
        raise WeightsError(
            f"{index_name}, which config.json names in 'multitask_weights', is unreadable: {error}"
        ) from error


def _unreadable(folder: str | Path, files: list[str], hub: dict[str, Any], error: Exception) -> str:
    """Returns a message that names the file of `files` which made loading fail, if one can be told."""
    for file in files:
        try:
            with safe_open(cached_file(folder, file, **hub), framework="pt"):
                pass
        except Exception as cause:
            return f"{folder}: the weights file {file} is missing or broken ({cause}). Fetch it again."
    return f"{folder}: the weights could not be read: {error}"


def blank_model(config: MultiTaskConfig) -> MultiTaskModel:
    """Returns the model that a configuration describes, on the meta device, where weights have shapes and no numbers.

    Raises:
        ValueError: A field is not allowed.
        WeightsError: No encoder can be built from its fields.
    """
    try:
        with torch.device("meta"):
            return MultiTaskModel(copy.deepcopy(config))
    except (ImportError, ValueError):
        raise
    except Exception as error:  # of as many types as there are encoders
        raise WeightsError(f"config.json describes no model that can be built: {error!r}") from error


def _misfits(
    folder: str | Path | None, weight_map: dict[str, str], config: MultiTaskConfig, hub: dict[str, Any]
) -> list[str]:
    """Returns one line for each stored weight that has another shape or kind of number than the configuration asks for.

    This is known before loading, which would make room for whatever a broken configuration asks for. A file that cannot
    be read is left to it, and so are quantized weights, whose shapes differ by nature.
    """
    if folder is None or getattr(config, "quantization_config", None) is not None:
        return []
    blank, problems = blank_model(config), []
    prefix = f"{blank.base_model_prefix}."
    described = {name: x for key, x in blank.state_dict().items() for name in (key, key.removeprefix(prefix))}
    for file in sorted(set(weight_map.values())) or ["model.safetensors"]:
        with suppress(OSError, SafetensorError), safe_open(cached_file(folder, file, **hub), framework="pt") as weights:
            for key in set(weights.keys()) & set(described):
                stored, expected = weights.get_slice(key), described[key]
                if stored.get_shape() != list(expected.shape):
                    problems.append(_shape_problem(key, file, stored.get_shape(), expected.shape, config))
                elif expected.is_floating_point() != stored.get_dtype().startswith(("F", "BF")):
                    problems.append(
                        f"{key}: {file} holds numbers of type {stored.get_dtype()}, a weight is of {expected.dtype}"
                    )
    return sorted(problems)


def _shape_problem(key: str, file: str, stored: Iterable[int], expected: Iterable[int], config: MultiTaskConfig) -> str:
    problem = f"{key}: {file} holds shape {list(stored)}, config.json asks for {list(expected)}"
    task = key.split(".")[1] if key.startswith("heads.") else None
    return problem if task is None else f"{problem} (tasks.{task}.labels has {len(config.tasks[task]['labels'])} labels)"


def _loading_problems(info: dict[str, Any], weight_map: dict[str, str], config: MultiTaskConfig) -> list[str]:
    """Returns one line for each weight that did not load as it should."""

    def where(key: str) -> str:  # the index holds the encoder's keys without the model's prefix
        return weight_map.get(key) or weight_map.get(key.partition(".")[2]) or "the stored weights"

    problems = [f"{key}: missing in {where(key)}" for key in sorted(info["missing_keys"])]
    problems += [f"{key}: stored, but config.json describes no such weight" for key in sorted(info["unexpected_keys"])]
    return problems + [
        _shape_problem(key, where(key), stored, expected, config)
        for key, stored, expected in sorted(info["mismatched_keys"])
    ]


def _refuse(folder: str | Path | None, problems: list[str]) -> None:
    if problems:
        raise WeightsError("\n  ".join([f"{folder} is not a whole model:", *problems]))


MultiTaskModel.register_for_auto_class("AutoModel")
MultiTaskForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
MultiTaskForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
