"""Training data: data sets from the Hub or from folders, turned into tokenized examples, and examples into batches."""

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, get_dataset_split_names, load_dataset
from datasets.exceptions import DatasetGenerationError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from annotator_multitask import Span, Window, find_words, length_batches, pad_windows
from common.recipe import NO_LABEL, SCORED_PAIRS, TaskRecipe, is_entities, label_names
from modeling_multitask import IGNORE_INDEX, pool
from tasks_multitask import TOKEN, is_number

Example = dict[str, Any]
TaggedRow = tuple[list[str], list[str | None]]  # tokens, and the tag of each, None for a missing one
ENCODED_TOKENS = 4096  # in a batch of `encode`


class DataError(ValueError):
    """A data set does not hold what the recipe says; the message names it, and split, row and column."""


FILE_FORMATS = {".csv": "csv", ".jsonl": "json", ".parquet": "parquet"}


def load_task_split(task: TaskRecipe, split: str) -> Dataset:
    """Returns one split ("train", "validation" or "test") of a recipe task's data set, see `load_split`."""
    return load_split(task.dataset, task.splits.get(split, split), task.columns)


def load_split(name_or_path: str, split: str, columns: Iterable[str]) -> Dataset:
    """Returns one split of a data set on the Hub, in a local folder or in a local file.

    Args:
        name_or_path: A Hub id, with the subset after a colon and the revision after an @ ("cardiffnlp/tweet_eval:sentiment",
            "eriktks/conll2003@refs/convert/parquet"), a folder, or a csv, jsonl or parquet file, which is a data set with
            the split "train" alone.
        split: The data set's own name of the split, or several joined by plus signs ("train+validation").
        columns: The columns that will be read.

    Raises:
        DataError: The split or a column is missing, or the split is empty.
    """
    known = split_names(name_or_path)
    if not set(split.split("+")) <= set(known):
        raise DataError(
            f"{name_or_path}: no split {split!r}; it has {', '.join(known)}. Name the data set's own in the task's `splits`."
        )
    try:
        data = load_dataset(**data_source(name_or_path), split=split)
    except (ValueError, DatasetGenerationError) as error:  # of no rows, `datasets` makes an error too
        raise DataError(f"{name_or_path}, split {split}: no rows, or none that can be read ({error}).") from error
    if missing := [column for column in columns if column not in data.column_names]:
        raise DataError(f"{name_or_path}, split {split}: no column {missing}; it has {data.column_names}.")
    return data


@cache
def split_names(name_or_path: str) -> list[str]:
    """Returns a data set's own names of its splits; a DataError says if there is no such data set."""
    source = data_source(name_or_path)
    if "data_files" in source:
        return list(source["data_files"])
    try:
        return get_dataset_split_names(source["path"], source.get("name"), revision=source.get("revision"))
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a data set that is a script
        raise DataError(f"{name_or_path} is no data set that can be read: {error}") from error


def has_split(task: TaskRecipe, split: str) -> bool:
    """Returns whether a task's data set has the split ("train", "validation" or "test"); an empty name in `splits`: it has not."""
    known, name = split_names(task.dataset), task.splits.get(split, split)
    if split in task.splits and name and name not in known:
        raise DataError(f"{task.dataset}: splits.{split} is {name!r}; it has {', '.join(known)}.")
    return name in known


def public_name(dataset: str) -> str:
    """Returns a Hub id as it is, and of a folder or file its name alone: where it lies on this machine is of no use."""
    return Path(dataset).name if Path(dataset).exists() else dataset


def data_source(name_or_path: str) -> dict[str, Any]:
    """Returns `load_dataset`'s arguments for a file, a folder, or a Hub id as `load_split` takes it."""
    if Path(name_or_path).is_file() and (file_format := FILE_FORMATS.get(Path(name_or_path).suffix)):
        return {"path": file_format, "data_files": {"train": name_or_path}}
    if Path(name_or_path).exists():
        return {"path": name_or_path}
    name, _, subset = name_or_path.partition(":")
    name, _, revision = name.partition("@")
    return {"path": name, **({"name": subset} if subset else {}), **({"revision": revision} if revision else {})}


def hash_columns(data: Dataset, columns: list[str]) -> str:
    """Returns a hash of some columns' values, the same wherever the data set was loaded from."""
    digest = hashlib.sha256()
    for column in columns:
        digest.update(json.dumps([round(x, 6) if isinstance(x, float) else x for x in data[column]]).encode())
    return digest.hexdigest()


def class_names(data: Dataset, column: str) -> list[str]:
    """Returns the label names that the data set declares for a `ClassLabel` column (or a list of them), or raises a DataError."""
    if names := declared_names(data, column):
        return names
    feature = data.features[column]
    raise DataError(f"column {column!r} declares no label names; it is {feature}. Give the task's `labels` in the recipe.")


def declared_names(data: Dataset, column: str) -> list[str]:
    """Returns the label names that a data set declares for a column; none if it declares none."""
    feature = data.features[column]
    return list(getattr(getattr(feature, "feature", feature), "names", []))


def task_labels(task: TaskRecipe, data: Dataset) -> list[str]:
    """Returns the label names of a task in the order of its head's ids; none without a head."""
    if not task.has_head:
        return []
    if task.labels is not None:
        return list(task.labels)
    if task.head.get("problem_type") == "regression":
        return [task.label_column]
    return class_names(data, task.label_column)


def source_labels(task: TaskRecipe, data: Dataset, labels: list[str]) -> list[str]:
    """Returns the data set's own label names in the order of its ids; without a mapping and fitting names, the task's."""
    if task.mapping:
        return class_names(data, task.label_column)
    declared = declared_names(data, task.label_column)
    return declared if declared and set(declared) <= set(labels) else labels


def label_mapper(task: TaskRecipe, data: Dataset, labels: list[str], where: str) -> Callable[[Any, str], int]:
    """Returns what turns a data set's label into the number of the task's, -100 for none or a missing one (None).

    It takes the label, by number or by name, and its place, which its own DataError for an unknown label starts with.

    Raises:
        DataError: The mapping names a label that the data set has not, or leaves one out; all are listed.
    """
    source, task = source_labels(task, data, labels), replace(task, labels=labels)
    entities = is_entities(task)
    parts = [(name[:2], name[2:]) if entities else ("", name) for name in source]  # prefix and type; "O" has no type
    mapping, types = task.mapping or {name: name for name in label_names(task)}, {kind for _, kind in parts if kind}
    unknown = sorted(set(mapping) - types) if task.mapping else []
    problems = [f"mapping names {name!r}, which the data set has not" for name in unknown]
    problems += [f"label {name!r} is mapped to nothing; add it to the mapping" for name in sorted(types - set(mapping))]
    if problems:
        raise DataError(f"{where}: {'; '.join(problems)}. The data set's labels are: {', '.join(sorted(types))}.")
    nothing = labels.index("O") if entities else IGNORE_INDEX
    mapped = [labels.index(prefix + mapping[x]) if x and mapping[x] != NO_LABEL else nothing for prefix, x in parts]

    def to_id(value: Any, place: str) -> int:
        if value is None:
            return IGNORE_INDEX
        if isinstance(value, str) and value in source:
            return mapped[source.index(value)]
        if type(value) is int and 0 <= value < len(source):
            return mapped[value]
        raise DataError(f"{place}: label {value!r} is none of 0 … {len(source) - 1} ({', '.join(source)}).")

    return to_id


def fold_unsaid(logits: Tensor, task: TaskRecipe, labels: list[str]) -> Tensor:
    """Returns logits, float [..., C], in which the probability of entities that a data set never marks is that of "O"."""
    if not task.unsaid:
        return logits
    unsaid, outside = [i for i, label in enumerate(labels) if label[2:] in task.unsaid], labels.index("O")
    folded = logits.clone()
    folded[..., outside] = logits[..., [outside, *unsaid]].logsumexp(dim=-1)
    folded[..., unsaid] = torch.finfo(logits.dtype).min
    return folded


def token_spans(tokens: list[str]) -> list[tuple[int, int]]:
    """Returns the character span of each token in `" ".join(tokens)`."""
    ends = accumulate(len(token) + 1 for token in tokens)  # with the blank behind each
    return [(end - len(token) - 1, end - 1) for token, end in zip(tokens, ends, strict=True)]


def word_tags(words: list[Span], spans: list[Span], tags: list[str | None]) -> list[str | None]:
    """Returns the tag of each of the model's words, given a data set's tokens. Training and evaluation both use it.

    A token such as "U.S." can be several words to the model; the first has the token's tag and the others its `I-` form, so
    that training sees words just as the pipeline cuts them out of raw text.

    Args:
        words: Character span (start, end) of each word.
        spans: Character span of each token; none starts after the first word does.
        tags: Tag of each token, None for a missing one.
    """
    starts = [start for start, _ in spans]
    tagged, previous = [], -1
    for start, _ in words:
        index = bisect_right(starts, start) - 1
        tag = tags[index]
        goes_on = index == previous and tag is not None and tag.startswith("B-")
        tagged.append(f"I-{tag[2:]}" if goes_on and tag else tag)
        previous = index
    return tagged


def make_examples(
    task: TaskRecipe, data: Dataset, labels: list[str], tokenizer: PreTrainedTokenizerBase, where: str
) -> list[Example]:
    """Returns a split's examples, ready for `make_batch`.

    An example holds `input_ids` (for pairs a list of them), `text` likewise, and `labels`: int for single
    labels, float per label for multi-label and regression, int per token for tags, float for a pair's score. Single texts
    also have `casing_ids`, and rows of words `tagged`, their tokens and tags.

    Args:
        task: The task.
        data: Its split.
        labels: Its label names; empty for pairs.
        tokenizer: A fast tokenizer; texts are cut to its `model_max_length`.
        where: Names data set and split in errors.

    Raises:
        DataError: A row does not hold what it should; the message names it and the column.
    """
    if task.kind == TOKEN:
        rows, count = tagged_rows(task, data, labels, where), task.passage_rows
        if count > 1:  # rows as they are, and longer texts, as people have them
            groups = [rows[start : start + count] for start in range(0, len(rows), count)]
            rows += [tuple(list(chain(*column)) for column in zip(*group, strict=True)) for group in groups]
        return _tagged_examples(rows, labels, tokenizer)
    to_label, values = label_reader(task, data, labels, where), data[task.label_column]
    found = [to_label(value, f"{where}, row {row}, column {task.label_column}") for row, value in enumerate(values)]
    columns = [list(data[column]) for column in task.text_columns]
    for column, texts in zip(task.text_columns, columns, strict=True):
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise DataError(f"{where}, row {row}, column {column}: {text!r:.50} is not a text.")
    if len(columns) == 1:
        return [{**x, "labels": label} for (x, _), label in zip(_encoded(columns[0], tokenizer), found, strict=True)]
    ids = [tokenizer(texts, truncation=True)["input_ids"] for texts in columns]
    rows = zip(zip(*ids, strict=True), zip(*columns, strict=True), found, strict=True)
    return [{"input_ids": list(row_ids), "text": texts, "labels": label} for row_ids, texts, label in rows]


def _encoded(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[tuple[Example, list[tuple[int, Span]]]]:
    """Returns each text's token ids, the casing of their words, and the text; and its words as a `Window` holds them."""
    found = []
    for text, encoding in zip(texts, tokenizer(texts, truncation=True).encodings if texts else [], strict=True):
        window = Window(0, encoding.ids)
        find_words(window, text, encoding, True, True)
        found.append(({"input_ids": encoding.ids, "casing_ids": window.casings, "text": text}, window.words))
    return found


def rewrite(text: str, form: str | None) -> str:
    """Returns a text as somebody else would write it, see `REWRITES`; None: as it is."""
    if form == "bare":
        return text.rstrip(" .!?…") or text
    if form == "title":
        return " ".join(word[:1].upper() + word[1:] for word in text.split(" "))
    return {"lower": text.lower, "upper": text.upper, None: lambda: text}[form]()


def label_reader(task: TaskRecipe, data: Dataset, labels: list[str], where: str) -> Callable[[Any, str], Any]:
    """Returns what turns a row's value, given its place for errors, into a label as the task's loss wants it."""
    problem = task.head.get("problem_type")
    if not task.has_head:
        return _score
    if problem == "regression":
        return lambda value, place: _numbers(value, labels, place)
    to_id = label_mapper(task, data, labels, where)

    def several(value: Any, place: str) -> list[float]:
        """Returns 1.0 for each label that is present, 0.0 for the others, and -100 for what is missing."""
        if value is None:
            return [float(IGNORE_INDEX)] * len(labels)
        present = {to_id(x, place) for x in (value if isinstance(value, list) else [value])}
        return [float(i in present) for i in range(len(labels))]

    def one(value: Any, place: str) -> int:
        """Returns the label; of a list, the one that all of its labels map to but those that map to none, or else -100."""
        if not task.mapping or not isinstance(value, list):
            return to_id(value, place)
        found = {to_id(x, place) for x in value} - {IGNORE_INDEX}
        return found.pop() if len(found) == 1 else IGNORE_INDEX

    return several if problem == "multi_label_classification" else one


def _score(value: Any, place: str) -> float:
    if not is_number(value):
        raise DataError(f"{place}: score {value!r} is no number.")
    return float(value)


def _numbers(value: Any, labels: list[str], place: str) -> list[float]:
    """Returns the numbers of a regression task, NaN for all if the value is missing."""
    if value is None:
        return [math.nan] * len(labels)
    numbers = value if isinstance(value, list) else [value]
    well_formed = all(isinstance(x, int | float) and not isinstance(x, bool) for x in numbers)
    if len(numbers) != len(labels) or not well_formed:
        raise DataError(f"{place}: {value!r} is not {len(labels)} number(s), one for each of: {', '.join(labels)}.")
    return [float(x) for x in numbers]


def rewritten(example: Example, form: str, labels: list[str], tokenizer: PreTrainedTokenizerBase) -> Example:
    """Returns what `make_examples` would give for a text or a row of words in one of `REWRITES`; `labels` are the words'."""
    if "tagged" in example:
        return _tagged_examples([rewrite_tokens(*example["tagged"], form)], labels, tokenizer)[0]
    return {**_encoded([rewrite(example["text"], form)], tokenizer)[0][0], "labels": example["labels"]}


def rewrite_tokens(tokens: list[str], tags: list[str | None], form: str | None) -> TaggedRow:
    """Returns tokens and tags of a row as somebody else would write it, see `REWRITES`."""
    if form == "bare":
        is_end = len(tokens) > 1 and tokens[-1] in (".", "!", "?", "…")
        return (tokens[:-1], tags[:-1]) if is_end else (tokens, tags)
    return [rewrite(token, form) for token in tokens], tags


def tagged_rows(task: TaskRecipe, data: Dataset, labels: list[str], where: str) -> list[TaggedRow]:
    """Returns each row's tokens and the names of their tags among the task's labels, None for a missing one.

    Raises:
        DataError: A row holds no tokens and tags of equal number, or an unknown tag; the message names it.
    """
    column, to_id, rows = task.label_column, label_mapper(task, data, labels, where), []
    for row, (tokens, tags) in enumerate(zip(data[task.text_columns[0]], data[column], strict=True)):
        if not isinstance(tokens, list) or not isinstance(tags, list) or not all(isinstance(x, str) for x in tokens):
            found = f"{tokens!r:.50} are not a list of words, or {tags!r:.50} is not a list of tags"
            raise DataError(f"{where}, row {row}: {found}.")
        if len(tokens) != len(tags):
            raise DataError(f"{where}, row {row}: {len(tokens)} {task.text_columns[0]} but {len(tags)} {column}.")
        ids = [to_id(tag, f"{where}, row {row}, column {column}, token {i}") for i, tag in enumerate(tags)]
        rows.append((tokens, [None if x == IGNORE_INDEX else labels[x] for x in ids]))
    return rows


def _tagged_examples(rows: list[TaggedRow], labels: list[str], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Returns an example for each row of tokens and their tags."""
    found = []
    encoded = _encoded([" ".join(tokens) for tokens, _ in rows], tokenizer)
    for (tokens, tags), (example, words) in zip(rows, encoded, strict=True):
        ids = [IGNORE_INDEX] * len(example["input_ids"])
        tagged = word_tags([span for _, span in words], token_spans(tokens), tags)
        for (first, _), tag in zip(words, tagged, strict=True):
            # A scheme without `I-` labels has none for the further words of a token.
            ids[first] = labels.index(tag) if tag in labels else IGNORE_INDEX
        found.append({**example, "labels": ids, "tagged": (tokens, tags)})
    return found


def text_ids(example: Example) -> list[list[int]]:
    """Returns the token ids of each text of an example: one, or the two of a pair."""
    ids = example["input_ids"]
    return ids if isinstance(ids[0], list) else [ids]


def make_batch(kinds: dict[str, str], examples: list[Example], pad_token_id: int) -> dict[str, Any]:
    """Returns examples as tensors: `input_ids`, `attention_mask`, for single texts `casing_ids`, and `labels` by task.

    Pairs become one batch of texts: all first ones, then all second ones. With `target` vectors
    in the examples, the batch holds them as float [texts, H].

    Args:
        kinds: Kind of each task that the examples have labels of, `labels[task]`.
        examples: What `make_examples` gives, its labels by task.
        pad_token_id: Fills up shorter rows.
    """
    sides = len(text_ids(examples[0]))
    rows = [(text_ids(x)[side], x.get("casing_ids", [])) for side in range(sides) for x in examples]
    inputs = pad_windows([Window(0, ids, casings=casings) for ids, casings in rows], pad_token_id)
    batch: dict[str, Any] = {name: torch.from_numpy(x) for name, x in inputs.items()}
    if "casing_ids" not in examples[0]:
        del batch["casing_ids"]
    batch["labels"] = {}
    for task, kind in kinds.items():
        labels = [x["labels"][task] for x in examples]
        if kind == TOKEN:
            tags = [torch.tensor(x) for x in labels]
            batch["labels"][task] = pad_sequence(tags, batch_first=True, padding_value=IGNORE_INDEX)
        else:
            batch["labels"][task] = torch.tensor(labels, dtype=torch.float32 if kind == SCORED_PAIRS else None)
    if "target" in examples[0]:
        batch["target"] = torch.cat([torch.stack([x["target"][side] for x in examples]) for side in range(sides)])
    return batch


@torch.inference_mode()
def encode(encoder: Any, rows: list[list[int]], pooling_mode: str, pad_token_id: int, what: str | None = None) -> Tensor:
    """Returns the encoder's pooled vectors of tokenized texts, float [len(rows), H], in the order of `rows`.

    With `what`, a progress bar says what is read.
    """
    vectors = torch.empty(len(rows), encoder.config.hidden_size)
    batches = list(length_batches([Window(row, ids) for row, ids in enumerate(rows)], ENCODED_TOKENS))
    for batch in tqdm(batches, desc=what, unit="batch", disable=what is None):
        inputs = {name: torch.from_numpy(x).to(encoder.device) for name, x in pad_windows(batch, pad_token_id).items()}
        hidden = encoder(inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        vectors[[window.text for window in batch]] = pool(hidden, inputs["attention_mask"], pooling_mode).float().cpu()
    return vectors
