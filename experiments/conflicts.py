"""Where tasks disagree: the cosines between the gradients that their losses give on the shared encoder."""

from collections import defaultdict
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import TrainerCallback

from common.recipe import Recipe
from training.train import new_trainer
from training.trainer import MultiTaskTrainer

POINTS = 6  # measurements after the one before the first step
BATCHES = 4  # of each task, the same ones each time


class GradientProbe(TrainerCallback):
    """Compares the tasks' gradients while a trainer runs, and leaves the run as it is.

    Attributes:
        found: For each time, the `step` and the `cosines` of all pairs of losses. The loss that holds the embedding is one of
            them, "drift". A loss paired with itself is compared between two halves of its batches: so much of a cosine's
            distance from 1 is the noise of batches.
    """

    def __init__(self, trainer: MultiTaskTrainer) -> None:
        self.trainer, self.found = trainer, []
        self.batches: dict[str, list[Any]] = defaultdict(list)
        for batch in trainer.train_dataset:
            if len(self.batches[batch["stream"]]) < BATCHES:
                self.batches[batch["stream"]].append(batch)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.measure(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % max(1, state.max_steps // POINTS) == 0:
            self.measure(state.global_step)

    def measure(self, step: int) -> None:
        """Adds the cosines of the present weights to `found`."""
        model = self.trainer.model
        training = model.training
        model.eval()
        halves = [self.gradients(start) for start in range(2)]
        model.train(training)
        names = sorted(halves[0])
        both = {name: halves[0][name] + halves[1][name] for name in names}
        pairs = {f"{a} {b}": (both[a], both[b]) for a, b in combinations(names, 2)}
        pairs.update({f"{name} {name}": (halves[0][name], halves[1][name]) for name in names})
        cosines = {pair: F.cosine_similarity(*gradients, dim=0).item() for pair, gradients in pairs.items()}
        self.found.append({"step": step, "cosines": cosines})

    def gradients(self, start: int) -> dict[str, Tensor]:
        """Returns the mean gradient of each task's loss, and of "drift", on the encoder, float [P], over every second batch."""
        model, objective = self.trainer.model, self.trainer.objective
        shared = [x for x in model.encoder.parameters() if x.requires_grad]
        sums: dict[str, Tensor] = {}
        for batch in (batch for batches in self.batches.values() for batch in batches[start::2]):
            moved = send_to_device(batch, model.device)
            losses = objective(model, moved)
            del losses["loss"]  # the weighted sum of the others
            for name, loss in losses.items():
                parts = torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True, materialize_grads=True)
                sums[name] = sums.get(name, 0) + torch.cat([x.flatten() for x in parts]) / BATCHES
        return sums


def gradient_conflicts(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Returns under "gradients" what a `GradientProbe` finds during a run of the recipe."""
    trainer, facts = new_trainer(recipe, folder)
    probe = GradientProbe(trainer)
    trainer.add_callback(probe)
    trainer.train()
    return {"gradients": probe.found, "data": facts}
