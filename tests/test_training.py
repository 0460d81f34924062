"""Training data and the training loop: labels land where they should, and a model learns from every kind of task."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, BertModel

from evaluation import evaluate
from evaluation.metrics import token_spans
from modeling_multitask import IGNORE_INDEX, MultiTaskModel
from pipeline_multitask import MultiTaskPipeline
from tests.conftest import ROOT, WINDOW, tiny_config, tiny_tokenizer
from training import train
from training.data import align_tags, class_names, load_split, pad_batch, sequence_examples, token_examples
from training.recipe import Recipe, RecipeError, TaskRecipe

TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def aligned(family, tokens, tags):
    """Returns the labelled words of joined tokens as (text of the first token, tag)."""
    text = " ".join(tokens)
    encoding = tiny_tokenizer(family)(text).encodings[0]
    found = align_tags(text, encoding, token_spans(tokens), tags)
    return [
        (text[start:end].strip()[:1], tag)
        for (start, end), tag in zip(encoding.offsets, found, strict=True)
        if tag is not None
    ]


@pytest.mark.parametrize("family", ["wordpiece", "bytes", "unigram"])
def test_each_word_gets_its_tag_once_and_subwords_get_none(family):
    words = aligned(family, ["Tim", "Cook", "saw", "Rome", "."], ["B-PER", "I-PER", "O", "B-LOC", "O"])
    assert words == [("T", "B-PER"), ("C", "I-PER"), ("s", "O"), ("R", "B-LOC"), (".", "O")]


@pytest.mark.parametrize("family", ["wordpiece", "bytes", "unigram"])
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


def test_token_examples_cut_at_the_window_and_ignore_special_tokens():
    data = Dataset.from_dict({"tokens": [["Tim"] * 50], "tags": [[1] * 50]})
    example = token_examples(data, "tokens", "tags", TAGS, tiny_tokenizer())[0]
    assert len(example["input_ids"]) == len(example["labels"]) == WINDOW
    assert example["labels"] == [IGNORE_INDEX, *[1] * (WINDOW - 2), IGNORE_INDEX]


def test_padding_and_masks():
    batch = pad_batch([[1, 5, 2], [1, 2]], pad_token_id=0)
    assert batch["input_ids"].tolist() == [[1, 5, 2], [1, 2, 0]] and batch["attention_mask"].tolist() == [
        [1, 1, 1],
        [1, 1, 0],
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: token_examples(Dataset.from_dict({"x": [["a"], ["a", "b"]], "y": [[0], [0]]}), "x", "y", TAGS, tiny_tokenizer()),
         "row 1: 2 x but 1 y"),
        (lambda: token_examples(Dataset.from_dict({"x": [["a"]], "y": [[9]]}), "x", "y", TAGS, tiny_tokenizer()),
         "row 0 of y, row 0: label 9 is outside 0 … 4"),
        (lambda: sequence_examples(Dataset.from_dict({"x": ["a", "b"], "y": [0, -1]}), "x", "y", ["n", "p"], tiny_tokenizer()),
         "column y, row 1: label -1 is outside 0 … 1"),
        (lambda: class_names(Dataset.from_dict({"y": [0]}), "y"), "column 'y' declares no label names"),
    ],
)  # fmt: skip
def test_bad_data_is_named_by_row_and_field(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.fixture
def folders(tmp_path):
    """Four small data sets as parquet folders, which `load_dataset` reads like sets on the Hub."""
    words = List(Value("string"))
    sets = {
        "mood": Dataset.from_dict(
            {"text": ["love it", "so sad", "love", "sad"], "label": [1, 0, 1, 0]},
            features=Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])}),
        ),
        "names": Dataset.from_dict(
            {"tokens": [["Tim", "is", "in", "Rome"], ["Cook", "!"]] * 2, "tags": [[1, 0, 0, 3], [1, 0]] * 2},
            features=Features({"tokens": words, "tags": List(ClassLabel(names=TAGS))}),
        ),
        "pairs": Dataset.from_dict(
            {"a": ["love", "so sad", "Rome"], "b": ["love it", "Paris", "Rome"], "score": [0.8, 0.1, 1.0]}
        ),
    }
    for name, data in sets.items():
        (tmp_path / name).mkdir()
        data.to_parquet(tmp_path / name / "train.parquet")
    return tmp_path


def test_splits_come_from_folders_and_problems_are_named(folders):
    data = load_split(str(folders / "mood"), "train", ["text", "label"])
    assert class_names(data, "label") == ["bad", "good"] and len(data) == 4
    assert class_names(load_split(str(folders / "names"), "train", ["tags"]), "tags") == TAGS
    with pytest.raises(ValueError, match=r"mood, split train: no column \['label2'\]; it has \['text', 'label'\]"):
        load_split(str(folders / "mood"), "train", ["label2"])


RECIPE = """
[model]
encoder = "{encoder}"
pooling_mode = "mean"
embedding_dim = 8
prefix_dims = [4]
max_length = 32

[tasks.mood]
kind = "sequence_classification"
dataset = "{data}/mood"
folder = "mood"
text_columns = ["text"]
label_column = "label"
batch_size = 2
epochs = {epochs}

[tasks.ner]
kind = "token_classification"
dataset = "{data}/names"
folder = "names"
text_columns = ["tokens"]
label_column = "tags"
batch_size = 4
epochs = {epochs}

[tasks.similarity]
kind = "scored_pairs"
dataset = "{data}/pairs"
folder = "pairs"
text_columns = ["a", "b"]
label_column = "score"
batch_size = 3
epochs = {epochs}

[training]
learning_rate = 5e-3
head_learning_rate = 2e-2
weight_decay = 0.0
warmup_ratio = 0.05
preserve_weight = 0.1
freeze = "{freeze}"
seed = 3
"""


def train_tiny(folders, tmp_path, monkeypatch, freeze, epochs):
    """Trains a tiny model on the small sets with the command that a user would type; returns it and its encoder's start."""
    torch.manual_seed(0)
    BertModel(tiny_config(tasks={}, embedding_dim=None).encoder_config).save_pretrained(tmp_path / "encoder")
    tiny_tokenizer().save_pretrained(tmp_path / "encoder")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(encoder=tmp_path / "encoder", data=folders, epochs=epochs, freeze=freeze))
    monkeypatch.setattr("sys.argv", ["train", str(recipe), "--output", str(tmp_path / "run")])
    train.main()
    return MultiTaskModel.from_pretrained(tmp_path / "run/final"), BertModel.from_pretrained(tmp_path / "encoder")


def test_training_learns_every_task_and_leaves_frozen_embeddings_alone(folders, tmp_path, monkeypatch):
    model, start = train_tiny(folders, tmp_path, monkeypatch, freeze="word_embeddings", epochs=60)
    assert torch.equal(model.get_input_embeddings().weight, start.get_input_embeddings().weight)
    assert not torch.equal(model.encoder.encoder.layer[0].output.dense.weight, start.encoder.layer[0].output.dense.weight)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/final")
    pipe = MultiTaskPipeline(model=model, tokenizer=tokenizer, device="cpu")
    assert [x["labels"]["mood"]["label"] for x in pipe(["love it", "so sad"])] == ["good", "bad"]
    entities = pipe("Tim is in Rome")["entities"]["ner"]
    assert [(x["word"], x["entity_group"]) for x in entities] == [("Tim", "PER"), ("Rome", "LOC")]
    love, love_it, sad, paris = (pipe(x)["sentence_embedding"] for x in ("love", "love it", "so sad", "Paris"))
    assert love @ love_it > sad @ paris
    assert json.loads((tmp_path / "run/final/recipe.json").read_text())["training"]["seed"] == 3
    assert list(model.config.tasks) == ["mood", "ner"]


def test_evaluation_measures_what_users_get_and_says_on_what(folders, tmp_path, monkeypatch):
    train_tiny(folders, tmp_path, monkeypatch, freeze="word_embeddings", epochs=60)
    for folder in ("mood", "names", "pairs"):
        (folders / folder / "train.parquet").rename(folders / folder / "validation.parquet")
    final, output = str(tmp_path / "run/final"), tmp_path / "results/tiny.json"
    arguments = [final, "--recipe", str(tmp_path / "recipe.toml"), "--reference", str(tmp_path / "encoder")]
    monkeypatch.setattr("sys.argv", ["evaluate", *arguments, "--output", str(output)])
    monkeypatch.setattr("evaluation.evaluate.NEIGHBOURS", 2)
    evaluate.main()
    found = json.loads(output.read_text())
    assert found["tasks"]["mood"]["metrics"] == {"macro_recall": 1.0, "macro_f1": 1.0, "accuracy": 1.0}
    assert found["tasks"]["ner"]["metrics"]["f1"] == 1.0 and found["tasks"]["ner"]["rows"] == 4
    pairs = found["tasks"]["similarity"]["metrics"]
    assert pairs["spearman"] == 1.0 and {"spearman_4", "spearman_raw", "spearman_reference"} <= set(pairs)
    assert 0.5 < pairs["cosine_raw"] < 1 and 0 <= pairs["neighbours_at_2"] <= 1
    assert found["command"].endswith("--split validation --reference ENCODER") and found["recipe"]["training"]["seed"] == 3
    assert {"revision", "libraries", "hardware", "parameters"} <= set(found)
    assert str(tmp_path) not in json.dumps({name: x for name, x in found.items() if name != "recipe"})


def test_a_frozen_encoder_is_bit_identical_after_training(folders, tmp_path, monkeypatch):
    model, start = train_tiny(folders, tmp_path, monkeypatch, freeze="encoder", epochs=2)
    assert all(torch.equal(x, y) for x, y in zip(model.encoder.parameters(), start.parameters(), strict=True))


def test_a_resumed_run_ends_where_the_uninterrupted_one_does(folders, tmp_path, monkeypatch):
    make = train.training_arguments

    def save_often(*args):
        arguments = make(*args)
        arguments.save_steps = 5
        return arguments

    monkeypatch.setattr(train, "training_arguments", save_often)
    whole, _ = train_tiny(folders, tmp_path, monkeypatch, freeze="word_embeddings", epochs=4)
    for name in ("final", "checkpoint-16"):
        shutil.rmtree(tmp_path / "run" / name)
    assert (tmp_path / "run/checkpoint-15").is_dir()
    monkeypatch.setattr("sys.argv", [*sys.argv, "--resume"])
    train.main()
    resumed = MultiTaskModel.from_pretrained(tmp_path / "run/final")
    assert all(torch.equal(x, resumed.state_dict()[key]) for key, x in whole.state_dict().items())


def test_every_problem_of_a_recipe_is_reported_at_once(tmp_path):
    text = RECIPE.format(encoder="e", data="d", epochs=1, freeze="all")
    text = (
        text.replace("max_length = 32", "max_lenght = 32")
        .replace("epochs = 1", 'epochs = "one"', 1)
        .replace("seed = 3\n", "")
    )
    (tmp_path / "bad.toml").write_text(text.replace("prefix_dims = [4]", 'prefix_dims = [4, "x"]'))
    with pytest.raises(RecipeError) as caught:
        Recipe.read(tmp_path / "bad.toml")
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("bad.toml:") and len(lines) == 6
    for expected in (
        "model.max_lenght is unknown; known here: encoder, max_length",
        "model.max_length is missing",
        "model.prefix_dims[1] is 'x'; it must be of type int",
        "tasks.mood.epochs is 'one'; it must be of type int",
        "training.seed is missing",
    ):
        assert any(expected in line for line in lines), expected


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('freeze = "x"', 'freeze = "all"', "training.freeze is 'all'; allowed: nothing, word_embeddings, encoder"),
        ('"scored_pairs"', '"pairs"', "tasks.similarity.kind is 'pairs'; allowed: sequence_classification"),
        ('["a", "b"]', '["a"]', "tasks.similarity.text_columns is ['a']; a scored_pairs task needs 2"),
        ("batch_size = 4", "batch_size = 0", "tasks.ner.batch_size is 0; it must be at least 1"),
        ("weight_decay = 0.0", "weight_decay = nan", "training.weight_decay is nan"),
        ("[model]", "[model", "cannot be read"),
    ],
)
def test_values_of_a_recipe_are_checked(tmp_path, old, new, message):
    text = RECIPE.format(encoder="e", data="d", epochs=1, freeze="encoder" if "freeze" not in old else "x")
    assert old in text
    (tmp_path / "bad.toml").write_text(text.replace(old, new))
    with pytest.raises(RecipeError) as caught:
        Recipe.read(tmp_path / "bad.toml")
    assert message in str(caught.value)


@pytest.mark.parametrize("path", sorted((ROOT / "training/recipes").glob("*.toml")), ids=lambda path: path.name)
def test_the_recipes_of_this_repository_are_sound(path):
    recipe = Recipe.read(path, data=Path("copies"), encoder="folder")
    assert recipe.model.encoder == "folder"
    assert all(task.dataset == str(Path("copies") / task.folder) for task in recipe.tasks.values())


def test_the_projection_starts_as_orthonormal_principal_axes():
    vectors = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([9.0, 5, 3, 1, 1, 1])
    axes = train.principal_components(vectors, 3)
    torch.testing.assert_close(axes @ axes.T, torch.eye(3), atol=1e-5, rtol=0)
    assert axes[0].abs().argmax() == 0 and axes[1].abs().argmax() == 1


def test_every_example_is_in_a_batch_once_per_epoch_and_no_batch_mixes_tasks():
    examples = [
        {"input_ids": [1] * (i % 7 + 1), "labels": i, "text": "x" * (i % 7), "target": torch.zeros(2)} for i in range(23)
    ]
    fields = {"kind": "sequence_classification", "dataset": "", "folder": "", "text_columns": ["x"], "label_column": "y"}
    tasks = {name: TaskRecipe(**fields, batch_size=4, epochs=epochs) for name, epochs in (("a", 2), ("b", 1))}
    batches = train.TaskBatches(tasks, {"a": examples, "b": examples}, pad_token_id=0, seed=1)
    for name, times in (("a", 2), ("b", 1)):
        rows = [row for task_name, rows in batches.batches if task_name == name for row in rows]
        assert sorted(rows) == sorted(list(range(23)) * times)
    assert {batch["task"] for batch in (batches[i] for i in range(len(batches)))} == {"a", "b"}
    again = train.TaskBatches(tasks, {"a": examples, "b": examples}, pad_token_id=0, seed=1)
    assert again.batches == batches.batches
