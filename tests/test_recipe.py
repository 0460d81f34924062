"""Recipes: everything wrong is reported at once, with its place in the file."""

import re
from pathlib import Path

import pytest

from common.recipe import Recipe, RecipeError
from tests.conftest import ROOT

RECIPE = """
[model]
encoder = "e"
embedding_dim = 8
matryoshka_dims = [4]
max_length = 32

[tasks.mood]
kind = "sequence_classification"
dataset = "mood"
folder = "mood"
text_columns = ["text"]
label_column = "label"

[tasks.similarity]
kind = "scored_pairs"
dataset = "pairs"
folder = "pairs"
text_columns = ["a", "b"]
label_column = "score"

[optimizer]
learning_rate = 5e-3

[run]
seed = 3
"""


def read(tmp_path: Path, text: str = RECIPE, **options) -> Recipe:
    (tmp_path / "recipe.toml").write_text(text)
    return Recipe.read(tmp_path / "recipe.toml", **options)


def problems(tmp_path: Path, text: str, **options) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, text, **options)
    return [line.strip() for line in str(caught.value).splitlines()]


def test_every_problem_is_reported_at_once(tmp_path):
    text = RECIPE.replace("max_length = 32", "max_lenght = 32").replace("seed = 3", 'seed = "three"')
    text = text.replace("matryoshka_dims = [4]", 'matryoshka_dims = [4, "x"]').replace("learning_rate = 5e-3", "")
    found = problems(tmp_path, text)
    assert found[0].endswith("recipe.toml:") and len(found) == 6
    for expected in (
        "model.max_lenght is unknown; known keys: encoder, max_length",
        "model.max_length is missing",
        "model.matryoshka_dims[1] is 'x'; it must be a valid integer",
        "optimizer.learning_rate is missing",
        "run.seed is 'three'; it must be a valid integer",
    ):
        assert any(expected in line for line in found), expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["freezing.freeze=all"], "freezing.freeze is 'all'; it must be 'nothing', 'word_embeddings', 'embeddings' or 'encoder'"),
        (["sampling.mode=random"], "sampling.mode is 'random'; it must be 'epochs', 'proportional', 'temperature'"),
        (["tasks.mood.kind=pairs"], "tasks.mood.kind is 'pairs'; it must be 'sequence_classification', 'token_classification'"),
        (["tasks.mood.text_columns=['a', 'b']"], "tasks.mood.text_columns is ['a', 'b']; a sequence_classification task needs 1"),
        (["tasks.mood.batch_size=0"], "tasks.mood.batch_size is 0; it must be greater than or equal to 1"),
        (["optimizer.weight_decay=nan"], "optimizer.weight_decay is nan; it must be a finite number"),
        (["optimizer.layer_decay=1.5"], "optimizer.layer_decay is 1.5; it must be less than or equal to 1"),
        (["tasks.mood.splits={dev='x'}"], "tasks.mood.splits.dev is 'dev'; it must be 'train', 'validation' or 'test'"),
        (["tasks.mood.head.hidden_dims=3"], "tasks.mood.head has unknown fields ['hidden_dims']"),
        (["tasks.mood.head.pooling_mode=sum"], "tasks.mood.head.pooling_mode is 'sum'; allowed"),
        (["tasks.mood.head.labels=['a']"], "tasks.mood.head holds ['labels']"),
        (["tasks.mood.passage_rows=2"], "tasks.mood.passage_rows is 2; only token_classification tasks join"),
        (["tasks.similarity.head.hidden_dim=2"], "tasks.similarity.head is {'hidden_dim': 2}; a scored_pairs task has no head"),
        (["tasks.similarity.focal_gamma=2"], "tasks.similarity.class_weights and focal_gamma are for"),
        (["tasks.similarity.kind=triplets"], "tasks.similarity.kind is 'triplets'; it must be 'sequence_classification'"),
        (["tasks.similarity.label_column=''"], "tasks.similarity.label_column is missing"),
        (["run.report_to=wandb"], "run.report_to is unknown; known keys: seed, evaluations"),
        (["sampling.batches=5"], "sampling.batches is 5; in mode 'epochs' the tasks' epochs set"),
        (["losses.weighting=pcgrad"], "losses.weighting is 'pcgrad'; it needs sampling.gradient_accumulation_steps of at least 2"),
        (["freezing.freeze=encoder", "freezing.lora_rank=4"], "freezing.freeze is 'encoder'; lora_rank, gradual and"),
        (["run.seed=-1"], "run.seed is -1; it must be greater than or equal to 0"),
        (["optimizer.groups=[{pattern='(', learning_rate=1}]"], "optimizer.groups[0].pattern is '(', not a valid regular expression"),
        (["optimizer.groups=[{pattern='x', learning_rate=-1}]"], "optimizer.groups[0].learning_rate is -1; it must be"),
        (["tasks.drift.kind=sequence_classification"], "tasks.drift.dataset is missing; name one, or several"),
        (["model.matryoshka_dims=[9]"], "model.matryoshka_dims holds 9; allowed: 1 to 8 dimensions"),
        (["tasks={}"], "--set tasks={}: it must have the form section.key=value, such as run.seed=7"),
        (["freezing.probe_ratio=0.1"], "freezing.probe_ratio is now called linear_probe_ratio; rename it in the recipe"),
        (["seed"], "--set seed: it must have the form section.key=value"),
        (["run.seed.x=1"], "--set run.seed.x=1: seed is not a section"),
    ],
)  # fmt: skip
def test_values_are_checked(tmp_path, settings, message):
    assert any(message in line for line in problems(tmp_path, RECIPE, overrides=settings))


def test_an_embedding_task_needs_something_that_trains(tmp_path):
    text = RECIPE.replace("embedding_dim = 8\nmatryoshka_dims = [4]\n", "")
    found = problems(tmp_path, text, overrides=["freezing.freeze=encoder"])
    assert any("tasks.similarity trains the embedding alone, and the encoder is frozen" in line for line in found)


def test_a_broken_file_and_a_missing_one_are_named(tmp_path):
    assert "recipe.toml cannot be read" in problems(tmp_path, RECIPE.replace("[model]", "[model"))[0]
    assert "recipe.toml cannot be read" in problems(tmp_path, RECIPE + "\n[tasks.mood]\nkind = 'x'\n")[0], "a task twice"
    with pytest.raises(RecipeError, match="nowhere.toml cannot be read"):
        Recipe.read(tmp_path / "nowhere.toml")


def test_settings_override_the_file_and_make_new_sections(tmp_path):
    settings = ["run.seed=7", "losses.preserve_weight=2", "tasks.mood.head.hidden_dim=5", "freezing.freeze=encoder"]
    recipe = read(tmp_path, overrides=settings)
    assert recipe.run.seed == 7 and recipe.freezing.freeze == "encoder"
    assert recipe.losses.preserve_weight == 2.0 and type(recipe.losses.preserve_weight) is float
    assert recipe.tasks["mood"].head == {"hidden_dim": 5}


def test_data_and_encoder_can_lie_elsewhere(tmp_path):
    recipe = read(tmp_path, data=Path("copies"), encoder="fol'der")
    assert recipe.model.encoder == "fol'der" and recipe.tasks["mood"].dataset == str(Path("copies/mood"))
    found = problems(tmp_path, RECIPE.replace('folder = "mood"\n', ""), data=Path("copies"))
    assert "tasks.mood.folder is missing" in found[1]


def test_a_single_task_run_is_the_same_recipe_with_one_task(tmp_path):
    recipe = read(tmp_path)
    single = read(tmp_path, only=["mood"])
    assert list(single.tasks) == ["mood"] and single.optimizer == recipe.optimizer and single.run == recipe.run
    with pytest.raises(RecipeError, match=r"no task \['x'\]; the recipe's tasks are: mood, similarity"):
        read(tmp_path, only=["x"])
    branch = ["model.num_task_layers=2"]
    assert any("tasks.similarity trains the embedding" in x for x in problems(tmp_path, RECIPE, overrides=branch))
    assert list(read(tmp_path, overrides=branch, only=["mood"]).tasks) == ["mood"]


@pytest.mark.parametrize("path", sorted((ROOT / "training/recipes").glob("*.toml")), ids=lambda path: path.name)
def test_the_recipes_of_this_repository_are_sound(path):
    recipe = Recipe.read(path, data=Path("copies"), encoder="folder")
    assert recipe.model.encoder == "folder"
    assert all(task.dataset == str(Path("copies") / str(task.folder)) for task in recipe.parts.values())
    assert re.match(r"# python -m (training|evaluation)\.", path.read_text()), (
        "a recipe starts with the command that runs it"
    )


# A task of several data sets, and the task branch


def several(**changes):
    """Returns the parsed recipe of a forked model whose only task has two data sets."""
    part = {"text_columns": ["x"], "label_column": "y"}
    datasets = {"a": {"dataset": "da", **part}, "b": {"dataset": "db", **part, "epochs": 2.0}}
    task = {"kind": "sequence_classification", "labels": ["bad", "good"], "datasets": datasets, **changes.pop("task", {})}
    model = {"encoder": "e", "max_length": 16, "num_task_layers": 2, **changes.pop("model", {})}
    return {"model": model, "tasks": {"mood": task}, "optimizer": {"learning_rate": 1e-4}, **changes}


def test_a_task_of_several_data_sets_is_one_task_on_each():
    recipe = Recipe.build(several(), "test")
    parts = recipe.parts
    assert list(parts) == ["mood/a", "mood/b"] and parts["mood/b"].epochs == 2 and parts["mood/a"].labels == ["bad", "good"]
    assert [x.dataset for x in parts.values()] == ["da", "db"] and not any(x.datasets for x in parts.values())


def with_part(**fields):
    recipe = several()
    recipe["tasks"]["mood"]["datasets"]["a"].update(fields)
    return recipe


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (with_part(mapping={"n": "awful"}), "tasks.mood.datasets.a.mapping.n is 'awful'; allowed: bad, good, or an empty"),
        (with_part(unsaid=["awful"]), "tasks.mood.datasets.a.unsaid holds 'awful'; allowed: bad, good"),
        (with_part(unsaid=["bad"], mapping={"n": "bad"}), "datasets.a.unsaid holds 'bad', which mapping says"),
        (with_part(unsaid=["bad"]), "datasets.a.unsaid is \\['bad'\\]; it is for entities"),
        (with_part(dataset="db"), "datasets names 'db' 2 times"),
        (with_part(epochs=-1.0), "tasks.mood.datasets.a.epochs is -1.0; it must be greater than 0"),
        (with_part(passage_rows=2), "datasets.a.passage_rows is 2; only token_classification"),
        (several(task={"labels": None}), "tasks.mood.labels is missing; a task with several data sets names its own"),
        (several(task={"dataset": "dc"}), "tasks.mood.dataset is given beside datasets"),
        (several(task={"epochs": 2.0}), "tasks.mood.epochs is given beside datasets"),
        (
            several(task={"rewrites": {"shout": 0.1}}),
            "tasks.mood.rewrites.shout is 'shout'; it must be 'lower', 'upper', 'title' or 'bare'",
        ),
        (several(task={"rewrites": {"lower": 0.7, "upper": 0.7}}), "rewrites adds up to 1.4"),
        (several(freezing={"freeze": "nothing"}), "freezing.freeze is 'nothing'; model.num_task_layers is 2, which freezes"),
        (several(losses={"preserve_weight": 1.0}), "losses.preserve_weight is 1.0; .*: the embedding cannot move"),
        (several(model={"num_task_layers": -1}), "model.num_task_layers is -1; it must be greater than or equal to 0"),
    ],
)
def test_contradictions_of_data_sets_and_branch_are_named(fields, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.build(fields, "test")


def test_all_problems_are_reported_at_once():
    fields = with_part(mapping={"n": "awful"}, unsaid=["worse"])
    fields["tasks"]["mood"]["rewrites"] = {"lower": 2.0}
    with pytest.raises(RecipeError, match=r"(?s)mapping.n is 'awful'.*unsaid holds 'worse'.*rewrites adds up to 2"):
        Recipe.build(fields, "test")
