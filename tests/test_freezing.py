"""Freezing: what trains, from when on, how fast, and that adapters end up in the weights."""

import pytest
import torch

from common.recipe import FreezingRecipe, GroupRecipe, OptimizerRecipe, RecipeError
from tests.conftest import tiny_model
from training.freezing import depth, first_step, freeze, is_frozen, learning_rate, new_optimizer

FAMILIES = ("bert", "roberta", "distilbert", "modernbert", "xlm-roberta")


def heights(model) -> dict[str, int | None]:
    return {name: depth(model, name) for name, _ in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_every_encoder_has_its_height(family):
    found = heights(tiny_model(family))
    assert {x for name, x in found.items() if name.startswith(("heads.", "linear."))} == {None}
    assert {x for name, x in found.items() if not name.startswith(("heads.", "linear."))} == {0, 1, 2}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", ["word_embeddings", "embeddings", "encoder"])
def test_parts_are_frozen_in_every_encoder(family, part):
    model = tiny_model(family)
    freeze(model, FreezingRecipe(freeze=part))
    frozen = {name for name, x in model.named_parameters() if not x.requires_grad}
    tables = {name for name, x in model.named_parameters() if x is model.get_input_embeddings().weight}
    height = heights(model)
    expected = {
        "word_embeddings": tables,
        "embeddings": {name for name, x in height.items() if x == 0},
        "encoder": {name for name, x in height.items() if x is not None},
    }[part]
    assert frozen == expected and tables <= frozen


def test_the_first_layers_are_frozen_with_the_embeddings():
    model = tiny_model()
    height = heights(model)
    recipe = FreezingRecipe(num_frozen_layers=1)
    assert {name for name in height if is_frozen(model, name, recipe)} == {n for n, x in height.items() if x in (0, 1)}


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_wise_rates_fall_monotonically_towards_the_embeddings(family):
    model = tiny_model(family)
    recipe = OptimizerRecipe(learning_rate=1e-3, head_learning_rate=1e-2, layer_decay=0.5)
    rates: dict = {}
    for name, height in heights(model).items():
        rates.setdefault(height, set()).add(learning_rate(model, name, recipe))
    assert rates == {0: {2.5e-4}, 1: {5e-4}, 2: {1e-3}, None: {1e-2, 1e-3}}, "heads, and the projection"


def test_named_groups_come_first_and_must_match_something():
    model = tiny_model()
    groups = [GroupRecipe(pattern="^linear", learning_rate=0.5), GroupRecipe(pattern="ner", learning_rate=0.25)]
    optimizer = new_optimizer(model, OptimizerRecipe(learning_rate=1e-3, groups=groups))
    rate = {id(x): group["lr"] for group in optimizer.param_groups for x in group["params"]}
    assert rate[id(model.linear.weight)] == 0.5 and rate[id(model.heads["ner"].classifier.weight)] == 0.25
    assert rate[id(model.heads["pos"].classifier.weight)] == 1e-3 and len(rate) == len(list(model.parameters()))
    with pytest.raises(RecipeError, match=r"the pattern 'nowhere' matches no parameter"):
        new_optimizer(model, OptimizerRecipe(learning_rate=1, groups=[GroupRecipe(pattern="nowhere", learning_rate=1)]))


def test_biases_and_norms_do_not_decay():
    optimizer = new_optimizer(tiny_model(), OptimizerRecipe(learning_rate=1e-3, weight_decay=0.1))
    assert {(x.dim() > 1, group["weight_decay"]) for group in optimizer.param_groups for x in group["params"]} == {
        (True, 0.1),
        (False, 0.0),
    }


def test_a_recipe_that_freezes_everything_is_refused():
    model = tiny_model(tasks={}, embedding_dim=None)
    freeze(model, FreezingRecipe(freeze="encoder"))
    with pytest.raises(RecipeError, match="the recipe freezes everything"):
        new_optimizer(model, OptimizerRecipe(learning_rate=1e-3))


def test_layers_that_are_not_there_cannot_be_frozen():
    with pytest.raises(RecipeError, match="freezing.num_frozen_layers is 2 .* this encoder has 2 layers"):
        freeze(tiny_model(), FreezingRecipe(num_frozen_layers=2))


def test_schedules_start_at_the_top_and_end_before_the_run_does():
    model = tiny_model()
    height = heights(model)
    gradual = {x: first_step(model, name, FreezingRecipe(gradual=True), 100) for name, x in height.items()}
    assert gradual == {None: 0, 2: 0, 1: 25, 0: 50}
    probe = {x: first_step(model, name, FreezingRecipe(linear_probe_ratio=0.25), 100) for name, x in height.items()}
    assert probe == {None: 0, 2: 25, 1: 25, 0: 25}
    both = {
        x: first_step(model, name, FreezingRecipe(linear_probe_ratio=0.25, gradual=True), 100) for name, x in height.items()
    }
    assert both == {None: 0, 2: 25, 1: 38, 0: 50}


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_train_alone_and_are_merged_into_the_weights(family):
    model = tiny_model(family)
    names, inputs = set(model.state_dict()), torch.tensor([[1, 9, 8, 2]])
    before = model(inputs).last_hidden_state
    adapters = freeze(model, FreezingRecipe(lora_rank=2))
    trained = {
        name for name, x in model.named_parameters() if x.requires_grad and not name.startswith(("heads.", "linear."))
    }
    assert trained and all("lora_" in name for name in trained)
    assert torch.equal(model.eval()(inputs).last_hidden_state, before), "an untrained adapter changes nothing"
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "lora_B" in name:
                x.normal_()
    adapted = model.eval()(inputs).last_hidden_state
    assert (adapted - before).abs().max() > 1e-3
    adapters.merge_and_unload()
    assert set(model.state_dict()) == names
    torch.testing.assert_close(model(inputs).last_hidden_state, adapted, atol=1e-4, rtol=1e-4)
