"""Sampling: which task each batch is of, and which of its examples are in it, planned whole before the run.

The plan follows from the recipe, the data and the seed alone. So a run can be repeated and resumed, and several processes
that read it in turn see every batch once.
"""

import random
from collections.abc import Iterator
from math import ceil
from typing import Any

from torch.utils.data import Dataset

from training.data import Example, make_batch, text_ids
from training.recipe import SamplingRecipe, TaskRecipe

POOL_BATCHES = 50  # as many batches' examples are sorted by length together
ANNEALED_END = 0.2  # the exponent that the annealed probabilities end with


def passes(lengths: list[int], batch_size: int, rng: random.Random) -> Iterator[list[int]]:
    """Yields batches of one task's row indices without end, pass after pass over all rows in a new order.

    Rows of like length share a batch, so that little is padded: each pass is cut into pools of fifty batches, a
    pool is sorted by length, and its batches are shuffled.
    """
    size = POOL_BATCHES * batch_size
    while True:
        order = rng.sample(range(len(lengths)), len(lengths))
        pools = [sorted(order[i : i + size], key=lengths.__getitem__) for i in range(0, len(order), size)]
        batches = [pool[i : i + batch_size] for pool in pools for i in range(0, len(pool), batch_size)]
        yield from rng.sample(batches, len(batches))


def probabilities(batches: list[int], sampling: SamplingRecipe, progress: float) -> list[float]:
    """Returns the probability of each task for the next batch.

    Args:
        batches: How many batches one pass over each task has.
        sampling: The recipe's sampling, of any mode that draws.
        progress: How much of the run is over, in [0, 1].
    """
    exponent = {
        "proportional": 1.0,
        "temperature": 1 / sampling.temperature,
        "uniform": 0.0,
        "annealed": 1 + (ANNEALED_END - 1) * progress,
    }[sampling.mode]
    weights = [count**exponent for count in batches]
    return [weight / sum(weights) for weight in weights]


def task_order(counts: dict[str, int], once: dict[str, int], sampling: SamplingRecipe, rng: random.Random) -> list[str]:
    """Returns the task of each batch of the run, a whole number of steps.

    Args:
        counts: How many batches each task has over its epochs.
        once: How many batches one pass over each task has.
        sampling: The recipe's sampling.
        rng: Draws.
    """
    names = list(counts)
    total = sampling.batches or sum(counts.values())
    total = ceil(total / sampling.tasks_per_step) * sampling.tasks_per_step
    if sampling.mode == "epochs":
        order = [name for name in names for _ in range(counts[name])]
        order = rng.sample(order, len(order))
        # The last step is filled up with one more batch of as many tasks as it needs.
        return order + (names * total)[: total - len(order)]
    if sampling.mode == "round_robin":
        return [names[i % len(names)] for i in range(total)]
    sizes = [once[name] for name in names]
    return [rng.choices(names, probabilities(sizes, sampling, i / total))[0] for i in range(total)]


class BatchPlan(Dataset):
    """All batches of a run in their order; one item is a whole batch of one task.

    Args:
        tasks: The recipe's tasks.
        examples: Each task's examples.
        sampling: The recipe's sampling.
        pad_token_id: Fills up shorter rows.
        seed: Decides on the order of tasks and rows.
    """

    def __init__(
        self,
        tasks: dict[str, TaskRecipe],
        examples: dict[str, list[Example]],
        sampling: SamplingRecipe,
        pad_token_id: int,
        seed: int,
    ) -> None:
        self.tasks, self.examples, self.pad_token_id = tasks, examples, pad_token_id
        once = {name: ceil(len(examples[name]) / task.batch_size) for name, task in tasks.items()}
        counts = {name: max(1, ceil(once[name] * task.epochs)) for name, task in tasks.items()}
        streams = {
            # Each task draws for itself: another task beside it does not change its batches.
            name: passes(
                [sum(map(len, text_ids(x))) for x in examples[name]], task.batch_size, random.Random(f"{seed} {name}")
            )
            for name, task in tasks.items()
        }
        order = task_order(counts, once, sampling, random.Random(seed))
        self.batches = [(name, next(streams[name])) for name in order]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name, rows = self.batches[index]
        return make_batch(name, self.tasks[name].kind, [self.examples[name][row] for row in rows], self.pad_token_id)
