"""Adding a task: the new head learns from cached features, everything else stays to the bit, and the card gains a row."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, pipeline

from modeling_multitask import MultiTaskModel
from release import card
from release.check import check
from tests.conftest import ROOT, TASKS, TEXTS, WINDOW, tiny_model, tiny_tokenizer, write_release
from training import add_task
from training.data import make_batch, make_examples
from training.recipe import Recipe, RecipeError, TaskRecipe

CITY = {"kind": "sequence_classification", "text_columns": ["text"], "label_column": "label", "folder": "city"}
PLACE = {"kind": "token_classification", "text_columns": ["tokens"], "label_column": "tags", "folder": "place"}
TAGS = ["O", "B-LOC", "I-LOC"]
CARD = "# A card\n\n<!-- results -->\n<!-- /results -->\n"


def city_rows(count: int) -> Dataset:
    """Returns texts of which those that name Paris have the label "city"."""
    texts = [f"{'paris' if i % 2 else 'love'} {'store ' * (i // 2 % 3)}{i // 2}" for i in range(count)]
    features = Features({"text": Value("string"), "label": ClassLabel(names=["other", "city"])})
    return Dataset.from_dict({"text": texts, "label": [i % 2 for i in range(count)]}, features=features)


def place_rows(count: int) -> Dataset:
    """Returns tokens that the uncased tokenizer cannot tell apart: "Paris" is a place, and "paris" is none."""
    tokens = [["Paris" if i % 2 else "paris", "is", "so", "x" * (1 + i % 4)] for i in range(count)]
    features = Features({"tokens": List(Value("string")), "tags": List(ClassLabel(names=TAGS))})
    return Dataset.from_dict({"tokens": tokens, "tags": [[i % 2, 0, 0, 0] for i in range(count)]}, features=features)


@pytest.fixture
def data(tmp_path) -> Path:
    """Folders of tiny data sets: one with all splits, one without a test split, one with a train split alone."""
    for name, rows, splits in [
        ("city", city_rows, ("train", "validation", "test")),
        ("place", place_rows, ("train", "validation")),
        ("lone", city_rows, ("train",)),
    ]:
        (tmp_path / name).mkdir()
        for split in splits:
            rows(48 if split == "train" else 12).to_parquet(tmp_path / name / f"{split}.parquet")
    return tmp_path


@pytest.fixture
def source(release, tmp_path) -> Path:
    """A release with a card, results and files of its own."""
    folder = Path(shutil.copytree(release, tmp_path / "source"))
    metric = {"key": "f1", "type": "f1", "name": "entity F1"}
    tasks = {"ner": {"title": "names", "task_type": "token-classification", "dataset": "u/n", "dataset_name": "N"}}
    tasks["ner"]["metrics"] = [metric]
    results = {"parameters": 1, "tasks": {"ner": {"metrics": {"f1": 0.5}, "split": "test", "rows": 1000, "sha256": "0"}}}
    for name, content in {"tasks": tasks, "release": results}.items():
        add_task.write_json(folder / f"results/{name}.json", content)
    (folder / "README.md").write_text(CARD)
    (folder / "README.md").write_text(card.render_card(CARD, folder))
    (folder / "annotate.py").write_text("print()\n")
    for name in ("tests", ".git"):
        (folder / name).mkdir()
    return folder


def recipe(data: Path, head: dict[str, Any] | None = None, name: str = "city", **fields: Any) -> Recipe:
    """Returns a recipe of one new task with a rate that suits a tiny head."""
    task = {**(PLACE if name == "place" else CITY), "epochs": 12, "batch_size": 8, "head": head or {}, **fields}
    task["dataset"] = str(data / task["folder"])
    optimizer = {"learning_rate": 0.02, "weight_decay": 0.0}
    return Recipe.build(
        {"model": {"encoder": "-", "max_length": 512}, "tasks": {name: task}, "optimizer": optimizer}, "test"
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.relative_to(folder)} {key}": x
        for path in folder.glob("**/*.safetensors")
        for key, x in load_file(path).items()
    }


def assert_only_the_head_is_new(source: Path, output: Path, name: str) -> None:
    """Compares all stored tensors, all files but those that must change, and all outputs."""
    before, after = weights(source), weights(output)
    assert all(torch.equal(x, after[key]) and x.dtype == after[key].dtype for key, x in before.items())
    assert {key.split(" ")[1].split(".")[1] for key in set(after) - set(before)} == {name}
    model, grown = (AutoModel.from_pretrained(x, trust_remote_code=True) for x in (source, output))
    assert list(grown.config.tasks) == [*model.config.tasks, name]
    inputs = tiny_tokenizer()(TEXTS, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        then, now = model(**inputs), grown(**inputs)
    assert torch.equal(then.sentence_embedding, now.sentence_embedding)
    assert all(torch.equal(x, now.logits[task]) for task, x in then.logits.items())


# What the head reads


HEADS = {
    "plain": (CITY, {}),
    "own pooling": (CITY, {"pooling_mode": "cls", "hidden_dim": 8}),
    "layer mix": (CITY, {"layer_mix": True}),
    "layer mix, weighted": (CITY, {"layer_mix": True, "pooling_mode": "weightedmean"}),
    "layer mix, root": (CITY, {"layer_mix": True, "pooling_mode": "mean_sqrt_len_tokens"}),
    "layer mix, maximum": (CITY, {"layer_mix": True, "pooling_mode": "max"}),
    "words": (PLACE, {}),
    "words with their neighbours": (PLACE, {"hidden_dim": 8, "kernel_size": 3}),
    "words with casing and layer mix": (PLACE, {"layer_mix": True, "casing_dim": 4, "hidden_dim": 8, "temperature": 2.0}),
}


@pytest.mark.parametrize("case", HEADS)
@pytest.mark.parametrize("model_type", ["bert", "modernbert"])
def test_logits_from_cached_features_are_those_of_the_model(model_type, case):
    fields, head = HEADS[case]
    task = TaskRecipe(dataset="-", **fields)
    labels = ["other", "city"] if task.kind == "sequence_classification" else TAGS
    model = tiny_model(model_type)
    model.add_task("new", {"kind": task.kind, "labels": labels, **head})
    if model.heads["new"].layer_weights is not None:
        torch.nn.init.normal_(model.heads["new"].layer_weights)
    tokenizer = tiny_tokenizer("wordpiece" if model_type == "bert" else "bytes")
    rows = city_rows(9) if task.kind == "sequence_classification" else place_rows(9)
    examples = make_examples(task, rows, labels, tokenizer, "test")
    cached = add_task.CachedHead(model, "new", task, None, 0)
    cached.read(examples, "test")
    batch = make_batch("new", task.kind, examples, 0)
    inputs = {key: x for key, x in batch.items() if key not in ("task", "labels")}
    with torch.no_grad():
        expected = model(**inputs, tasks=["new"]).logits["new"]
        found = cached.logits(examples, batch.get("casing_ids"))
    if expected.dim() == 3:
        expected, found = (x[batch["attention_mask"] > 0] for x in (expected, found))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    pooled = task.kind == "sequence_classification" and case != "layer mix, maximum"
    assert {x["features"].shape[1] for x in examples} == ({1} if pooled else {len(x["input_ids"]) for x in examples})


def test_the_loss_on_cached_features_is_that_of_the_model():
    task, model = TaskRecipe(dataset="-", **PLACE), tiny_model()
    model.add_task("new", {"kind": task.kind, "labels": TAGS, "casing_dim": 4})
    examples = make_examples(task, place_rows(7), TAGS, tiny_tokenizer(), "test")
    cached = add_task.CachedHead(model, "new", TaskRecipe(dataset="-", batch_size=3, **PLACE), None, 0)
    cached.read(examples, "test")
    batch = make_batch("new", task.kind, examples, 0)
    batch.pop("task")
    expected = model(**{**batch, "labels": {"new": batch["labels"]}}, tasks=["new"]).loss
    assert cached.mean_loss(examples) == pytest.approx(expected.item(), abs=1e-5)


def test_much_memory_is_announced(capsys, monkeypatch):
    model = tiny_model()
    model.add_task("new", {**TASKS["ner"], "layer_mix": True})
    cached, examples = add_task.CachedHead(model, "new", None, None, 0), [{"input_ids": [1] * 10}]
    assert cached.memory(examples) == 3 * 10 * 32 * 4  # layers, tokens, width, bytes
    cached.read(examples, "test")
    assert examples[0]["features"].nbytes == cached.memory(examples) and not capsys.readouterr().out
    monkeypatch.setattr(add_task, "MUCH_MEMORY", 3000)
    cached.read(examples, "test")
    assert "tasks.new.limit" in capsys.readouterr().out


# The whole way


def test_a_sequence_head_is_learned_and_all_else_stays(source, data, tmp_path, capsys):
    output = tmp_path / "output"
    add_task.add_task(source, recipe(data), output)
    assert "city, test split" in capsys.readouterr().out
    assert check(output) == []
    assert_only_the_head_is_new(source, output, "city")
    pipe = pipeline("multitask", model=str(output), trust_remote_code=True, device="cpu")
    records = pipe(["paris store 7", "love store 7", "paris 8", "love 8"])
    assert [x["labels"]["city"]["label"] for x in records] == ["city", "other", "city", "other"]
    assert MultiTaskModel.from_pretrained(output).config.tasks["city"]["temperature"] != 1.0, "fitted on validation"
    before, after = (SentenceTransformer(str(x), device="cpu").encode(TEXTS) for x in (source, output))
    np.testing.assert_array_equal(before, after)


def test_the_card_gains_its_row_and_what_a_release_holds_is_carried_over(source, data, tmp_path):
    output = tmp_path / "output"
    model = add_task.add_task(source, recipe(data), output)
    assert (output / "annotate.py").read_text() == "print()\n"
    assert not (output / "tests").exists() and not (output / ".git").exists()
    results = json.loads((output / "results/release.json").read_text())
    found = results["tasks"]["city"]
    assert found["split"] == "test" and found["rows"] == 12 and len(found["intervals"]["macro_f1"]) == 2
    assert found["added_by"]["recipe"]["tasks"]["city"]["dataset"] == "city", "not where it lies on this machine"
    assert results["parameters"] == sum(x.numel() for x in model.parameters())
    readme = (output / "README.md").read_text()
    assert "| names | N (1,000) | entity F1 | **0.500** |  |\n" in readme
    assert f"| city | city (12) | macro F1 | **{found['metrics']['macro_f1']:.3f}** |  |\n" in readme
    assert card.render_card(readme, output) == readme
    assert "- u/n\n" in readme and "- city\n" not in readme, "a local data set is none of the Hub's"
    assert "name: source" in readme, "the model keeps its name"


def test_a_token_head_learns_from_casing_and_its_row_says_validation(source, data, tmp_path):
    output = tmp_path / "output"
    add_task.add_task(source, recipe(data, {"casing_dim": 4}, "place", passage_rows=2), output)
    assert check(output) == []
    assert_only_the_head_is_new(source, output, "place")
    pipe = pipeline("multitask", model=str(output), trust_remote_code=True, device="cpu")
    found = [[x["word"] for x in record["entities"]["place"]] for record in pipe(["Paris is so xx", "paris is so xx"])]
    assert found == [["Paris"], []]
    readme = (output / "README.md").read_text()
    assert "| place | place (12, validation split) | entity F1 | **" in readme and "split: validation" in readme


def test_a_checkpoint_stays_a_checkpoint_and_a_layer_mix_is_learned(data, tmp_path, capsys):
    source, output = tmp_path / "source", tmp_path / "output"
    tiny_model().half().save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    add_task.add_task(source, recipe(data, {"layer_mix": True}), output)
    assert not (output / "multitask.safetensors.index.json").exists() and not (output / "README.md").exists()
    assert "none is written" in capsys.readouterr().out
    assert_only_the_head_is_new(source, output, "city")
    model = MultiTaskModel.from_pretrained(output)
    assert model.heads["city"].layer_weights.abs().max() > 0.01 and model.dtype == torch.float16
    pipe = pipeline("multitask", model=str(output), trust_remote_code=True, device="cpu")
    assert [x["labels"]["city"]["label"] for x in pipe(["paris 7", "love 7"])] == ["city", "other"]


def test_half_precision_weights_stay_as_they_are_stored(data, tmp_path):
    checkpoint, source, output = (tmp_path / x for x in ("checkpoint", "source", "output"))
    tiny_model().save_pretrained(checkpoint)
    tiny_tokenizer().save_pretrained(checkpoint)
    add_task.export(checkpoint, source)
    add_task.add_task(source, recipe(data, epochs=1), output)
    assert {x.dtype for x in weights(output).values()} == {torch.float16}
    assert_only_the_head_is_new(source, output, "city")
    assert check(output) == [] and not (output / "README.md").exists()


def test_without_other_splits_the_last_epoch_is_kept_and_nothing_is_measured(source, data, tmp_path, capsys):
    add_task.add_task(source, recipe(data, folder="lone"), tmp_path / "output")
    out = capsys.readouterr().out
    assert "no validation split: the last epoch is kept" in out and "nothing was measured" in out
    assert (tmp_path / "output/README.md").read_text() == (source / "README.md").read_text()


def test_the_same_seed_gives_the_same_head_and_the_best_epoch_is_kept(data):
    def trained(rate: float, epochs: float) -> tuple[add_task.CachedHead, list, list]:
        torch.manual_seed(0)
        model, chosen = tiny_model(), recipe(data, epochs=epochs)
        task = chosen.tasks["city"]
        model.add_task("city", {"kind": task.kind, "labels": ["other", "city"]})
        chosen = Recipe.build({**add_task.as_json(chosen), "optimizer": {"learning_rate": rate}}, "test")
        examples = make_examples(task, city_rows(24), ["other", "city"], tiny_tokenizer(), "test")
        wrong = [{**x, "labels": 1 - x["labels"]} for x in examples]  # so that each step makes validation worse
        cached = add_task.CachedHead(model, "city", task, None, 0)
        cached.read(examples, "test")
        for x, y in zip(wrong, examples, strict=True):
            x["features"] = y["features"]
        return cached, wrong, add_task.train_head(cached, examples, wrong, chosen)

    cached, wrong, history = trained(0.02, 2.5)
    assert len(history) == 3 and history[-1]["loss"] < history[0]["loss"]
    losses = [x["validation_loss"] for x in history]
    assert losses[0] == min(losses) and cached.mean_loss(wrong) == pytest.approx(losses[0])
    assert trained(0.02, 2.5)[2] == history
    with pytest.raises(add_task.TrainingError, match="the loss of 'city' is nan"):
        trained(1e30, 4)


def test_class_weights_and_several_labels_and_numbers_can_be_added(source, data, tmp_path):
    rows = {"text": [f"paris {i}" for i in range(12)], "label": [["a"] if i % 2 else ["a", "b"] for i in range(12)]}
    (tmp_path / "many").mkdir()
    Dataset.from_dict(rows).to_parquet(tmp_path / "many/train.parquet")
    Dataset.from_dict(rows).to_parquet(tmp_path / "many/test.parquet")
    fields = {"folder": "many", "labels": ["a", "b"], "class_weights": "inverse_frequency", "epochs": 1}
    many = recipe(data, {"problem_type": "multi_label_classification"}, **fields)
    add_task.add_task(source, many, tmp_path / "output")
    assert "| city | many (12) | macro F1 | **" in (tmp_path / "output/README.md").read_text()
    number = recipe(data, {"problem_type": "regression"}, label_column="label", epochs=1)
    model = add_task.add_task(source, number, tmp_path / "output2")
    assert model.config.tasks["city"]["labels"] == ["label"]
    assert "| Spearman | **" in (tmp_path / "output2/README.md").read_text()


# What is refused


def test_what_cannot_be_added_is_refused(source, data, tmp_path):
    output = tmp_path / "output"
    with pytest.raises(RecipeError, match=r"tasks.ner: .* has a task of this name; taken are: sentiment, topics"):
        add_task.add_task(source, recipe(data, name="ner"), output)
    two = {"city": CITY, "place": PLACE}
    fields = {"model": {"encoder": "-", "max_length": 8}, "optimizer": {"learning_rate": 1.0}}
    tasks = {name: {**task, "dataset": "-"} for name, task in two.items()}
    with pytest.raises(RecipeError, match="the recipe has the tasks city, place; one is added at a time"):
        add_task.add_task(source, Recipe.build({**fields, "tasks": tasks}, "test"), output)
    pairs = {"kind": "scored_pairs", "dataset": "-", "text_columns": ["a", "b"], "label_column": "score"}
    with pytest.raises(RecipeError, match=r"tasks.pairs.kind is 'scored_pairs', which trains the embedding"):
        add_task.add_task(source, Recipe.build({**fields, "tasks": {"pairs": pairs}}, "test"), output)
    output.mkdir()
    (output / "x").touch()
    with pytest.raises(RecipeError, match="exists and is not empty"):
        add_task.add_task(source, recipe(data), output)
    assert list(output.iterdir()) == [output / "x"]
    with pytest.raises(ValueError, match="MODEL is 'no such/model'; allowed: a folder, or a Hub id"):
        add_task.local_folder("no such/model")


def test_a_release_of_mixed_types_is_refused_before_any_work(source, data, tmp_path):
    path = source / "heads/model.safetensors"
    save_file({key: x.half() for key, x in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"stores weights as torch.float16, torch.float32; allowed: a single type"):
        add_task.add_task(source, recipe(data), tmp_path / "output")
    assert not (tmp_path / "output").exists()


def test_a_bad_label_of_the_test_split_is_found_before_any_work(source, data, tmp_path):
    rows = {"text": ["a"], "label": [-1]}
    Dataset.from_dict(rows).to_parquet(data / "city/test.parquet")
    for split in ("train", "validation"):
        city_rows(8).cast_column("label", Value("int64")).to_parquet(data / f"city/{split}.parquet")
    with pytest.raises(ValueError, match=r"city, split test\), row 0, column label: label -1"):
        add_task.add_task(source, recipe(data, labels=["other", "city"]), tmp_path / "output")
    assert not (tmp_path / "output").exists()


def test_a_metric_that_is_not_measured_is_refused_before_any_work(source, data, tmp_path):
    with pytest.raises(ValueError, match=r"tasks.city.metric is 'f2'; allowed: macro_recall, macro_f1, accuracy"):
        add_task.add_task(source, recipe(data, metric="f2"), tmp_path / "output")
    assert not (tmp_path / "output").exists()


def test_the_command_runs_the_example_recipe(source, data, tmp_path, monkeypatch, capsys):
    shutil.copytree(data / "city", tmp_path / "copies/tweet_irony")
    monkeypatch.setattr("sys.argv", [
        "add_task", str(source), str(ROOT / "training/recipes/add_irony.toml"), "--data", str(tmp_path / "copies"),
        "--output", str(tmp_path / "output"), "--set", "tasks.irony.epochs=1", "--set", "tasks.irony.limit=20",
    ])  # fmt: skip
    add_task.main()
    assert "holds the model with its new task" in capsys.readouterr().out
    readme = (tmp_path / "output/README.md").read_text()
    assert "| irony | cardiffnlp/tweet_eval irony (12) | macro F1 |" in readme and "config: irony" in readme
    monkeypatch.setattr("sys.argv", ["add_task", str(tmp_path), "no.toml", "--output", str(tmp_path / "output")])
    with pytest.raises(SystemExit, match=r"no.toml cannot be read"):
        add_task.main()


def test_texts_are_cut_at_the_least_of_the_limits(source, data, tmp_path, capsys):
    long = {"text": ["x" * 99] * 4, "label": ["a", "b"] * 2}
    (tmp_path / "long").mkdir()
    Dataset.from_dict(long).to_parquet(tmp_path / "long/train.parquet")
    add_task.add_task(source, recipe(data, folder="long", labels=["a", "b"], epochs=1), tmp_path / "output")
    assert f"4 of 4 examples fill all {WINDOW} tokens" in capsys.readouterr().out
    assert json.loads((tmp_path / "output/tokenizer_config.json").read_text())["model_max_length"] == WINDOW


def test_other_encoders_take_a_new_task(data, tmp_path):
    source = write_release(tmp_path, "distilbert", tasks={})
    add_task.add_task(source, recipe(data, epochs=1), tmp_path / "output")
    assert check(tmp_path / "output") == []
    assert_only_the_head_is_new(source, tmp_path / "output", "city")
