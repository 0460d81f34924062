"""Training data: labels land where they should, and what a data set does not hold is named by split, row and column."""

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from hypothesis import given
from hypothesis import strategies as st

from annotator_multitask import Window, find_words
from common.data import (
    class_names,
    data_source,
    load_split,
    make_batch,
    make_examples,
    rewrite,
    rewritten,
    task_labels,
    token_spans,
    word_tags,
)
from common.recipe import TaskRecipe
from modeling_multitask import IGNORE_INDEX
from tasks_multitask import CASINGS
from tests.conftest import WINDOW, tiny_tokenizer

TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
FAMILIES = ("wordpiece", "bytes", "unigram")  # of BERT, RoBERTa and XLM-R


def aligned(family, tokens, tags):
    """Returns the labelled words of joined tokens as (text of the first token, tag)."""
    text = " ".join(tokens)
    encoding = tiny_tokenizer(family)(text).encodings[0]
    window = Window(0, encoding.ids)
    find_words(window, text, encoding, True, True)
    spans = [span for _, span in window.words]
    return [
        (text[start:end].strip()[:1], tag)
        for (start, end), tag in zip(spans, word_tags(spans, token_spans(tokens), tags), strict=True)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_word_gets_its_tag_once_and_subwords_get_none(family):
    words = aligned(family, ["Tim", "Cook", "saw", "Rome", "."], ["B-PER", "I-PER", "O", "B-LOC", "O"])
    assert words == [("T", "B-PER"), ("C", "I-PER"), ("s", "O"), ("R", "B-LOC"), (".", "O")]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_of_several_words_begins_once_and_goes_on_inside(family):
    words = aligned(family, ["in", "U.S.", "x-ray", "Paris"], ["O", "B-LOC", "O", "B-LOC"])
    assert words == [
        ("i", "O"), ("U", "B-LOC"), (".", "I-LOC"), ("S", "I-LOC"), (".", "I-LOC"),
        ("x", "O"), ("-", "O"), ("r", "O"), ("P", "B-LOC"),
    ]  # fmt: skip


@given(st.lists(st.text(alphabet="aB.-'é😀", min_size=1, max_size=4), min_size=1, max_size=6), st.data())
def test_alignment_loses_no_token_and_invents_no_beginning(tokens, data):
    tags = data.draw(st.lists(st.sampled_from(["O", "B-PER"]), min_size=len(tokens), max_size=len(tokens)))
    for family in ("wordpiece", "bytes"):
        words = [tag for _, tag in aligned(family, tokens, tags)]
        assert words.count("B-PER") == tags.count("B-PER")
        assert len(words) >= len(tokens)


def sequence(problem: str | None = None, **fields) -> TaskRecipe:
    head = {} if problem is None else {"problem_type": problem}
    return TaskRecipe(
        **{
            "kind": "sequence_classification",
            "dataset": "d",
            "text_columns": ["x"],
            "label_column": "y",
            "head": head,
            **fields,
        }
    )


def token(**fields) -> TaskRecipe:
    return TaskRecipe(
        **{"kind": "token_classification", "dataset": "d", "text_columns": ["x"], "label_column": "y", **fields}
    )


def pairs() -> TaskRecipe:
    return TaskRecipe(kind="scored_pairs", dataset="d", text_columns=["a", "b"], label_column="y")


def make(task: TaskRecipe, labels: list[str], **columns):
    return make_examples(task, Dataset.from_dict(columns), labels, tiny_tokenizer(), "d, split train")


# Examples


def test_texts_are_cut_at_the_window_and_special_tokens_have_no_tag():
    example = make(token(), TAGS, x=[["Tim"] * 50], y=[[1] * 50])[0]
    assert len(example["input_ids"]) == len(example["labels"]) == len(example["casing_ids"]) == WINDOW
    assert example["labels"] == [IGNORE_INDEX, *[1] * (WINDOW - 2), IGNORE_INDEX]


def test_every_piece_of_a_word_has_the_words_casing():
    example = make(token(), TAGS, x=[["Tim", "USA", "a1", "X", "7", "."]], y=[[0] * 6])[0]
    names = [CASINGS[i] for i in example["casing_ids"]]
    assert names == ["unknown", "title", *["upper"] * 3, *["lower"] * 2, "capital", "digits", "punctuation", "unknown"]


def test_labels_of_every_kind():
    assert [x["labels"] for x in make(sequence(), ["n", "p"], x=["a", "b", "c"], y=[1, 0, None])] == [1, 0, IGNORE_INDEX]
    assert [x["labels"] for x in make(sequence(), ["n", "p"], x=["a", "b"], y=["p", "n"])] == [1, 0]
    many = make(sequence("multi_label_classification"), ["n", "p"], x=["a", "b", "c"], y=[[1], [], None])
    assert [x["labels"] for x in many] == [[0.0, 1.0], [0.0, 0.0], [-100.0, -100.0]]
    assert make(sequence("multi_label_classification"), ["n", "p"], x=["a"], y=[1])[0]["labels"] == [0.0, 1.0]
    assert [x["labels"] for x in make(sequence("regression"), ["y"], x=["a", "b"], y=[0.5, 2])] == [[0.5], [2.0]]
    assert make(token(), TAGS, x=[["a", "b"]], y=[["B-PER", None]])[0]["labels"] == [-100, 1, -100, -100]
    assert make(pairs(), [], a=["x"], b=["y"], y=[1])[0] == {
        "input_ids": [[1, 91, 2], [1, 92, 2]],
        "text": ("x", "y"),
        "labels": 1.0,
    }


def test_a_scheme_without_inside_labels_has_none_for_further_words():
    example = make(token(), ["O", "B-LOC"], x=[["U.S."]], y=[[1]])[0]
    assert example["labels"] == [-100, 1, -100, -100, -100, -100]


def test_a_hub_data_set_has_a_subset_and_a_revision():
    assert data_source("a/b") == {"path": "a/b"} and data_source("a/b:c") == {"path": "a/b", "name": "c"}
    assert data_source("a/b@refs/x/y:c") == {"path": "a/b", "name": "c", "revision": "refs/x/y"}


def test_rows_are_also_joined_to_passages():
    rows = {"x": [["a"], ["b"], ["c"]], "y": [[0], [1], [3]]}
    examples = make(token(passage_rows=2), TAGS, **rows)
    assert [x["text"] for x in examples] == ["a", "b", "c", "a b", "c"]
    assert examples[3]["labels"] == [-100, 0, 1, -100]
    assert [x["text"] for x in make(token(), TAGS, **rows)] == ["a", "b", "c"]


def test_label_names_come_from_the_recipe_or_the_data():
    features = Features({"x": Value("string"), "y": ClassLabel(names=["n", "p"]), "z": List(ClassLabel(names=["u", "v"]))})
    data = Dataset.from_dict({"x": ["a"], "y": [0], "z": [[1]]}, features=features)
    assert task_labels(sequence(), data) == ["n", "p"] and task_labels(sequence(label_column="z"), data) == ["u", "v"]
    assert task_labels(sequence(labels=["no", "yes"]), data) == ["no", "yes"]
    assert task_labels(sequence("regression", label_column="x"), data) == ["x"]
    with pytest.raises(ValueError, match="column 'x' declares no label names.*Give the task's `labels` in the recipe"):
        class_names(data, "x")


BAD = {
    "tokens and tags differ": (
        token(),
        TAGS,
        {"x": [["a"], ["a", "b"]], "y": [[0], [0]]},
        "d, split train, row 1: 2 x but 1 y",
    ),
    "an unknown tag": (
        token(),
        TAGS,
        {"x": [["a", "b"]], "y": [[0, 9]]},
        "row 0, column y, token 1: label 9 is none of 0 … 4",
    ),
    "an unknown number": (
        sequence(),
        ["n", "p"],
        {"x": ["a", "b"], "y": [0, -1]},
        "row 1, column y: label -1 is none of 0 … 1",
    ),
    "an unknown name": (sequence(), ["n", "p"], {"x": ["a"], "y": ["q"]}, r"label 'q' is none of 0 … 1 \(n, p\)"),
    "no text": (
        sequence(),
        ["n", "p"],
        {"x": ["a", None], "y": [0, 1]},
        "d, split train, row 1, column x: None is not a text",
    ),
    "no label of several": (
        sequence("multi_label_classification"),
        ["n"],
        {"x": ["a"], "y": [{}]},
        "row 0, column y: label {} is none of 0",
    ),
    "too few numbers": (sequence("regression"), ["u", "v"], {"x": ["a"], "y": [1.0]}, "1.0 is not 2 number"),
    "no words": (token(), TAGS, {"x": [["a"], None], "y": [[0], [0]]}, "row 1: None are not a list of words, or"),
    "no score": (pairs(), [], {"a": ["x"], "b": ["y"], "y": [None]}, "row 0, column y: score None is no number"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_named_by_split_row_and_column(name):
    task, labels, columns, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        make(task, labels, **columns)


# Several data sets for one task


def declared(names, **columns):
    """Returns a data set whose column y declares its label names."""
    features = Features({"x": List(Value("string")) if isinstance(columns["x"][0], list) else Value("string")})
    is_list = isinstance(columns["y"][0], list)
    features["y"] = List(ClassLabel(names=names)) if is_list else ClassLabel(names=names)
    return Dataset.from_dict(columns, features=features)


def mapped(task, names, labels, **columns):
    examples = make_examples(task, declared(names, **columns), labels, tiny_tokenizer(), "d, split train")
    return [x["labels"] for x in examples]


def test_a_mapping_turns_a_data_sets_labels_into_the_tasks():
    task = sequence(labels=["bad", "good"], mapping={"neg": "bad", "pos": "good", "odd": ""})
    assert mapped(task, ["pos", "neg", "odd"], ["bad", "good"], x=["a", "b", "c"], y=[0, 1, 2]) == [1, 0, IGNORE_INDEX]
    several = mapped(task, ["pos", "neg", "odd"], ["bad", "good"], x=["a", "b", "c"], y=[[0, 2], [0, 1], [2]])
    assert several == [1, IGNORE_INDEX, IGNORE_INDEX], "several labels of one meaning are one; of two they are none"


def test_declared_names_count_and_not_their_order():
    assert mapped(sequence(labels=["bad", "good"]), ["good", "bad"], ["bad", "good"], x=["a", "b"], y=[0, 1]) == [1, 0]


def test_entity_types_are_mapped_with_their_prefixes():
    names = ["O", "B-person", "I-person", "B-thing", "I-thing"]
    task = token(labels=TAGS, mapping={"person": "PER", "thing": ""})
    found = mapped(task, names, TAGS, x=[["Tim", "Cook", "iPhone"]], y=[[1, 2, 3]])
    assert [x for x in found[0] if x != IGNORE_INDEX] == [1, 2, 0]


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"neg": "bad", "pos": "good", "huh": "bad"}, "mapping names 'huh', which the data set has not"),
        ({"neg": "bad"}, "label 'pos' is mapped to nothing; add it to the mapping.*labels are: neg, pos"),
    ],
)
def test_a_mapping_that_does_not_fit_its_data_set_is_refused(mapping, message):
    with pytest.raises(ValueError, match=message):
        mapped(sequence(labels=["bad", "good"], mapping=mapping), ["neg", "pos"], ["bad", "good"], x=["a"], y=[0])


def test_texts_are_rewritten_as_people_write():
    assert [rewrite("Hello there, Tim!", form) for form in ("lower", "upper", "title", "bare", None)] == [
        "hello there, tim!", "HELLO THERE, TIM!", "Hello There, Tim!", "Hello there, Tim", "Hello there, Tim!",
    ]  # fmt: skip
    assert rewrite("...", "bare") == "..."
    (example,) = make(token(), TAGS, x=[["Tim", "Cook", "left", "."]], y=[[1, 2, 0, 0]])
    lower = rewritten(example, "lower", TAGS, tiny_tokenizer())
    assert lower["text"] == "tim cook left ." and [x for x in lower["labels"] if x >= 0] == [1, 2, 0, 0]
    assert {CASINGS[i] for i in lower["casing_ids"]} == {"unknown", "lower", "punctuation"}
    bare = rewritten(example, "bare", TAGS, tiny_tokenizer())
    assert bare["text"] == "Tim Cook left" and [x for x in bare["labels"] if x >= 0] == [1, 2, 0]


def test_an_invisible_character_moves_no_beginning():
    (example,) = make(token(), TAGS, x=[["in", "\u200bParis"]], y=[[0, 3]])
    assert [x for x in example["labels"] if x >= 0] == [0, 3]


# Splits


@pytest.fixture
def folder(tmp_path):
    for part, rows in (("train", 4), ("validation", 0)):
        Dataset.from_dict({"text": ["a"] * rows, "label": [0] * rows}).to_parquet(tmp_path / f"{part}.parquet")
    return tmp_path


def test_splits_come_from_folders_and_files(folder, tmp_path_factory):
    assert len(load_split(str(folder), "train", ["text", "label"])) == 4
    file = tmp_path_factory.mktemp("files") / "file.jsonl"
    file.write_text('{"text": "b", "label": 1}\n')
    assert load_split(str(file), "train", ["text"])["text"][:] == ["b"]
    with pytest.raises(ValueError, match="no split 'test'; it has train"):
        load_split(str(file), "test", ["text"])
    file.write_text('{"text": ')
    with pytest.raises(ValueError, match=r"file.jsonl, split train: no rows, or none that can be read"):
        load_split(str(file), "train", ["text"])


def test_what_is_missing_in_a_data_set_is_named(folder):
    with pytest.raises(ValueError, match=r"split train: no column \['label2'\]; it has \['text', 'label'\]"):
        load_split(str(folder), "train", ["label2"])
    with pytest.raises(ValueError, match="no split 'dev'; it has .*train.*Name the data set's own in the task's `splits`"):
        load_split(str(folder), "dev", ["text"])
    with pytest.raises(ValueError, match="split validation: no rows, or none that can be read"):
        load_split(str(folder), "validation", ["text"])
    with pytest.raises(ValueError, match="nowhere is no data set that can be read"):
        load_split(str(folder / "nowhere"), "train", ["text"])


# Batches


def test_a_batch_of_pairs_holds_all_first_texts_and_then_all_second_ones():
    examples = make(pairs(), [], a=["x", "y"], b=["xx", "yy"], y=[0.5, 1.0])
    for i, example in enumerate(examples):
        example["target"] = torch.tensor([[i, 0.0], [i, 1.0]])
    examples = [{**x, "labels": {"p": x["labels"]}} for x in examples]
    batch = make_batch({"p": "scored_pairs"}, examples, 0)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0]] * 2 + [[1, 1, 1, 1]] * 2 and "casing_ids" not in batch
    assert batch["input_ids"].tolist() == [[1, 91, 2, 0], [1, 92, 2, 0], [1, 91, 185, 2], [1, 92, 186, 2]]
    assert batch["target"].tolist() == [[0, 0], [1, 0], [0, 1], [1, 1]] and batch["labels"]["p"].tolist() == [0.5, 1.0]


def test_a_batch_of_tags_is_padded_where_nothing_counts():
    examples = make(token(), TAGS, x=[["A", "b"], ["c"]], y=[[1, 0], [3]])
    batch = make_batch({"t": "token_classification"}, [{**x, "labels": {"t": x["labels"]}} for x in examples], 0)
    assert batch["labels"]["t"].tolist() == [[-100, 1, 0, -100], [-100, 3, -100, -100]]
    assert batch["casing_ids"].tolist() == [[0, 4, 1, 0], [0, 1, 0, 0]]
