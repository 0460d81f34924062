"""Training data: data sets from the Hub or from folders, turned into tokenized examples, and examples into batches."""

import math
from collections.abc import Iterable
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, get_dataset_split_names, load_dataset
from datasets.exceptions import DatasetGenerationError
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from configuration_multitask import TOKEN
from evaluation.metrics import token_spans
from modeling_multitask import IGNORE_INDEX, pool
from pipeline_multitask import Window, find_words, word_starts
from training.recipe import SCORED_PAIRS, TaskRecipe

Example = dict[str, Any]
ENCODED_TOGETHER = 64  # texts in a batch of `encode`


class DataError(ValueError):
    """A data set does not hold what the recipe says; the message names it, and split, row and column."""


FILE_FORMATS = {".csv": "csv", ".jsonl": "json", ".parquet": "parquet"}


def load_task_split(task: TaskRecipe, split: str) -> Dataset:
    """Returns one split ("train", "validation" or "test") of a recipe task's data set, see `load_split`."""
    columns = [*task.text_columns, *([] if task.label_column is None else [task.label_column])]
    return load_split(task.dataset, task.splits.get(split, split), columns)


def load_split(name_or_path: str, split: str, columns: Iterable[str]) -> Dataset:
    """Returns one split of a data set on the Hub, in a local folder or in a local file.

    Args:
        name_or_path: A Hub id, with the subset after a colon and the revision after an @ ("cardiffnlp/tweet_eval:sentiment",
            "eriktks/conll2003@refs/convert/parquet"), a folder, or a csv, jsonl or parquet file, which is a data set with
            the split "train" alone.
        split: The data set's own name of the split.
        columns: The columns that will be read.

    Raises:
        DataError: The split or a column is missing, or the split is empty.
    """
    known = split_names(name_or_path)
    if split not in known:
        raise DataError(
            f"{name_or_path}: no split {split!r}; it has {', '.join(known)}. Name the data set's own in the task's `splits`."
        )
    name, file_format = name_or_path, FILE_FORMATS.get(Path(name_or_path).suffix)
    source = {"path": file_format, "data_files": {"train": name}} if file_format else hub_source(name)
    try:
        data = load_dataset(**source, split=split)
    except (ValueError, DatasetGenerationError) as error:  # of no rows, `datasets` makes an error too
        raise DataError(f"{name_or_path}, split {split}: no rows, or none that can be read ({error}).") from error
    if missing := [column for column in columns if column not in data.column_names]:
        raise DataError(f"{name_or_path}, split {split}: no column {missing}; it has {data.column_names}.")
    return data


@cache
def split_names(name_or_path: str) -> list[str]:
    """Returns a data set's own names of its splits.

    Raises:
        DataError: There is no such data set.
    """
    if Path(name_or_path).suffix in FILE_FORMATS and Path(name_or_path).is_file():
        return ["train"]
    source = hub_source(name_or_path)
    try:
        return get_dataset_split_names(source["path"], source.get("name"), revision=source.get("revision"))
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a data set that is a script
        raise DataError(f"{name_or_path} is no data set that can be read: {error}") from error


def hub_source(name_or_path: str) -> dict[str, str]:
    """Returns `load_dataset`'s arguments for "name", "name:subset", "name@revision" or "name@revision:subset"; a folder is
    itself.
    """
    if Path(name_or_path).exists():
        return {"path": name_or_path}
    name, _, subset = name_or_path.partition(":")
    name, _, revision = name.partition("@")
    return {"path": name, **({"name": subset} if subset else {}), **({"revision": revision} if revision else {})}


def class_names(data: Dataset, column: str) -> list[str]:
    """Returns the label names that the data set declares for a `ClassLabel` column (or a list of them).

    Raises:
        DataError: The column declares none.
    """
    feature = data.features[column]
    names = getattr(getattr(feature, "feature", feature), "names", None)
    if not names:
        raise DataError(
            f"column {column!r} declares no label names; its type is {feature}. Give the task's `labels` in the recipe."
        )
    return list(names)


def task_labels(task: TaskRecipe, data: Dataset) -> list[str]:
    """Returns the label names of a task with a head, in the order of its numbers."""
    if task.labels is not None:
        return list(task.labels)
    if task.head.get("problem_type") == "regression":
        return [str(task.label_column)]
    return class_names(data, str(task.label_column))


def label_id(value: object, labels: list[str], where: str) -> int:
    """Returns the number of a label given by number or by name; -100 for a missing one (None).

    Raises:
        DataError: There is no such label; the message starts with `where`.
    """
    if value is None:
        return IGNORE_INDEX
    if isinstance(value, str) and value in labels:
        return labels.index(value)
    if type(value) is int and 0 <= value < len(labels):
        return value
    raise DataError(f"{where}: label {value!r} is none of 0 … {len(labels) - 1} ({', '.join(labels)}).")


def align_tags(text: str, encoding: Any, spans: list[tuple[int, int]], tags: list[str]) -> list[str | None]:
    """Returns a tag per token of one encoded text: at each word's first token its BIO tag, elsewhere None.

    A data set's token such as "U.S." can be several words to the model; the first gets the tag itself, the others
    its `I-` form, so that training sees words just as the pipeline cuts them out of raw text.

    Args:
        text: The text.
        encoding: Its fast-tokenizer encoding with `offsets` and `word_ids`.
        spans: Character span (start, end) of each tagged token, in order.
        tags: BIO tag of each.
    """
    aligned: list[str | None] = []
    index = 0
    for (start, _), is_start in zip(*word_starts(text, encoding.offsets, encoding.word_ids), strict=True):
        while index < len(spans) and spans[index][1] <= start:
            index += 1
        if not is_start or index == len(spans):
            aligned.append(None)
        elif start > spans[index][0] and tags[index].startswith("B-"):
            aligned.append("I-" + tags[index][2:])
        else:
            aligned.append(tags[index])
    return aligned


def make_examples(
    task: TaskRecipe, data: Dataset, labels: list[str], tokenizer: PreTrainedTokenizerBase, where: str
) -> list[Example]:
    """Returns a split's examples, ready for `make_batch`.

    An example holds `input_ids` (for pairs and triplets a list of them), `text` likewise, and `labels`: int for single
    labels, float per label for multi-label and regression, int per token for tags, float for a pair's score. Token
    examples also hold `casing_ids`.

    Args:
        task: The task.
        data: Its split.
        labels: Its label names; empty for pairs and triplets.
        tokenizer: A fast tokenizer; texts are cut to its `model_max_length`.
        where: Names data set and split in errors.

    Raises:
        DataError: A row does not hold what it should; the message names it and the column.
    """
    if task.kind == TOKEN:
        return _token_examples(task, data, labels, tokenizer, where)
    columns = [_texts(data, column, where) for column in task.text_columns]
    ids = [tokenizer(texts, truncation=True)["input_ids"] for texts in columns]
    values = data[task.label_column] if task.label_column else [0.0] * len(data)
    examples = []
    for row, (row_ids, texts, value) in enumerate(
        zip(zip(*ids, strict=True), zip(*columns, strict=True), values, strict=True)
    ):
        label = _label(task, value, labels, f"{where}, row {row}, column {task.label_column}")
        single = len(columns) == 1
        examples.append(
            {"input_ids": row_ids[0] if single else list(row_ids), "text": texts[0] if single else texts, "labels": label}
        )
    return examples


def _texts(data: Dataset, column: str, where: str) -> list[str]:
    texts = list(data[column])
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"{where}, row {row}, column {column}: {text!r:.50} is no text.")
    return texts


def _label(task: TaskRecipe, value: Any, labels: list[str], where: str) -> Any:
    """Returns one row's label as the task's loss wants it; -100 where it is missing."""
    problem = task.head.get("problem_type")
    if not task.has_head:
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise DataError(f"{where}: score {value!r} is no number.")
        return float(value)
    if problem is None or problem == "single_label_classification":
        return label_id(value, labels, where)
    if value is None:
        return [float(IGNORE_INDEX)] * len(labels)
    if problem == "multi_label_classification":
        present = {label_id(x, labels, where) for x in _list(value, where)}
        return [float(i in present) for i in range(len(labels))]
    numbers = _list(value, where) if isinstance(value, list) else [value]
    if len(numbers) != len(labels) or not all(isinstance(x, int | float) for x in numbers):
        raise DataError(f"{where}: {value!r} is not {len(labels)} number(s), one for each of: {', '.join(labels)}.")
    return [float(x) for x in numbers]


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"{where}: {value!r} is no list of labels.")
    return value


def _token_examples(
    task: TaskRecipe, data: Dataset, labels: list[str], tokenizer: PreTrainedTokenizerBase, where: str
) -> list[Example]:
    rows = _tagged_rows(task, data, labels, where)
    groups = [rows[start : start + task.passage_rows] for start in range(0, len(rows), task.passage_rows)]
    if task.passage_rows > 1:  # rows as they are, and longer texts, as people have them
        rows = rows + [tuple(list(chain(*column)) for column in zip(*group, strict=True)) for group in groups]
    return [_token_example(tokens, tags, labels, tokenizer) for tokens, tags in rows]


def _tagged_rows(task: TaskRecipe, data: Dataset, labels: list[str], where: str) -> list[tuple[list[str], list[str | None]]]:
    """Returns each row's tokens and the names of their tags, None for a missing one."""
    column = str(task.label_column)
    rows = []
    for row, (tokens, tags) in enumerate(zip(data[task.text_columns[0]], data[column], strict=True)):
        if not isinstance(tokens, list) or not isinstance(tags, list) or not all(isinstance(x, str) for x in tokens):
            raise DataError(f"{where}, row {row}: {tokens!r:.50} are no list of words, or {tags!r:.50} no list of tags.")
        if len(tokens) != len(tags):
            raise DataError(f"{where}, row {row}: {len(tokens)} {task.text_columns[0]} but {len(tags)} {column}.")
        ids = [label_id(tag, labels, f"{where}, row {row}, column {column}, token {i}") for i, tag in enumerate(tags)]
        rows.append((list(tokens), [None if x == IGNORE_INDEX else labels[x] for x in ids]))
    return rows


def _token_example(
    tokens: list[str], tags: list[str | None], labels: list[str], tokenizer: PreTrainedTokenizerBase
) -> Example:
    text = " ".join(tokens)
    encoding = tokenizer(text, truncation=True).encodings[0]
    window = Window(0, encoding.ids)
    find_words(window, text, encoding, True, True)
    aligned = align_tags(text, encoding, token_spans(tokens), [tag or "" for tag in tags])
    # A scheme without `I-` labels has none for the further words of a token.
    ids = [labels.index(tag) if tag in labels else IGNORE_INDEX for tag in aligned]
    return {"input_ids": encoding.ids, "labels": ids, "text": text, "casing_ids": window.casings}


def cut_texts(examples: list[Example], max_length: int) -> int:
    """Returns how many examples hold a text that fills the window, and so may have lost its end."""
    return sum(any(len(ids) >= max_length for ids in text_ids(example)) for example in examples)


def text_ids(example: Example) -> list[list[int]]:
    """Returns the token ids of each text of an example: one, or those of a pair or a triplet."""
    ids = example["input_ids"]
    return ids if isinstance(ids[0], list) else [ids]


def pad(rows: list[list[int]], value: int) -> Tensor:
    """Returns rows of different lengths as one int [B, T] tensor."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def pad_batch(rows: list[list[int]], pad_token_id: int) -> dict[str, Tensor]:
    """Returns tokenized texts as `input_ids` and `attention_mask`, int [B, T]."""
    return {"input_ids": pad(rows, pad_token_id), "attention_mask": pad([[1] * len(row) for row in rows], 0)}


def make_batch(task: str, kind: str, examples: list[Example], pad_token_id: int) -> dict[str, Any]:
    """Returns examples of one task as tensors.

    Pairs and triplets become one batch of texts: all first ones, then all second ones, and so on. With `target` vectors
    in the examples, the batch holds them as float [texts, H].
    """
    sides = len(text_ids(examples[0]))
    batch: dict[str, Any] = {"task": task}
    batch.update(pad_batch([text_ids(x)[side] for side in range(sides) for x in examples], pad_token_id))
    labels = [x["labels"] for x in examples]
    if kind == TOKEN:
        batch["labels"] = pad(labels, IGNORE_INDEX)
        batch["casing_ids"] = pad([x["casing_ids"] for x in examples], 0)
    else:
        batch["labels"] = torch.tensor(labels, dtype=torch.float32 if kind == SCORED_PAIRS else None)
    if "target" in examples[0]:
        batch["target"] = torch.cat([torch.stack([x["target"][side] for x in examples]) for side in range(sides)])
    return batch


@torch.inference_mode()
def encode(encoder: Any, rows: list[list[int]], pooling_mode: str, pad_token_id: int, what: str | None = None) -> Tensor:
    """Returns the encoder's pooled vectors of tokenized texts, float [len(rows), H], in the order of `rows`.

    With `what`, a progress bar says what is read.
    """
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    vectors = torch.empty(len(rows), encoder.config.hidden_size)
    for start in tqdm(range(0, len(order), ENCODED_TOGETHER), desc=what, unit="batch", disable=what is None):
        chosen = order[start : start + ENCODED_TOGETHER]
        inputs = {name: x.to(encoder.device) for name, x in pad_batch([rows[i] for i in chosen], pad_token_id).items()}
        hidden = encoder(**inputs).last_hidden_state
        vectors[chosen] = pool(hidden, inputs["attention_mask"], pooling_mode).float().cpu()
    return vectors
