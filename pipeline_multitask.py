"""`pipeline("multitask", model=repo, trust_remote_code=True)`: an `Annotator` behind the interface of transformers' pipelines.

Axes: E embedding, H hidden.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import Pipeline

try:
    if not TYPE_CHECKING:  # mypy checks these files outside a package
        from .annotator_multitask import BACKENDS, Annotator, OnnxModel, checked_options, checked_text, text_problem
except ImportError:  # no package around this file: imported from the repository's root, by its own scripts
    from annotator_multitask import BACKENDS, Annotator, OnnxModel, checked_options, checked_text, text_problem

GPU_BATCH_TOKENS = 16384  # token budget of one batch: a GPU wants to be filled


@torch.inference_mode()
def run_torch(
    model: Any, device: torch.device, inputs: dict[str, np.ndarray], tasks: list[str], vector: str | None
) -> tuple[np.ndarray | None, dict[str, np.ndarray]]:
    """Returns a `MultiTaskModel`'s vectors named `vector`, float32 [B, E], and the logits of each task, for a batch."""
    tensors = {name: torch.from_numpy(value).to(device) for name, value in inputs.items()}
    out = model(**tensors, tasks=tasks, output_embedding=vector is not None)
    logits = {name: value.float().cpu().numpy() for name, value in out.logits.items()}
    if vector is None:
        return None, logits
    vectors = out[vector]
    if vectors.dtype != torch.float32:
        vectors = torch.nn.functional.normalize(vectors.float(), dim=-1)  # exactly unit length again
    return vectors.cpu().numpy(), logits


def make_annotator(model: Any, tokenizer: Any, device: torch.device, backend: str = "torch") -> Annotator:
    """Returns the annotator of a `MultiTaskModel` on `device`, which is put into evaluation mode, and its fast tokenizer.

    Raises:
        ValueError: The tokenizer is slow or does not fit the model's vocabulary, or the backend is not there.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"The multitask pipeline needs a fast tokenizer, and got {type(tokenizer).__name__}.")
    max_length = min(limit for limit in (tokenizer.model_max_length, model.max_length) if limit is not None)
    forward: Any = partial(run_torch, model.eval(), device) if backend == "torch" else OnnxModel(model, backend)
    budget = {} if device.type == "cpu" else {"batch_tokens": GPU_BATCH_TOKENS}
    return Annotator(model, tokenizer.backend_tokenizer, max_length, tokenizer.pad_token_id or 0, forward, backend, **budget)


class MultiTaskPipeline(Pipeline):
    """Turns texts into records with a `MultiTaskModel`.

    A record holds, for the tasks asked for:

    - `"sentence_embedding"`: float32 [E], unit length, unless `embedding=False`; with `embedding="encoder"` in its place
      `"encoder_embedding"`, float32 [H], the encoder's own vector before the projection;
    - `"labels"`: maps each sequence task to `{"label", "score", "scores"}`; a multi-label task to `{"labels", "scores"}`;
      a regression task to `{"values"}`;
    - `"entities"`: maps each token task to a list of `{"entity_group", "score", "word", "start", "end"}` in the order
      of the text, where `text[start:end] == word`. A task whose labels are not a BIO scheme lists every word.

    A text that is longer than the model's window is read in windows that overlap by a quarter. A word is labelled in
    the window that shows most of its context; class logits and embeddings are averages over the windows,
    weighted by their tokens.

    Args:
        backend: What runs the model: "torch", or an export that `python -m release.onnx` has written, as it is ("onnx") or
            in 8-bit integers ("onnx-int8").
    """

    _load_tokenizer = True
    _load_processor = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False

    def __init__(self, *args: Any, backend: str = "torch", **kwargs: Any) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"backend is {backend!r}; allowed: {', '.join(BACKENDS)}.")
        super().__init__(*args, **kwargs)
        if not hasattr(self.model, "heads") or hasattr(self.model, "task"):  # a head view has a `task`
            raise ValueError(
                f"The multitask pipeline needs a MultiTaskModel, and got a {type(self.model).__name__}. Load the model "
                "with AutoModel.from_pretrained(..., trust_remote_code=True) to see why it did not load."
            )
        if self._batch_size is not None:
            raise ValueError(f"batch_size is {self._batch_size}, and has no meaning here; use batch_tokens.")
        self.annotator = make_annotator(self.model, self.tokenizer, self.device, backend)

    def _sanitize_parameters(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        return {}, checked_options(self.model.config.tasks, **options), {}

    def __call__(self, inputs: Any, **options: Any) -> Any:
        """Returns a record for a text, a list of records for a list, and an iterator of records for any other iterable.

        Args:
            inputs: A str, or an iterable of them.
            **options: `tasks` (names of the tasks to compute; default all), `embedding` (whether to give the
                embedding, or "encoder" for the encoder's own; default True), `min_score` (answers below it become None, and
                entities below it are left out; in [0, 1], default 0), `batch_tokens` (tokens in one batch, padding included).

        Raises:
            ValueError: An option or an item is not allowed; the message names it, and its index for an item.
        """
        options = {**self._forward_params, **self._sanitize_parameters(**options)[1]}
        if isinstance(inputs, str):
            return next(self.annotator.stream([inputs], **options))
        if hasattr(inputs, "__getitem__") and hasattr(inputs, "__len__") and not isinstance(inputs, Iterable):
            inputs = map(inputs.__getitem__, range(len(inputs)))  # transformers' KeyDataset, for instance
        if isinstance(inputs, bytes | dict) or not isinstance(inputs, Iterable):
            raise ValueError(f"inputs {text_problem(inputs)}, nor a list of texts.")
        if isinstance(inputs, list | tuple):
            return list(self.annotator.stream(list(map(checked_text, count(), inputs)), **options))
        return self.annotator.stream(inputs, **options)

    def preprocess(self, *_: Any, **options: Any) -> Any:
        """Not used: the base class asks for these three methods, and `__call__` goes by the annotator."""
        raise NotImplementedError

    _forward = postprocess = preprocess

    def add_task(
        self,
        name: str,
        texts: Iterable[str],
        targets: Iterable[Any],
        /,
        *,
        labels: Sequence[str] | None = None,
        seed: int = 0,
        progress: bool | None = None,
        refit: bool = False,
        **settings: Any,
    ) -> dict[str, Any]:
        """Learns a new task from examples; every other output and weight stays as it is, to the bit.

        The kind of task follows from the labels: str (one label), lists of str (any number of labels), numbers (regression),
        or lists of (start, end, label) (entities, by character offsets). Rows whose text or label is missing are left out.

        Args:
            name: Name of the new task.
            texts: The texts.
            targets: The label of each text.
            labels: The label names in their order; None: sorted. For numbers, the value's name.
            seed: Decides what is held out, and how entities are trained.
            progress: Whether to show progress bars; None: on a terminal.
            refit: Whether a task of this name may be replaced.
            **settings: `reads` (default "both"), `pooling_mode` and `fallback` of a head for texts; `hidden_dim`,
                `casing_dim`, `classifier_dropout` and `epochs` of one for entities.

        Returns:
            A report: the `metric` and `score` on held-out examples (a fifth; each fifth in turn where they are few), the
            `confusions` that are most frequent as (label, answer, count), how many `rows` were used, `left_out`, `duplicates`
            and `contradicting_texts`, and `notes`, sentences on what to check.

        Raises:
            ValueError: The examples are not what a head can learn from, or the name is taken. The model stays as it was.
        """
        try:
            from .learning_multitask import add_task  # type: ignore[import-not-found]  # mypy checks without a package
        except ImportError:
            from learning_multitask import add_task
        return add_task(self.annotator, name, texts, targets, labels, seed, progress, refit, **settings)

    def remove_task(self, name: str) -> None:
        """Removes a task; every other output stays as it is, to the bit.

        Raises:
            ValueError: There is no such task.
        """
        self.model.remove_task(name)
