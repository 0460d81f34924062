"""Texts in, records out: the one place that cuts texts into windows, runs the model and decodes its answers.

`pipeline("multitask", model=repo, trust_remote_code=True)` makes a `MultiTaskPipeline`. The command line and whatever
else serves the model call it. Axes: W words, C labels, E embedding.
"""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import Pipeline
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import cached_file

try:
    if not TYPE_CHECKING:  # mypy checks these files as they lie in the repository, without a package
        from .configuration_multitask import CASINGS
except ImportError:  # no package around this file: imported from the repository's root, by its own scripts
    from configuration_multitask import CASINGS

Span = tuple[int, int]
Record = dict[str, Any]

# A chunk of texts is sorted by length and computed before the next is read: this bounds the memory of a stream.
CHUNK_TEXTS = 1024
CHUNK_CHARACTERS = 1_000_000
# Token budget of one batch. Small batches stay in a CPU's caches; a GPU wants to be filled.
CPU_BATCH_TOKENS = 1024
GPU_BATCH_TOKENS = 16384
# No language writes more marks on one character; a text that does must not take the square of its length.
MOST_MARKS = 30
# Where `python -m release.onnx` writes the model, by the name of the backend that runs it.
ONNX_FILES = {"onnx": "onnx/model.onnx", "onnx-int8": "onnx/model_quantized.onnx"}
BACKENDS = ("torch", *ONNX_FILES)


def text_problem(value: object) -> str | None:
    """Returns why `value` cannot be annotated, or None if it can: any text can, even an empty one."""
    if not isinstance(value, str):
        return f"is {value!r:.50} ({type(value).__name__}), not a text (str)"
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


def _joins_words(character: str) -> bool:
    return character.isalnum() or character == "_" or _is_mark(character)


def _is_mark(character: str) -> bool:
    """Returns whether a character only modifies the one before it: an accent, a vowel sign, a variation selector."""
    return unicodedata.category(character).startswith("M")


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
    """A piece of a text that fits the model, and what the model says of it.

    Attributes:
        text: Index of the text in its chunk.
        input_ids: Token ids, special tokens included.
        words: For each word: index of its first token, and its character span in the text.
        casings: For each token, how its word is written, see `word_casing`; empty if no words were looked for.
        context: For each word, the number of tokens to the nearer edge of the window, where the text goes on there.
        embedding: float [E], once the model has read the window.
        logits: Maps each task to float [C], or [W, C] for token tasks.
    """

    text: int
    input_ids: list[int]
    words: list[tuple[int, Span]] = field(default_factory=list)
    casings: list[int] = field(default_factory=list)
    context: list[float] = field(default_factory=list)
    embedding: np.ndarray = field(init=False, repr=False)
    logits: dict[str, np.ndarray] = field(default_factory=dict)


def find_words(window: Window, text: str, encoding: Any, is_first: bool, is_last: bool) -> None:
    """Fills in the words of a window from its fast-tokenizer encoding."""
    spans, starts = word_starts(text, encoding.offsets, encoding.word_ids)
    last_tokens: list[int] = []
    for token, (span, is_start) in enumerate(zip(spans, starts, strict=True)):
        if is_start:
            window.words.append((token, span))
            last_tokens.append(token)
        elif window.words and encoding.word_ids[token] is not None and span[0] < span[1]:
            first, (start, end) = window.words[-1]
            window.words[-1] = (first, (start, max(end, span[1])))
            last_tokens[-1] = token
    window.casings = [0] * len(spans)
    for (first, (start, end)), last in zip(window.words, last_tokens, strict=True):
        window.casings[first : last + 1] = [word_casing(text[start:end])] * (last + 1 - first)
        left = float("inf") if is_first else first
        right = float("inf") if is_last else len(spans) - 1 - last
        window.context.append(min(left, right))


class BioScheme:
    """The labels of one token task as a BIO scheme: `I-X` may follow `B-X` and `I-X` only.

    Args:
        labels: Label names in the order of the logits.
    """

    def __init__(self, labels: list[str]) -> None:
        types = [label[2:] for label in labels]
        self.is_begin = np.array([label.startswith("B-") for label in labels])
        self.is_inside = np.array([label.startswith("I-") for label in labels])
        self.outside = labels.index("O")
        same_type = np.array([[a == b for b in types] for a in types])
        self.allowed = ~self.is_inside[None, :] | (same_type & (self.is_begin | self.is_inside)[:, None])  # [from, to]
        self.groups = types

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


class OnnxModel:
    """The exported form of a model, run by ONNX Runtime on the CPU.

    Args:
        model: The model whose repository holds the export.
        backend: One of `ONNX_FILES`.

    Raises:
        ValueError: onnxruntime is not installed, or the repository holds no export.
    """

    def __init__(self, model: Any, backend: str) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise ValueError(f"backend is {backend!r}; it needs onnxruntime: pip install onnxruntime") from error
        source, file = model.name_or_path, ONNX_FILES[backend]
        try:
            path = cached_file(source, file, **model.hub_options)
        except OSError as error:
            raise ValueError(
                f"backend is {backend!r}; {source} holds no {file}. Write it with: python -m release.onnx {source}"
            ) from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # it warns of every input that may be left out
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs = {node.name for node in self.session.get_inputs()}
        self.inputs |= {node.name for node in self.session.get_overridable_initializers()}

    def __call__(self, inputs: dict[str, np.ndarray], tasks: list[str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Returns embeddings, float32 [B, E], and the logits of each task."""
        given = {name: value for name, value in inputs.items() if name in self.inputs}
        found = self.session.run(["sentence_embedding", *(f"logits.{name}" for name in tasks)], given)
        return found[0], dict(zip(tasks, found[1:], strict=True))


class MultiTaskPipeline(Pipeline):
    """Turns texts into records with a `MultiTaskModel`.

    A record holds, for the tasks asked for:

    - `"sentence_embedding"`: float32 [E], unit length, unless `embedding=False`;
    - `"labels"`: maps each sequence task to `{"label", "score", "scores"}`; a multi-label task to `{"labels", "scores"}`;
      a regression task to `{"values"}`;
    - `"entities"`: maps each token task to a list of `{"entity_group", "score", "word", "start", "end"}` in the order
      of the text, where `text[start:end] == word`. A task whose labels are no BIO scheme lists every word.

    A text that is longer than the model's window is read in windows that overlap by a quarter. A word is judged in
    the window that shows most of its surroundings; class logits and embeddings are averages over the windows,
    weighted by their tokens.

    Args:
        backend: What runs the model: "torch", or an export that `python -m release.onnx` has written, as it is ("onnx") or
            in 8-bit integers ("onnx-int8").

    Attributes:
        tokens_seen: How many tokens of text this pipeline has read.
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
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(f"The multitask pipeline needs a fast tokenizer, and got {type(self.tokenizer).__name__}.")
        if self._batch_size is not None:
            raise ValueError(f"batch_size is {self._batch_size}, and has no meaning here; use batch_tokens.")
        self.model.eval()
        self.tokens_seen = 0
        self._run = self._run_torch if backend == "torch" else OnnxModel(self.model, backend)

    def _sanitize_parameters(
        self,
        tasks: Iterable[str] | None = None,
        embedding: bool | None = None,
        batch_tokens: int | None = None,
        **unknown: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if unknown:
            raise ValueError(
                f"unknown options {sorted(unknown)}; the multitask pipeline takes tasks, embedding and batch_tokens (tokens "
                "in one batch, where other pipelines have batch_size). It reads long texts whole, so it does not truncate."
            )
        if tasks is not None:
            tasks = [tasks] if isinstance(tasks, str) else list(tasks)
            if missing := [name for name in tasks if name not in self.model.config.tasks]:
                known = ", ".join(self.model.config.tasks) or "none"
                raise ValueError(f"tasks holds {missing}; this model's tasks are: {known}.")
        if batch_tokens is not None and (not isinstance(batch_tokens, int) or batch_tokens < 1):
            raise ValueError(f"batch_tokens is {batch_tokens!r}; allowed: a positive integer.")
        given = {"tasks": tasks, "embedding": embedding, "batch_tokens": batch_tokens}
        return {}, {name: value for name, value in given.items() if value is not None}, {}

    def __call__(self, inputs: Any, **options: Any) -> Any:
        """Returns a record for a text, a list of records for a list, and an iterator of records for any other iterable.

        Args:
            inputs: A str, or an iterable of them.
            **options: `tasks` (names of the tasks to compute; default all), `embedding` (whether to give the
                embedding; default True), `batch_tokens` (tokens in one batch, padding included).

        Raises:
            ValueError: An option or an item is not allowed; the message names it, and its index for an item.
        """
        options = {**self._forward_params, **self._sanitize_parameters(**options)[1]}
        if isinstance(inputs, str):
            return next(self._records([inputs], **options))
        if hasattr(inputs, "__getitem__") and hasattr(inputs, "__len__") and not isinstance(inputs, Iterable):
            inputs = map(inputs.__getitem__, range(len(inputs)))  # transformers' KeyDataset, for instance
        if isinstance(inputs, bytes | dict) or not isinstance(inputs, Iterable):
            raise ValueError(f"inputs {text_problem(inputs)}, nor a list of texts.")
        if isinstance(inputs, list | tuple):
            for index, text in enumerate(inputs):
                _check_text(index, text)
            return list(self._records(inputs, **options))
        return self._records(inputs, **options)

    def _records(
        self,
        texts: Iterable[str],
        tasks: list[str] | None = None,
        embedding: bool = True,
        batch_tokens: int | None = None,
    ) -> Iterator[Record]:
        names = list(self.model.config.tasks) if tasks is None else tasks
        batch_tokens = batch_tokens or (CPU_BATCH_TOKENS if self.device.type == "cpu" else GPU_BATCH_TOKENS)
        for chunk in text_chunks(texts):
            windows = self.preprocess(chunk, tasks=names)
            for batch in length_batches(windows, batch_tokens):
                self._forward(batch, tasks=names)
            yield from self.postprocess(chunk, windows, tasks=names, embedding=embedding)

    def preprocess(self, texts: list[str], tasks: list[str]) -> list[Window]:
        """Returns the windows of all texts, in their order."""
        limits = [self.tokenizer.model_max_length, self.model.max_length]
        length = min(limit for limit in limits if limit is not None)
        encoded = self.tokenizer(
            texts, truncation=True, max_length=length, stride=length // 4, return_overflowing_tokens=True
        )
        sources = encoded["overflow_to_sample_mapping"]
        needs_words = any(self.model.config.tasks[name]["kind"] == "token_classification" for name in tasks)
        windows = []
        for i, (source, encoding) in enumerate(zip(sources, encoded.encodings, strict=True)):
            windows.append(Window(source, encoding.ids))
            if needs_words:
                is_first = i == 0 or sources[i - 1] != source
                is_last = i + 1 == len(sources) or sources[i + 1] != source
                find_words(windows[-1], texts[source], encoding, is_first, is_last)
        return windows

    def _forward(self, windows: list[Window], tasks: list[str]) -> None:
        """Runs the model once over a batch of windows and stores in each what it says."""
        inputs = pad_windows(windows, self.tokenizer.pad_token_id or 0)
        self.tokens_seen += int(inputs["attention_mask"].sum())
        embeddings, logits = self._run(inputs, tasks)
        for row, window in enumerate(windows):
            window.embedding = embeddings[row].copy()
            first_tokens = [token for token, _ in window.words]
            for name, values in logits.items():
                window.logits[name] = values[row, first_tokens] if values.ndim == 3 else values[row].copy()

    @torch.inference_mode()
    def _run_torch(self, inputs: dict[str, np.ndarray], tasks: list[str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Returns embeddings, float32 [B, E], and the logits of each task."""
        tensors = {name: torch.from_numpy(value).to(self.device) for name, value in inputs.items()}
        out = self.model(**tensors, tasks=tasks)
        vectors = out.sentence_embedding
        if vectors.dtype != torch.float32:
            vectors = torch.nn.functional.normalize(vectors.float(), dim=-1)  # exactly unit length again
        return vectors.cpu().numpy(), {name: value.float().cpu().numpy() for name, value in out.logits.items()}

    def postprocess(self, texts: list[str], windows: list[Window], tasks: list[str], embedding: bool) -> list[Record]:
        """Returns one record per text from its windows."""
        by_text: list[list[Window]] = [[] for _ in texts]
        for window in windows:
            by_text[window.text].append(window)
        specs = self.model.config.task_specs
        records: list[Record] = [{} for _ in texts]
        found: list[Any]
        if embedding:
            for record, group in zip(records, by_text, strict=True):
                mean = mean_over_windows(group, [window.embedding for window in group])
                record["sentence_embedding"] = mean if len(group) == 1 else mean / max(np.linalg.norm(mean), 1e-12)
        for name in tasks:
            if specs[name].kind == "token_classification":
                found = _word_answers(specs[name], name, texts, by_text)
            else:
                found = [
                    _text_answer(specs[name], mean_over_windows(group, [window.logits[name] for window in group]))
                    for group in by_text
                ]
            part = "entities" if specs[name].kind == "token_classification" else "labels"
            for record, answer in zip(records, found, strict=True):
                record.setdefault(part, {})[name] = answer
        return records

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Saves the model, the tokenizer and the code of both model and pipeline."""
        super().save_pretrained(save_directory, **kwargs)
        custom_object_save(self, save_directory)


def _check_text(index: int, text: object) -> None:
    if problem := text_problem(text):
        raise ValueError(f"inputs[{index}] {problem}.")


def text_chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yields the texts in lists of bounded size, in their order.

    Raises:
        ValueError: An item is no text; the message names its index.
    """
    chunk: list[str] = []
    characters = 0
    for index, text in enumerate(texts):
        _check_text(index, text)
        chunk.append(text)
        characters += len(text)
        if len(chunk) == CHUNK_TEXTS or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def length_batches(windows: list[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """Yields windows of like length, as many at a time as fit the budget, and at least one."""
    ordered = sorted(windows, key=lambda window: len(window.input_ids), reverse=True)
    start = 0
    while start < len(ordered):
        count = max(1, batch_tokens // len(ordered[start].input_ids))
        yield ordered[start : start + count]
        start += count


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


def _text_answer(spec: Any, logits: np.ndarray) -> Record:
    """Returns the answer of a sequence task from its logits, float [C]."""
    if spec.problem_type == "regression":
        return {"values": dict(zip(spec.labels, logits.tolist(), strict=True))}
    if spec.problem_type == "multi_label_classification":
        scores = 1 / (1 + np.exp(-logits))
        limits = spec.thresholds or [0.5] * len(spec.labels)
        present = [label for label, score, limit in zip(spec.labels, scores, limits, strict=True) if score >= limit]
        return {"labels": present, "scores": dict(zip(spec.labels, scores.tolist(), strict=True))}
    scores = _softmax(logits)
    best = int(scores.argmax())
    return {
        "label": spec.labels[best],
        "score": float(scores[best]),
        "scores": dict(zip(spec.labels, scores.tolist(), strict=True)),
    }


def _word_answers(spec: Any, name: str, texts: list[str], by_text: list[list[Window]]) -> list[list[Record]]:
    """Returns each text's entities (or, without a BIO scheme, its words) for one token task."""
    merged = [merge_words(name, windows) for windows in by_text]
    counts = [len(spans) for spans, _ in merged]
    bounds = np.concatenate([[0], np.cumsum(counts)]).astype(int)
    logits = np.concatenate([logits for _, logits in merged]) if bounds[-1] else np.zeros((0, len(spec.labels)))
    probabilities = _softmax(logits)  # [W, C], the words of all texts
    if spec.is_bio:
        scheme = BioScheme(spec.labels)
        path = scheme.decode(np.log(probabilities.clip(min=1e-30)), bounds[:-1]) if bounds[-1] else np.zeros(0, dtype=int)
    else:
        scheme, path = None, probabilities.argmax(axis=1)
    scores = probabilities[np.arange(len(path)), path]
    answers = []
    for text, (spans, _), first, end in zip(texts, merged, bounds[:-1], bounds[1:], strict=True):
        labels, certainty = path[first:end], scores[first:end]
        if scheme is None:
            found = [(word, word + 1, spec.labels[label]) for word, label in enumerate(labels)]
        else:
            found = scheme.entities(labels)
        answers.append([_entity(text, spans, certainty, *entity) for entity in found])
    return answers


def _entity(text: str, spans: list[Span], certainty: np.ndarray, first: int, end: int, group: str) -> Record:
    start, stop = spans[first][0], spans[end - 1][1]
    score = float(certainty[first:end].mean())
    return {"entity_group": group, "score": score, "word": text[start:stop], "start": start, "end": stop}


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
    return [span for _, span, _ in chosen], np.array([logits for _, _, logits in chosen])
