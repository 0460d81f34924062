"""Freezing: which parameters train, from which step on, and how fast."""

import re
from math import ceil
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from common.recipe import FreezingRecipe, OptimizerRecipe, RecipeError
from modeling_multitask import MultiTaskModel

_LAYER = re.compile(r"\.layers?\.(\d+)\.")


def depth(model: MultiTaskModel, name: str) -> int | None:
    """Returns how high a parameter is: 0 for embeddings, then 1 … L for the encoder's layers and the branch's; else None.

    What stands above the layers (a last norm) counts as the last layer.
    """
    if name.startswith("task_branch."):
        fork, found = model.config.num_hidden_layers - model.config.num_task_layers, _LAYER.search(name)
        return fork + 1 + (int(found[1]) if found else 0)
    if not name.startswith(model.base_model_prefix + "."):
        return None
    found = _LAYER.search(name)
    if found:
        return int(found[1]) + 1
    is_embedding = "embed" in name or model.get_parameter(name) is model.get_input_embeddings().weight
    return 0 if is_embedding else model.config.num_hidden_layers


def is_frozen(model: MultiTaskModel, name: str, recipe: FreezingRecipe) -> bool:
    """Returns whether a parameter never trains."""
    if model.task_branch is not None:
        return not name.startswith(("task_branch.", "heads."))
    height = depth(model, name)
    if height is None:
        return False
    if recipe.freeze == "encoder" or (recipe.num_frozen_layers and height <= recipe.num_frozen_layers):
        return True
    if recipe.freeze == "embeddings":
        return height == 0
    return recipe.freeze == "word_embeddings" and model.get_parameter(name) is model.get_input_embeddings().weight


def first_step(model: MultiTaskModel, name: str, recipe: FreezingRecipe, steps: int) -> int:
    """Returns the step of the run from which on a parameter trains."""
    height = depth(model, name)
    if height is None:
        return 0
    step = ceil(recipe.linear_probe_ratio * steps)
    if recipe.gradual:  # the top layer first, the embeddings when half of the run is over
        layers = model.config.num_hidden_layers
        step += ceil((layers - height) / layers * max(0, steps / 2 - step))
    return step


def learning_rate(model: MultiTaskModel, name: str, recipe: OptimizerRecipe) -> float:
    """Returns a parameter's learning rate: of its group, its head, or its depth in the encoder."""
    for group in recipe.groups:
        if re.search(group.pattern, name):
            return group.learning_rate
    if name.startswith("heads."):
        return recipe.learning_rate if recipe.head_learning_rate is None else recipe.head_learning_rate
    height = depth(model, name)
    layers = model.config.num_hidden_layers
    return recipe.learning_rate * recipe.layer_decay ** (0 if height is None else layers - height)


def new_optimizer(model: MultiTaskModel, recipe: OptimizerRecipe, others: nn.Module | None = None) -> torch.optim.AdamW:
    """Returns AdamW over everything that trains at some time; vectors (biases, norms) do not decay.

    Args:
        model: The model, its frozen parameters marked.
        recipe: Rates and decay.
        others: Further parameters, which learn like a head and do not decay.

    Raises:
        RecipeError: Nothing trains, or a group's pattern matches no parameter.
    """
    named = [(name, x) for name, x in model.named_parameters() if x.requires_grad]
    for group in recipe.groups:
        if not any(re.search(group.pattern, name) for name, _ in named):
            raise RecipeError(f"optimizer.groups: the pattern {group.pattern!r} matches no parameter that trains")
    if not named:
        raise RecipeError("the recipe freezes everything: no parameter would train")
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, x in [*named, *(("heads.", x) for x in (others.parameters() if others else ()))]:
        decay = recipe.weight_decay if x.dim() > 1 else 0.0
        groups.setdefault((learning_rate(model, name, recipe), decay), []).append(x)
    return torch.optim.AdamW([{"params": x, "lr": lr, "weight_decay": decay} for (lr, decay), x in groups.items()])


def freeze(model: MultiTaskModel, recipe: FreezingRecipe) -> Any:
    """Marks what never trains; returns peft's `LoraModel`, or None if the recipe asks for no adapters.

    A frozen encoder has no dropout either: under a task branch, training sees the very vectors that inference sees.

    Raises:
        RecipeError: It freezes by layers, and this encoder has too few of them, or names them in an unknown way.
    """
    layers = model.config.num_hidden_layers
    if recipe.num_frozen_layers or recipe.gradual:
        heights = {depth(model, name) for name, _ in model.named_parameters()}
        if recipe.num_frozen_layers >= layers or not heights.issuperset(range(layers + 1)):
            given = f"freezing.num_frozen_layers is {recipe.num_frozen_layers} and freezing.gradual {recipe.gradual}"
            known = f"{layers} layers, of which {sorted(x for x in heights if x)} were found by name"
            raise RecipeError(f"{given}; this encoder has {known}. Leave out less")
    for name, parameter in model.named_parameters():
        if is_frozen(model, name, recipe):
            parameter.requires_grad_(False)
    if model.task_branch is not None:
        for module in model.encoder.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    if not recipe.lora_rank:
        return None
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    tuned = model.encoder if model.task_branch is None else model.task_branch.layers
    linear = [name for name, module in tuned.named_modules() if isinstance(module, nn.Linear)]
    config = LoraConfig(r=recipe.lora_rank, lora_alpha=2 * recipe.lora_rank, target_modules=linear)
    adapters = LoraModel(tuned, config, "default")  # changes the layers in place
    for name, parameter in tuned.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return adapters


class UnfreezeOnSchedule(TrainerCallback):
    """Lets each parameter train from its first step on; until then it has no gradient and does not change."""

    def __init__(self, model: MultiTaskModel, recipe: FreezingRecipe) -> None:
        self.model, self.recipe = model, recipe

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trained = [(name, x) for name, x in self.model.named_parameters() if x.requires_grad]
        self.starts = [(x, first_step(self.model, name, self.recipe, state.max_steps)) for name, x in trained]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for parameter, start in self.starts:
            parameter.requires_grad_(state.global_step >= start)
