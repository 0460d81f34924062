"""Sampling: which data set each batch is of, and which of its examples are in it, planned whole before the run.

The plan follows from the recipe, the data and the seed alone, so a run can be repeated and resumed.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any

from torch.utils.data import Dataset

from common.data import Example, make_batch, text_ids
from common.recipe import SamplingRecipe, TaskRecipe
from tasks_multitask import TOKEN

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
    total = ceil(total / sampling.gradient_accumulation_steps) * sampling.gradient_accumulation_steps
    if sampling.mode == "epochs":
        order = [name for name in names for _ in range(counts[name])]
        order = rng.sample(order, len(order))
        # The last step is filled up with one more batch of as many tasks as it needs.
        return order + (names * total)[: total - len(order)]
    sizes = [once[name] for name in names]
    return [rng.choices(names, probabilities(sizes, sampling, i / total))[0] for i in range(total)]


@dataclass
class Stream:
    """The examples of one data set, which train one head or several.

    Attributes:
        tasks: The tasks that it has labels of, each on this data set alone (see `TaskRecipe.parts`).
        examples: What `make_examples` gives, with `labels` by task.
        rewrite: Returns an example in another form (see `REWRITES`), its labels of one task alone; None: not needed.
    """

    tasks: dict[str, TaskRecipe]
    examples: list[Example]
    rewrite: Callable[[Example, str], Example] | None = None

    @property
    def first(self) -> TaskRecipe:
        """The task whose batch size, epochs and rewrites apply."""
        return next(iter(self.tasks.values()))

    def add(self, name: str, task: TaskRecipe, labels: list[Any]) -> None:
        """Adds one more task with its label of each example."""
        self.tasks[name] = task
        for example, label in zip(self.examples, labels, strict=True):
            example["labels"][name] = label

    def draw(self, row: int, rng: random.Random) -> Example:
        """Returns an example as it is or, as often as `rewrites` says, in another form."""
        example, shares = self.examples[row], self.first.rewrites
        if self.rewrite is None or not shares:
            return example
        form = rng.choices([None, *shares], [1 - sum(shares.values()), *shares.values()])[0]
        if form is None:
            return example
        other = self.rewrite(example, form)
        if "tagged" in example:  # the words have changed, and with them the labels of tokens
            words = {name: other["labels"] for name, task in self.tasks.items() if task.kind == TOKEN}
            other["labels"] = {**example["labels"], **words}
        return other


class BatchPlan(Dataset):
    """All batches of a run in their order; one item is a whole batch of one stream.

    Args:
        streams: The run's data sets, by name.
        sampling: The recipe's sampling.
        pad_token_id: Fills up shorter rows.
        seed: Decides on the order of streams and rows, and on how texts are rewritten.
    """

    def __init__(self, streams: dict[str, Stream], sampling: SamplingRecipe, pad_token_id: int, seed: int) -> None:
        self.streams, self.pad_token_id, self.seed = streams, pad_token_id, seed
        once = {name: ceil(len(x.examples) / x.first.batch_size) for name, x in streams.items()}
        counts = {name: max(1, ceil(once[name] * x.first.epochs)) for name, x in streams.items()}
        batches = {
            # Each stream draws for itself: another one beside it does not change its batches.
            name: passes(
                [sum(map(len, text_ids(example))) for example in x.examples],
                x.first.batch_size,
                random.Random(f"{seed} {name}"),
            )
            for name, x in streams.items()
        }
        order = task_order(counts, once, sampling, random.Random(seed))
        self.batches = [(name, next(batches[name])) for name in order]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name, rows = self.batches[index]
        stream = self.streams[name]
        rng = random.Random(f"{self.seed} {index}")
        examples = [stream.draw(row, rng) for row in rows]
        kinds = {task: x.kind for task, x in stream.tasks.items()}
        return {"stream": name, **make_batch(kinds, examples, self.pad_token_id)}
