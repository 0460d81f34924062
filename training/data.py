"""Training data: data sets from the Hub or from folders, turned into tokenized examples."""

from collections.abc import Iterable
from typing import Any

import torch
from datasets import Dataset, load_dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from evaluation.metrics import token_spans
from modeling_multitask import IGNORE_INDEX
from pipeline_multitask import word_starts
from training.recipe import TaskRecipe

Example = dict[str, Any]


def load_task_split(task: TaskRecipe, split: str) -> Dataset:
    """Returns one split of a recipe task's data set, see `load_split`."""
    return load_split(task.dataset, split, [*task.text_columns, task.label_column])


def load_split(name_or_path: str, split: str, columns: Iterable[str]) -> Dataset:
    """Returns one split of a data set on the Hub or in a local folder.

    Args:
        name_or_path: A Hub id ("eriktks/conll2003", or "cardiffnlp/tweet_eval:sentiment" with a subset) or a folder.
        split: "train", "validation" or "test".
        columns: The columns that will be read.

    Raises:
        ValueError: A column is missing or the split is empty.
    """
    name, _, subset = name_or_path.partition(":")
    data = load_dataset(name, subset or None, split=split)
    if missing := [column for column in columns if column not in data.column_names]:
        raise ValueError(f"{name_or_path}, split {split}: no column {missing}; it has {data.column_names}.")
    if len(data) == 0:
        raise ValueError(f"{name_or_path}, split {split}: no rows.")
    return data


def class_names(data: Dataset, column: str) -> list[str]:
    """Returns the label names that the data set declares for a `ClassLabel` column (or a list of them).

    Raises:
        ValueError: The column declares none.
    """
    feature = data.features[column]
    names = getattr(getattr(feature, "feature", feature), "names", None)
    if not names:
        raise ValueError(f"column {column!r} declares no label names; its type is {feature}.")
    return list(names)


def check_labels(labels: Iterable[int], num_labels: int, where: str) -> None:
    """Raises a ValueError that names the row if a label is not in 0 … num_labels - 1."""
    for row, label in enumerate(labels):
        if not isinstance(label, int) or not 0 <= label < num_labels:
            raise ValueError(f"{where}, row {row}: label {label!r} is outside 0 … {num_labels - 1}.")


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


def token_examples(
    data: Dataset, tokens_column: str, tags_column: str, labels: list[str], tokenizer: PreTrainedTokenizerBase
) -> list[Example]:
    """Returns examples with `input_ids`, `labels` (int per token, -100 where none) and `text`.

    Raises:
        ValueError: A row has tokens and tags of different lengths, or a tag outside `labels`.
    """
    examples = []
    for row, (tokens, tags) in enumerate(zip(data[tokens_column], data[tags_column], strict=True)):
        if len(tokens) != len(tags):
            raise ValueError(f"row {row}: {len(tokens)} {tokens_column} but {len(tags)} {tags_column}.")
        check_labels(tags, len(labels), f"row {row} of {tags_column}")
        text = " ".join(tokens)
        encoding = tokenizer(text, truncation=True).encodings[0]
        aligned = align_tags(text, encoding, token_spans(tokens), [labels[tag] for tag in tags])
        ids = [IGNORE_INDEX if tag is None else labels.index(tag) for tag in aligned]
        examples.append({"input_ids": encoding.ids, "labels": ids, "text": text})
    return examples


def sequence_examples(
    data: Dataset, text_column: str, label_column: str, labels: list[str], tokenizer: PreTrainedTokenizerBase
) -> list[Example]:
    """Returns examples with `input_ids`, `labels` (int) and `text`.

    Raises:
        ValueError: A row has a label outside `labels`.
    """
    check_labels(data[label_column], len(labels), f"column {label_column}")
    ids = tokenizer(list(data[text_column]), truncation=True)["input_ids"]
    return [
        {"input_ids": x, "labels": y, "text": t} for x, y, t in zip(ids, data[label_column], data[text_column], strict=True)
    ]


def pair_examples(
    data: Dataset, text_columns: list[str], score_column: str, tokenizer: PreTrainedTokenizerBase
) -> list[Example]:
    """Returns examples with `input_ids` and `text`, lists of two, and `labels`, the pair's score (float)."""
    first, second = (list(data[column]) for column in text_columns)
    ids = [tokenizer(texts, truncation=True)["input_ids"] for texts in (first, second)]
    return [
        {"input_ids": pair, "labels": float(score), "text": texts}
        for pair, score, texts in zip(
            zip(*ids, strict=True), data[score_column], zip(first, second, strict=True), strict=True
        )
    ]


def pad(rows: list[list[int]], value: int) -> Tensor:
    """Returns rows of different lengths as one int [B, T] tensor."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def pad_batch(rows: list[list[int]], pad_token_id: int) -> dict[str, Tensor]:
    """Returns tokenized texts as `input_ids` and `attention_mask`, int [B, T]."""
    return {"input_ids": pad(rows, pad_token_id), "attention_mask": pad([[1] * len(row) for row in rows], 0)}
