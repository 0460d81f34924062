"""Loads the model and turns chunks of rows into results."""

import hashlib
import importlib.metadata
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow

from annotator_multitask import ONNX_FILES, checked_options, cpu_threads
from annotator_multitask import Annotator as Core
from bulk.sources import InputError, Item
from tasks_multitask import TOKEN, sha256

MODEL_FILES = ("config.json", "tokenizer*.json", "*_multitask.py", "*.safetensors", "*/*.safetensors", "onnx/*.onnx")
PIPELINE_OPTIONS = ("revision", "device", "backend", "dtype")
LIBRARIES = ("torch", "transformers", "tokenizers", "pyarrow", "onnxruntime")

Result = dict[str, Any]
Run = Callable[[list[str]], list[Result]]


@dataclass(frozen=True)
class Settings:
    """How texts are annotated; where a field is None, the pipeline's default holds."""

    model: str  # folder or Hub id
    revision: str | None = None  # commit, tag or branch on the Hub
    device: str | None = None  # for instance "cpu"; None: a GPU if there is one
    backend: str | None = None  # what runs the model
    dtype: str | None = None  # precision of PyTorch, such as "bfloat16"; None: that of the stored weights
    tasks: list[str] | None = None  # names of the tasks to compute; None: all
    embedding: bool = True  # whether results hold the sentence embedding
    batch_tokens: int | None = None  # tokens per batch, padding included
    threads: int | None = None  # CPU threads of each process; None: PyTorch's default, with ONNX Runtime `cpu_threads()`

    def divided(self, workers: int) -> "Settings":
        """Returns the settings for each of several processes that share the CPU."""
        if self.backend not in ONNX_FILES:
            import torch  # noqa: F401  # its default is what `cpu_threads` returns then
        return self if workers == 1 else replace(self, threads=max(1, cpu_threads() // workers))


def _content(model: str, revision: str | None) -> str:
    """Returns a hash of this package and of a model folder, or the commit of a model on the Hub."""
    if not Path(model).is_dir():
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=True)._commit_hash
    files = sorted(path for pattern in MODEL_FILES for path in Path(model).glob(pattern))
    digests = [sha256(path) for path in [*files, *sorted(Path(__file__).parent.glob("*.py"))]]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _load(settings: Settings) -> Core:
    """Returns an annotator that runs on PyTorch, or on ONNX Runtime without PyTorch's seconds and memory."""
    if settings.backend in ONNX_FILES:
        return Core.from_export(settings.model, settings.backend, settings.threads, revision=settings.revision)
    # oneDNN keeps a kernel for each shape of a batch, 1,024 by default: memory that a long file fills bit by bit.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    import torch
    from transformers import pipeline
    from transformers.utils import logging

    if settings.threads:
        torch.set_num_threads(settings.threads)
    logging.disable_progress_bar()
    given = {name: value for name in PIPELINE_OPTIONS if (value := getattr(settings, name)) is not None}
    return pipeline("multitask", model=settings.model, trust_remote_code=True, **given).annotator


class Annotator:
    """A loaded model with its options; raises an InputError if it does not load, a ValueError for a wrong option."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        with self._loading():
            self.core = _load(settings)
        given = {name: getattr(settings, name) for name in ("tasks", "embedding", "batch_tokens")}
        self.options = checked_options(self.core.model.config.tasks, **given)
        with self._loading():
            self(["a"])  # ONNX Runtime reads its file for the first text

    @contextmanager
    def _loading(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever its type, the model is what the user has to fix
            raise InputError(f"--model {self.settings.model} cannot be loaded: {error}") from error

    def __call__(self, texts: list[str]) -> list[Result]:
        return list(self.core.stream(texts, **self.options))

    @property
    def device(self) -> str:
        """What computes, for instance "cpu"."""
        return str(getattr(self.core.model, "device", "cpu"))

    def map_weights(self, path: Path) -> None:
        """Replaces the weights by those in a `torch.save` file, whose memory all processes share."""
        import torch

        self.core.model.load_state_dict(torch.load(path, mmap=True), assign=True)

    def identity(self) -> dict[str, Any]:
        """Returns everything that decides the results: options, content of the model, this code, library versions."""
        settings = self.settings
        found = {f"--{x.replace('_', '-')}": getattr(settings, x) for x in (*PIPELINE_OPTIONS, "tasks", "batch_tokens")}
        found["--no-embedding"] = not settings.embedding
        found["content of --model"] = _content(settings.model, settings.revision)
        found["actual device"] = self.device
        found["threads per process"] = settings.threads or cpu_threads()
        for name in LIBRARIES:
            with suppress(importlib.metadata.PackageNotFoundError):
                found["version of " + name] = importlib.metadata.version(name)
        return found

    def schema(self) -> pyarrow.Schema:
        """Returns the parquet schema of the results."""
        config, names = self.core.model.config, self.settings.tasks
        text, number, index = pyarrow.string(), pyarrow.float32(), pyarrow.int64()
        entity = pyarrow.struct({"entity_group": text, "score": number, "word": text, "start": index, "end": index})
        labels, entities = {}, {}
        for name, spec in config.task_specs.items():
            if names is not None and name not in names:
                continue
            scores = pyarrow.struct(dict.fromkeys(spec.labels, number))
            if spec.kind == TOKEN:
                entities[name] = pyarrow.list_(entity)
            elif spec.problem_type == "regression":
                labels[name] = pyarrow.struct({"values": scores})
            elif spec.problem_type == "multi_label_classification":
                labels[name] = pyarrow.struct({"labels": pyarrow.list_(text), "scores": scores})
            else:
                labels[name] = pyarrow.struct({"label": text, "score": number, "scores": scores})
        columns = {"row": index, "text": text, "error": text}
        if self.settings.embedding:
            columns["sentence_embedding"] = pyarrow.list_(number, config.embedding_dim or config.hidden_size)
        columns |= {name: pyarrow.struct(tasks) for name, tasks in (("labels", labels), ("entities", entities)) if tasks}
        return pyarrow.schema(columns)


def annotate(chunk: list[Item], run: Run) -> list[Result]:
    """Returns a result for every row, in order: its number, its text, and its record or an error."""
    records = iter(_records([text for _, text, problem in chunk if problem is None], run))
    results = []
    for row, text, problem in chunk:
        record = next(records) if problem is None else problem
        if isinstance(record, str):
            results.append({"row": row, "text": None, "error": f"row {row} {record}"})
        else:
            results.append({"row": row, "text": text, "error": None, **record})
    return results


def _records(texts: list[str], run: Run) -> list[Result | str]:
    """Returns the record of each text, or what went wrong with it."""
    try:
        return run(texts)
    except Exception as error:
        run(["a"])  # raises unless the texts are to blame
        if len(texts) == 1:
            return [f"cannot be annotated: {type(error).__name__}: {error}"]
        return [record for text in texts for record in _records([text], run)]
