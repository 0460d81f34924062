"""Merging runs: which can be, that the mean is one, and where on the line from the start a scale ends."""

import json

import pytest
import torch

from modeling_multitask import MultiTaskModel
from tests.test_training import Workshop, same, split
from training.merge import merge
from training.recipe import Recipe, RecipeError
from training.train import changed_settings


@pytest.fixture
def workshop(tmp_path):
    return Workshop(tmp_path)


def test_the_mean_of_two_orders_of_the_same_rows_is_a_run_of_its_own(workshop):
    settings = ("run.calibrate=true",)
    runs = [workshop.train("mood", "ner", settings=(*settings, f"sampling.seed={seed}"))[1] for seed in (1, 2)]
    recipe = Recipe.read(workshop.write("mood", "ner"), overrides=settings)
    metrics = merge(runs, recipe, workshop.folder / "mean")
    mean, *members = (MultiTaskModel.from_pretrained(x / "final").state_dict() for x in (workshop.folder / "mean", *runs))
    differing = 0
    for name, weights in mean.items():
        first, second = (member[name] for member in members)
        torch.testing.assert_close(weights, (first + second) / 2)
        differing += not torch.equal(first, second)
    assert differing, "another order gives other weights"
    assert workshop.pipe(workshop.folder / "mean")("love")["labels"]["mood"]["label"] == "good"
    steps = [json.loads((run / "metrics.json").read_text())["steps"] for run in runs]
    assert not changed_settings(workshop.folder / "mean", recipe)
    assert metrics["steps"] == sum(steps) and 0 < metrics["average"] <= 1
    with pytest.raises(RecipeError, match="mean holds a run already; give another --output"):
        merge(runs, recipe, workshop.folder / "mean")


def test_both_orders_start_from_the_same_weights(workshop):
    frozen = ("freezing.freeze=encoder", "optimizer.learning_rate=0", "optimizer.head_learning_rate=0")
    first, second = (workshop.train("mood", settings=(*frozen, f"sampling.seed={seed}"))[0] for seed in (1, 2))
    for name, weights in first.state_dict().items():
        assert torch.equal(weights, second.state_dict()[name]), name


@pytest.mark.parametrize("scale", [0, 0.5, 1.5])
def test_a_scale_moves_the_encoder_alone_along_the_line_from_its_start(workshop, scale):
    model, run = workshop.train("mood", "ner")
    recipe = Recipe.read(workshop.write("mood", "ner"))
    metrics = merge([run], recipe, workshop.folder / "merged", scale)
    merged = MultiTaskModel.from_pretrained(workshop.folder / "merged/final")
    start, end = workshop.start.state_dict(), model.encoder.state_dict()
    for name, weights in merged.encoder.state_dict().items():
        torch.testing.assert_close(weights, start[name] + scale * (end[name] - start[name]))
    assert any(not torch.equal(end[name], start[name]) for name in start), "training moves the encoder"
    assert same(model.heads, merged.heads) and same(model.linear, merged.linear)
    assert json.loads((workshop.folder / "merged/run.json").read_text())["scale"] == scale
    assert metrics["cosine_raw"] == pytest.approx(1) if scale == 0 else metrics["cosine_raw"] < 1


@pytest.mark.parametrize("scale", [-0.1, float("nan"), float("inf")])
def test_a_scale_that_is_no_place_on_the_line_is_refused(workshop, scale):
    with pytest.raises(RecipeError, match="--scale is .*; it must be at least 0"):
        merge([], Recipe.read(workshop.write("mood")), workshop.folder / "merged", scale)


def test_runs_that_cannot_be_merged_are_refused_with_the_reason(workshop):
    recipe = Recipe.read(workshop.write("mood"))
    (_, one), (_, other) = workshop.train("mood"), workshop.train("mood", settings=("run.seed=4",))
    for runs, reason in (
        ([one, workshop.folder / "x/.." / one.name], "name each of them once"),
        ([one, workshop.folder / "nowhere"], "nowhere holds no finished run; train it with training.train"),
        ([one, other], "run2 holds the run of another recipe; besides sampling.seed these differ: run.seed"),
    ):
        with pytest.raises(RecipeError, match=reason):
            merge(runs, recipe, workshop.folder / "mean")
    assert not (workshop.folder / "mean").exists()


def test_runs_of_other_data_are_refused(workshop):
    _, one = workshop.train("mood")
    split("mood").select(range(7)).to_parquet(workshop.folder / "mood/train.parquet")
    _, other = workshop.train("mood")
    with pytest.raises(RecipeError, match="run2 was trained on other data than .*run1"):
        merge([one, other], Recipe.read(workshop.write("mood")), workshop.folder / "mean")
