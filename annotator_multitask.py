"""Texts in, records out: the one place that cuts texts into windows, runs the model and decodes its answers.

`pipeline("multitask", …)` calls an `Annotator`; so do the command line and whatever else serves the model. One that
`Annotator.from_export` returns needs numpy, tokenizers and onnxruntime alone: neither PyTorch nor transformers is imported,
which takes most of the seconds and of the memory of a short run. Axes: W words, C labels, E embedding.
"""

import copy
import json
import os
import reprlib
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import count, groupby
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from tokenizers import Encoding, Tokenizer

try:
    if not TYPE_CHECKING:  # mypy checks these files outside a package
        from .tasks_multitask import CASINGS, TOKEN, TaskSpec, is_number, require, sha256
except ImportError:  # no package around this file: imported from the repository's root, by its own scripts
    from tasks_multitask import CASINGS, TOKEN, TaskSpec, is_number, require, sha256

Span = tuple[int, int]
Record = dict[str, Any]
Item = TypeVar("Item")
# A chunk of texts is sorted by length and computed before the next is read: this bounds the memory of a stream.
CHUNK_TEXTS = 1024
CHUNK_CHARACTERS = 1_000_000
CPU_BATCH_TOKENS = 1024  # token budget of one batch: small batches stay in a CPU's caches
# No language writes more marks on one character; a text that does must not take the square of its length.
MOST_MARKS = 30
# Where `python -m release.onnx` writes the model, by the name of the backend that runs it.
ONNX_FILES = {"onnx": "onnx/model.onnx", "onnx-int8": "onnx/model_quantized.onnx"}
BACKENDS = ("torch", *ONNX_FILES)
# ONNX Runtime joins additions and layer norms to operators that take several times as long on a CPU as both by themselves.
SLOW_FUSIONS = ["SkipLayerNormFusion"]
# An ONNX session computes its whole graph. Of a model with a task branch, two more files hold the graph of the embeddings
# alone and that of the logits alone; their weights are those in the file of the whole graph, which is beside them.
ONNX_PARTS = ("embedding", "tasks")
# Which of the model's outputs a record holds, by the option `embedding`.
VECTORS: dict[bool | str, str | None] = {True: "sentence_embedding", False: None, "encoder": "encoder_embedding"}
# Ekman's six basic emotions and neutral, as the authors of GoEmotions group their 28 labels (Demszky et al. 2020).
EKMAN = {
    "anger": ("anger", "annoyance", "disapproval"),
    "disgust": ("disgust",),
    "fear": ("fear", "nervousness"),
    "joy": (
        "joy", "amusement", "approval", "excitement", "gratitude", "love", "optimism", "relief", "pride", "admiration",
        "desire", "caring",
    ),
    "sadness": ("sadness", "disappointment", "embarrassment", "grief", "remorse"),
    "surprise": ("surprise", "realization", "confusion", "curiosity"),
    "neutral": ("neutral",),
}  # fmt: skip


def text_problem(value: object) -> str | None:
    """Returns why `value` cannot be annotated, or None if it can: any text can, even an empty one."""
    if not isinstance(value, str):
        return f"is {reprlib.repr(value):.50} ({type(value).__name__}), not a text"  # however deep it is nested
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"is no valid Unicode: a lone surrogate at character {error.start}"
    return None


def word_starts(text: str, offsets: Sequence[Span], word_ids: Sequence[int | None]) -> tuple[list[Span], list[bool]]:
    """Returns each token's character span without surrounding spaces, and whether a new word starts there.

    A word ends where the tokenizer's does, and also around punctuation and symbols, so that "Paris." is two words
    whichever tokenizer made the tokens. Marks belong to the character before them. Special tokens start no
    word, nor do pieces of a single character, nor a window that begins inside a word.
    """
    spans: list[Span] = []
    starts: list[bool] = []
    previous_word, previous_end = None, -1
    for (start, end), word in zip(offsets, word_ids, strict=True):
        while start < end and text[start].isspace():
            start += 1
        limit = min(len(text), end + MOST_MARKS)
        while start < end < limit and _is_mark(text[end]):  # marks that the tokenizer strips
            end += 1
        spans.append((start, end))
        if word is None or start >= end or _is_mark(text[start]):
            starts.append(False)
            continue
        joined = start > 0 and _joins_words(text[start - 1]) and _joins_words(text[start])
        after_mark = start > 0 and _is_mark(text[start - 1])
        other_word = previous_word is not None and word != previous_word and not after_mark
        starts.append((other_word or not joined) and start >= previous_end)
        previous_word, previous_end = word, max(end, previous_end)
    return spans, starts


@lru_cache(maxsize=4096)
def _joins_words(character: str) -> bool:
    return character.isalnum() or character == "_" or _is_mark(character)


@lru_cache(maxsize=4096)
def _is_mark(character: str) -> bool:
    """Returns whether a character only modifies the one before it: an accent, a vowel sign, a variation selector."""
    return unicodedata.category(character).startswith("M")


@lru_cache(maxsize=65536)
def word_casing(word: str) -> int:
    """Returns how a word is written, as an index into `CASINGS`; letters without case count as lower."""
    if word.islower():
        name = "lower"
    elif word.isupper():
        name = "capital" if len(word) == 1 else "upper"
    elif word[:1].isupper() and word[1:].islower():
        name = "title"
    elif any(character.isupper() for character in word):
        name = "mixed"
    elif any(character.isdigit() for character in word):
        name = "digits"
    else:
        name = "lower" if any(character.isalpha() for character in word) else "punctuation"
    return CASINGS.index(name)


@dataclass
class Window:
    """A piece of a text that fits the model, and what the model says of it."""

    text: int  # index of the text in its chunk
    input_ids: list[int]  # special tokens included
    words: list[tuple[int, Span]] = field(default_factory=list)  # of each: index of its first token, its characters
    casings: list[int] = field(default_factory=list)  # of each token, see `word_casing`; empty if no words were looked for
    context: list[float] = field(default_factory=list)  # of each word: tokens to the nearer edge where the text goes on
    embedding: np.ndarray = field(init=False, repr=False)  # float [E], once the model has read the window
    logits: dict[str, np.ndarray] = field(default_factory=dict)  # maps each task to float [C], a token task to [W, C]


def find_words(window: Window, text: str, encoding: Encoding, is_first: bool, is_last: bool) -> None:
    """Fills in the words of a window from its fast-tokenizer encoding."""
    word_ids = encoding.word_ids  # the tokenizer makes a new list each time
    spans, starts = word_starts(text, encoding.offsets, word_ids)
    last_tokens: list[int] = []
    for token, (span, is_start) in enumerate(zip(spans, starts, strict=True)):
        if is_start:
            window.words.append((token, span))
            last_tokens.append(token)
        elif window.words and word_ids[token] is not None and span[0] < span[1]:
            first, (start, end) = window.words[-1]
            window.words[-1] = (first, (start, max(end, span[1])))
            last_tokens[-1] = token
    window.casings = [0] * len(spans)
    before, after = (float("inf") if is_end else 0 for is_end in (is_first, is_last))  # no context is missing at an end
    for (first, (start, end)), last in zip(window.words, last_tokens, strict=True):
        window.casings[first : last + 1] = [word_casing(text[start:end])] * (last + 1 - first)
        window.context.append(min(before + first, after + len(spans) - 1 - last))


class BioScheme:
    """The labels of one token task, in the order of the logits, as a BIO scheme: `I-X` may follow `B-X` and `I-X` only."""

    def __init__(self, labels: list[str]) -> None:
        self.groups = [label[2:] for label in labels]  # "" for "O"
        self.is_begin = np.array([label.startswith("B-") for label in labels])
        self.is_inside = np.array([label.startswith("I-") for label in labels])
        self.outside = labels.index("O")
        same_type = np.array([[a == b for b in self.groups] for a in self.groups])
        self.allowed = ~self.is_inside[None, :] | (same_type & (self.is_begin | self.is_inside)[:, None])  # [from, to]

    def decode(self, scores: np.ndarray, first_words: np.ndarray) -> np.ndarray:
        """Returns the best allowed label of every word, int [W], over all texts at once.

        Where taking each word's best label breaks no rule, it is the best path; only other texts need a search.

        Args:
            scores: float [W, C], log-probabilities of the words of all texts, one text after the other.
            first_words: int, the index of each text's first word, ascending from 0.
        """
        path = scores.argmax(axis=1)
        previous = np.concatenate([[self.outside], path[:-1]])
        previous[first_words[first_words < len(path)]] = self.outside
        broken = np.flatnonzero(~self.allowed[previous, path])
        for text in np.unique(np.searchsorted(first_words, broken, side="right") - 1):
            end = first_words[text + 1] if text + 1 < len(first_words) else len(path)
            path[first_words[text] : end] = self.search(scores[first_words[text] : end])
        return path

    def search(self, scores: np.ndarray) -> np.ndarray:
        """Returns the allowed label sequence of one text with the greatest sum of scores (Viterbi), int [W]."""
        penalty = np.where(self.allowed, 0.0, -np.inf)  # [from, to]
        total = scores[0] + penalty[self.outside]
        back = np.zeros(scores.shape, dtype=int)
        for word in range(1, len(scores)):
            paths = total[:, None] + penalty  # [from, to]
            back[word] = paths.argmax(axis=0)
            total = paths.max(axis=0) + scores[word]
        path = np.empty(len(scores), dtype=int)
        path[-1] = total.argmax()
        for word in range(len(scores) - 1, 0, -1):
            path[word - 1] = back[word, path[word]]
        return path

    def entities(self, path: np.ndarray) -> list[tuple[int, int, str]]:
        """Returns (first word, end word, group) of each entity in a decoded label sequence."""
        found = []
        for first in np.flatnonzero(self.is_begin[path]):
            end = first + 1
            while end < len(path) and self.is_inside[path[end]]:
                end += 1
            found.append((int(first), int(end), self.groups[path[first]]))
        return found


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def onnx_part(file: str, part: str) -> str:
    """Returns the name of the file that holds a part of a graph, one of `ONNX_PARTS`; of the whole graph (""), `file`."""
    return f"{file.removesuffix('.onnx')}_{part}.onnx" if part else file


def locate(source: str | Path, file: str, hub: dict[str, Any]) -> str | None:
    """Returns the local path of a file in a folder or, with options such as `revision`, on the Hub; None: no such file."""
    if Path(source).is_dir():
        path = Path(source, hub.get("subfolder") or "", file)
        return str(path) if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return hf_hub_download(str(source), file, **hub)
    except EntryNotFoundError:
        return None


class ExportedModel:
    """What an `Annotator` asks of a model, read from its folder or its repository on the Hub without PyTorch, transformers.

    Raises:
        ValueError: config.json is missing or describes no multi-task model.
    """

    def __init__(self, source: str | Path, hub: dict[str, Any]) -> None:
        self.name_or_path, self.hub_options = str(source), hub
        fields: Any = self.read("config.json")  # nothing is known of its fields yet
        tasks, rows, layers = fields.get("tasks"), fields.get("vocab_size"), fields.get("num_task_layers", 0)
        limit: Any = self.read("tokenizer_config.json").get("model_max_length")
        try:
            require(isinstance(tasks, dict), "tasks", tasks, "an object that maps task names to their fields")
            require(type(rows) is int and rows > 0, "vocab_size", rows, "a positive integer")
            require(type(layers) is int and layers >= 0, "num_task_layers", layers, "an integer from 0")
            require(is_number(limit) and limit > 0, "model_max_length of tokenizer_config.json", limit, "a positive number")
            specs = {name: TaskSpec.from_dict(name, spec) for name, spec in tasks.items()}
        except ValueError as error:
            raise ValueError(f"{source}: config.json: {error}") from error
        self.config = SimpleNamespace(
            tasks=tasks, task_specs=specs, num_task_layers=layers, vocab_size=rows, embedding_dim=fields.get("embedding_dim"),
            hidden_size=fields.get("hidden_size", fields.get("dim")),
        )  # fmt: skip
        self.max_length = int(min(limit, fields.get("max_position_embeddings", limit)))

    def read(self, file: str) -> dict[str, Any]:
        """Returns the object that a JSON file of the repository holds; raises a ValueError if there is none."""
        path = locate(self.name_or_path, file, self.hub_options)
        try:
            fields = None if path is None else json.loads(Path(path).read_text("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{self.name_or_path}: {file} is no JSON: {error}") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{self.name_or_path} holds no {file} with a JSON object. Fetch the folder again.")
        return fields


def label_order(tasks: Mapping[str, Any]) -> dict[str, list[str]]:
    """Returns the labels of each task, in their order: what an export and a configuration must agree on."""
    return {name: list(spec["labels"]) for name, spec in tasks.items()}


class OnnxModel:
    """The export of a model, run by ONNX Runtime on the CPU; of its graphs, the smallest that gives what is asked for.

    Raises:
        ValueError: `backend` is another one, onnxruntime is not installed, or the repository holds no export.
    """

    def __init__(self, model: Any, backend: str) -> None:
        require(backend in ONNX_FILES, "backend", backend, " or ".join(ONNX_FILES))
        try:  # in a `try`, or transformers takes it for something that this file cannot do without
            import onnxruntime
        except ImportError as error:
            raise ValueError(f"backend is {backend!r}; it needs onnxruntime: pip install onnxruntime ({error})") from error
        source, file = model.name_or_path, ONNX_FILES[backend]
        found = {part: locate(source, onnx_part(file, part), model.hub_options) for part in ("", *ONNX_PARTS)}
        if (whole := found[""]) is None:
            raise ValueError(
                f"backend is {backend!r}; {source} holds no {file}. Write it with: python -m release.onnx {source}"
            )
        self.paths = {part: path or whole for part, path in found.items()}  # without parts, everything is computed each time
        self.tasks, self.runtime, self.sessions = model.config.tasks, onnxruntime, dict[str, Any]()
        self.lock = Lock()  # batches run side by side, and the first of them make the sessions

    def session(self, part: str) -> Any:
        """Returns the session of a part, or of the whole graph ("").

        Raises:
            ValueError: The part's weights are not those of the file beside it, or its labels not the model's.
        """
        path, whole = self.paths[part], self.paths[""]
        with self.lock:
            if path in self.sessions:
                return self.sessions[path]
            options = self.runtime.SessionOptions()
            options.intra_op_num_threads = 1  # of one batch: the annotator runs several at once, which scales better
            options.log_severity_level = 3  # it warns of every input that may be left out
            session = self.runtime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"], disabled_optimizers=SLOW_FUSIONS
            )
            stored = session.get_modelmeta().custom_metadata_map
            if (digest := stored.get("weights_sha256")) and digest != sha256(whole):
                raise ValueError(f"{path} is of another export than {whole}; export both again: python -m release.onnx")
            labels, expected = json.loads(stored.get("labels", "{}")), label_order(self.tasks)
            if any(labels.get(name, expected[name]) != expected[name] for name in expected):
                raise ValueError(
                    f"{path} has the labels {labels}, config.json {expected}; export again: python -m release.onnx"
                )
            self.sessions[path] = session
            return session

    def __call__(
        self, inputs: dict[str, np.ndarray], tasks: list[str], vector: str | None
    ) -> tuple[np.ndarray | None, dict[str, np.ndarray]]:
        """Returns the vectors named `vector`, float32 [B, E], and the logits of each task."""
        if not tasks and vector is None:
            return None, {}
        session = self.session("" if tasks and vector else "tasks" if tasks else "embedding")
        known = {node.name for node in [*session.get_inputs(), *session.get_overridable_initializers()]}
        names = [*([] if vector is None else [vector]), *(f"logits.{name}" for name in tasks)]
        found = session.run(names, {name: value for name, value in inputs.items() if name in known})
        vectors = None if vector is None else found.pop(0)
        return vectors, dict(zip(tasks, found, strict=True))


def cpu_threads() -> int:
    """Returns PyTorch's number of threads where it is loaded, else OMP_NUM_THREADS, else the number of processor cores."""
    if "torch" in sys.modules:
        return sys.modules["torch"].get_num_threads()
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() and int(given) > 0 else os.cpu_count() or 1


Forward = Callable[[dict[str, np.ndarray], list[str], str | None], tuple[np.ndarray | None, dict[str, np.ndarray]]]


@dataclass
class Annotator:
    """Turns texts into records with a model and its tokenizer: windows, batches, decoding. See `MultiTaskPipeline`.

    Attributes:
        model: A `MultiTaskModel`, or an `ExportedModel`.
        tokenizer: Its tokenizer, of which the annotator makes a copy, to cut windows.
        max_length: Tokens of a window, special tokens included.
        pad_token_id: What fills the shorter texts of a batch.
        forward: Computes a batch: from the arrays of `pad_windows`, the tasks and the vector's name to the vectors, float32
            [B, E] or None, and each task's logits.
        backend: One of `BACKENDS`.
        batch_tokens: Tokens of a batch, padding included, unless a call says otherwise.
        threads: How many batches ONNX Runtime computes at a time; None: `cpu_threads()`.
        tokens_seen: How many tokens of text have been read.

    Raises:
        ValueError: The tokenizer does not fit the model's vocabulary.
    """

    model: Any
    tokenizer: Tokenizer
    max_length: int
    pad_token_id: int
    forward: Forward
    backend: str = "torch"
    batch_tokens: int = CPU_BATCH_TOKENS
    threads: int | None = None
    tokens_seen: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        size, rows = self.tokenizer.get_vocab_size(), self.model.config.vocab_size
        # Encoders may pad their table, but not to four times the vocabulary: that is a tokenizer without its files.
        if not rows // 4 <= size <= rows:
            raise ValueError(
                f"The tokenizer has {size} tokens and the encoder's vocab_size is {rows}: it is not this model's tokenizer, or "
                "tokenizer.json is missing from the model's folder. Fetch the folder again."
            )
        # A copy: a shared tokenizer cannot be reconfigured while another thread is using it.
        self.tokenizer = copy.deepcopy(self.tokenizer)
        self.tokenizer.enable_truncation(self.max_length, stride=self.max_length // 4)
        self.tokenizer.no_padding()

    @classmethod
    def from_export(
        cls, source: str | Path, backend: str = "onnx-int8", threads: int | None = None, **hub: Any
    ) -> "Annotator":
        """Returns an annotator that runs what `python -m release.onnx` has written, without PyTorch and transformers.

        Args:
            source: A folder, or a repository on the Hub.
            backend: One of `ONNX_FILES`.
            threads: How many batches to compute at a time; None: `cpu_threads()`.
            **hub: Options such as `revision`.

        Raises:
            ValueError: A file is missing or describes no such model, or onnxruntime is not installed.
        """
        model = ExportedModel(source, hub)
        path = locate(source, "tokenizer.json", hub)
        if path is None:
            raise ValueError(f"{source} holds no tokenizer.json. Fetch the folder again.")
        tokenizer, pad = Tokenizer.from_file(path), model.read("tokenizer_config.json").get("pad_token")
        pad_token_id = tokenizer.token_to_id(pad["content"] if isinstance(pad, dict) else pad) if pad else None
        forward = OnnxModel(model, backend)
        return cls(model, tokenizer, model.max_length, pad_token_id or 0, forward, backend, threads=threads)

    def stream(
        self,
        texts: Iterable[str],
        tasks: Iterable[str] | None = None,
        embedding: bool | str = True,
        batch_tokens: int | None = None,
        min_score: float = 0.0,
    ) -> Iterator[Record]:
        """Yields a record for each text; the options are those of `MultiTaskPipeline.__call__`.

        Raises:
            ValueError: An option or an item is not allowed, or `texts` is a single text; the message names it.
        """
        if isinstance(texts, str):
            raise ValueError(f"texts is the text {reprlib.repr(texts)}; allowed: an iterable of texts, such as [text].")
        known = list(self.model.config.tasks)
        given = {"tasks": tasks, "embedding": embedding, "batch_tokens": batch_tokens, "min_score": min_score}
        names = checked_options(known, **given).get("tasks", known)
        for chunk in text_chunks(texts):
            distinct = list(dict.fromkeys(chunk))  # the same text is computed once
            by_text = self.read(distinct, names, VECTORS[embedding], batch_tokens)
            records = self.records(distinct, by_text, names, VECTORS[embedding], min_score)
            if len(distinct) < len(chunk):
                found = dict(zip(distinct, records, strict=True))
                records = [copy.deepcopy(found[text]) for text in chunk]
            yield from records

    def read(
        self, texts: list[str], tasks: list[str], vector: str | None = None, batch_tokens: int | None = None
    ) -> list[list[Window]]:
        """Returns each text's windows with what the model says of them, see `run`.

        With ONNX Runtime several batches run at a time, see `threads`.
        """
        windows = self.windows(texts, tasks)
        self.tokens_seen += sum(len(window.input_ids) for window in windows)
        batches = list(length_batches(windows, batch_tokens or self.batch_tokens))
        run = partial(self.run, tasks=tasks, vector=vector)
        threads = 1 if self.backend == "torch" else min(self.threads or cpu_threads(), len(batches))
        if threads == 1:
            list(map(run, batches))
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(run, batches))
        return [list(group) for _, group in groupby(windows, key=lambda window: window.text)]

    def windows(self, texts: list[str], tasks: list[str]) -> list[Window]:
        """Returns the windows of all texts, in their order."""
        encodings = self.tokenizer.encode_batch(texts)
        config = self.model.config
        needs_words = any(config.num_task_layers > 0 or config.tasks[name]["kind"] == TOKEN for name in tasks)
        windows = []
        for number, (text, first) in enumerate(zip(texts, encodings, strict=True)):
            pieces = [first, *first.overflowing]
            for place, piece in enumerate(pieces):
                windows.append(Window(number, piece.ids))
                if needs_words:
                    find_words(windows[-1], text, piece, place == 0, place == len(pieces) - 1)
        return windows

    def run(self, windows: list[Window], tasks: list[str], vector: str | None = None) -> None:
        """Runs the model once over a batch of windows and stores in each its logits of the tasks and its `embedding`.

        That is the output named `vector`, one of the values of `VECTORS`.
        """
        inputs = pad_windows(windows, self.pad_token_id)
        vectors, logits = self.forward(inputs, tasks, vector)
        for row, window in enumerate(windows):
            if vectors is not None:
                window.embedding = vectors[row].copy()
            first_tokens = [token for token, _ in window.words]
            for name, values in logits.items():
                window.logits[name] = values[row, first_tokens] if values.ndim == 3 else values[row].copy()

    def records(
        self, texts: list[str], by_text: list[list[Window]], tasks: list[str], vector: str | None, min_score: float = 0.0
    ) -> list[Record]:
        """Returns one record per text from each text's windows, as `read` gives them."""
        specs = self.model.config.task_specs
        records: list[Record] = [{} for _ in texts]
        found: list[Any]
        if vector is not None:
            for record, group in zip(records, by_text, strict=True):
                mean = mean_over_windows(group, [window.embedding for window in group])
                record[vector] = mean if len(group) == 1 else mean / max(np.linalg.norm(mean), 1e-12)
        for name in tasks:
            if specs[name].kind == TOKEN:
                part, found = "entities", _word_answers(specs[name], name, texts, by_text, min_score)
            else:
                means = [mean_over_windows(group, [window.logits[name] for window in group]) for group in by_text]
                part, found = "labels", [text_answer(specs[name], logits, min_score) for logits in means]
            for record, answer in zip(records, found, strict=True):
                record.setdefault(part, {})[name] = answer
        return records


def checked_options(known: Iterable[str], **options: Any) -> dict[str, Any]:
    """Returns those of the options of `Annotator.stream` that are not None; `known` are the names of the model's tasks.

    Raises:
        ValueError: An option is not allowed; the message names it and what is.
    """
    if unknown := sorted(set(options) - {"tasks", "embedding", "batch_tokens", "min_score"}):
        raise ValueError(
            f"unknown options {unknown}; the multitask pipeline takes tasks, embedding, min_score and batch_tokens "
            "(tokens in one batch, where other pipelines have batch_size). It reads long texts whole and never truncates."
        )
    given = {name: value for name, value in options.items() if value is not None}
    if (tasks := given.get("tasks")) is not None:
        given["tasks"] = list(dict.fromkeys([tasks] if isinstance(tasks, str) else tasks))
        if missing := [name for name in given["tasks"] if name not in known]:
            raise ValueError(f"tasks holds {missing}; this model's tasks are: {', '.join(known) or 'none'}.")
    embedding, tokens, least = given.get("embedding", True), given.get("batch_tokens", 1), given.get("min_score", 0)
    require(isinstance(embedding, bool) or embedding == "encoder", "embedding", embedding, "true, false or 'encoder'")
    require(type(tokens) is int and tokens > 0, "batch_tokens", tokens, "a positive integer")
    require(is_number(least) and 0 <= least <= 1, "min_score", least, "a number in [0, 1]")
    return given


def checked_text(index: int, text: Any) -> Any:
    """Returns `text`; raises a ValueError, with its index, if it cannot be annotated."""
    if problem := text_problem(text):
        raise ValueError(f"inputs[{index}] {problem}.")
    return text


def chunked(
    items: Iterable[Item], characters: Callable[[Item], int], most_items: int, most_characters: int
) -> Iterator[list[Item]]:
    """Yields the items in lists of bounded size, in their order: a list ends with the item that reaches a bound."""
    chunk, total = [], 0
    for item in items:
        chunk.append(item)
        total += characters(item)
        if len(chunk) == most_items or total >= most_characters:
            yield chunk
            chunk, total = [], 0
    if chunk:
        yield chunk


def text_chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yields the texts in lists of bounded size; raises a ValueError, with the index, for an item that is not a text."""
    return chunked(map(checked_text, count(), texts), len, CHUNK_TEXTS, CHUNK_CHARACTERS)


def length_batches(windows: list[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """Yields windows of like length, as many at a time as fit the budget, and at least one."""
    ordered = sorted(windows, key=lambda window: len(window.input_ids), reverse=True)
    start = 0
    while start < len(ordered):
        rows = max(1, batch_tokens // len(ordered[start].input_ids))
        yield ordered[start : start + rows]
        start += rows


def pad_windows(windows: list[Window], pad_token_id: int) -> dict[str, np.ndarray]:
    """Returns the model's inputs for a batch of windows, int64 [B, T] each."""
    width = max(len(window.input_ids) for window in windows)
    ids = np.full((len(windows), width), pad_token_id, dtype=np.int64)
    mask, casings = np.zeros((2, len(windows), width), dtype=np.int64)
    for row, window in enumerate(windows):
        ids[row, : len(window.input_ids)] = window.input_ids
        mask[row, : len(window.input_ids)] = 1
        casings[row, : len(window.casings)] = window.casings
    return {"input_ids": ids, "attention_mask": mask, "casing_ids": casings}


def mean_over_windows(windows: list[Window], values: list[np.ndarray]) -> np.ndarray:
    """Returns the mean over a text's windows, weighted by their tokens; of a single window, its value."""
    if len(values) == 1:
        return values[0]
    return np.average(values, axis=0, weights=[len(window.input_ids) for window in windows]).astype(np.float32)


def text_answer(spec: Any, logits: np.ndarray, min_score: float = 0.0) -> Record:
    """Returns the answer of a sequence task from its logits, float [C]; None in place of an answer below `min_score`."""
    if spec.problem_type == "regression":
        return {"values": dict(zip(spec.labels, logits.tolist(), strict=True))}
    if spec.problem_type == "multi_label_classification":
        scores = 1 / (1 + np.exp(-logits))
        limits = np.maximum(spec.thresholds or [0.5] * len(spec.labels), min_score)
        present: list[str] | None = [spec.labels[label] for label in np.flatnonzero(scores >= limits)]
        if not present:
            present = None if min_score else [] if spec.fallback is None else [spec.fallback]
        return {"labels": present, "scores": dict(zip(spec.labels, scores.tolist(), strict=True))}
    scores = _softmax(logits)
    best, score = spec.labels[scores.argmax()], scores.max()
    shown = dict(zip(spec.labels, scores.tolist(), strict=True))
    return {"label": best if score >= min_score else None, "score": float(score), "scores": shown}


def group_scores(scores: dict[str, float], groups: Mapping[str, Iterable[str]] = EKMAN) -> dict[str, float]:
    """Returns a score in [0, 1] for each group of labels: the greatest of its labels' scores.

    Args:
        scores: A multi-label answer's `scores`.
        groups: Maps each group to its labels, by default Ekman's six emotions and neutral to GoEmotions' 28.

    Raises:
        ValueError: A group names a label that has no score.
    """
    unknown = {label for labels in groups.values() for label in labels} - set(scores)
    if unknown:
        raise ValueError(f"groups name {sorted(unknown)}; the scores are of {', '.join(scores)}.")
    return {group: max(scores[label] for label in labels) for group, labels in groups.items()}


def _word_answers(
    spec: Any, name: str, texts: list[str], by_text: list[list[Window]], min_score: float
) -> list[list[Record]]:
    """Returns each text's entities (or, without a BIO scheme, its words) of at least `min_score` for one token task."""
    merged = [merge_words(name, windows) for windows in by_text]
    bounds = np.cumsum([0, *(len(spans) for spans, _ in merged)])
    probabilities = _softmax(np.concatenate([logits for _, logits in merged]))  # [W, C], the words of all texts
    scheme = BioScheme(spec.labels) if spec.is_bio else None
    path = scheme.decode(np.log(probabilities.clip(min=1e-30)), bounds[:-1]) if scheme else probabilities.argmax(axis=1)
    scores = probabilities[np.arange(len(path)), path]
    answers: list[list[Record]] = []
    for text, (spans, _), low, high in zip(texts, merged, bounds[:-1], bounds[1:], strict=True):
        labels, certainty = path[low:high], scores[low:high].tolist()
        found = scheme.entities(labels) if scheme else [(word, word + 1, spec.labels[x]) for word, x in enumerate(labels)]
        answers.append([])
        for first, end, group in found:
            score, start, stop = sum(certainty[first:end]) / (end - first), spans[first][0], spans[end - 1][1]
            if score >= min_score:
                entity = {"entity_group": group, "score": score, "word": text[start:stop], "start": start, "end": stop}
                answers[-1].append(entity)
    return answers


def merge_words(name: str, windows: list[Window]) -> tuple[list[Span], np.ndarray]:
    """Returns the spans of a text's words and their logits [W, C], each from the window with most context."""
    if len(windows) == 1:
        return [span for _, span in windows[0].words], windows[0].logits[name]
    best: dict[int, tuple[float, Span, np.ndarray]] = {}
    for window in windows:
        for (_, span), context, logits in zip(window.words, window.context, window.logits[name], strict=True):
            if span[0] not in best or context > best[span[0]][0]:
                best[span[0]] = (context, span, logits)
    chosen = [best[start] for start in sorted(best)]
    classes = windows[0].logits[name].shape[1]
    logits = np.array([logits for _, _, logits in chosen]).reshape(len(chosen), classes)  # of no words, [0, C]
    return [span for _, span, _ in chosen], logits
