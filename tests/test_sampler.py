"""Sampling: every row is seen, tasks come as often as they should, and the plan depends on recipe, data and seed alone."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.recipe import SamplingRecipe, TaskRecipe
from training.sampler import BatchPlan, Stream, passes, probabilities, task_order


def tasks(**epochs: float) -> dict[str, TaskRecipe]:
    fields = {"kind": "sequence_classification", "dataset": "", "text_columns": ["x"], "label_column": "y", "batch_size": 4}
    return {name: TaskRecipe(**fields, epochs=x) for name, x in epochs.items()}


def examples(count: int) -> list[dict]:
    return [{"input_ids": [1] * (i % 7 + 1), "labels": {"mood": i}, "text": "x"} for i in range(count)]


def plan(sizes: dict[str, int], seed: int = 1, epochs: dict | None = None, **sampling) -> BatchPlan:
    recipes = tasks(**(epochs or dict.fromkeys(sizes, 1)))
    streams = {name: Stream({"mood": recipes[name]}, examples(size)) for name, size in sizes.items()}
    return BatchPlan(streams, SamplingRecipe(**sampling), 0, seed)


@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 99))
def test_each_pass_holds_every_row_once(rows, batch_size, seed):
    lengths = [(7 * i) % 11 for i in range(rows)]
    stream = passes(lengths, batch_size, random.Random(seed))
    for _ in range(2):
        seen = []
        while len(seen) < rows:
            seen += next(stream)
        assert sorted(seen) == list(range(rows))


def test_rows_of_like_length_share_a_batch():
    lengths = [i % 10 for i in range(1000)]
    stream = passes(lengths, 10, random.Random(0))
    spreads = [max(x) - min(x) for x in ([lengths[row] for row in next(stream)] for _ in range(100))]
    assert sum(spreads) / len(spreads) < 1


def test_epochs_are_exact_and_batches_hold_one_task():
    found = plan({"a": 23, "b": 8}, epochs={"a": 2, "b": 1.5})
    rows = {name: [row for task, batch in found.batches if task == name for row in batch] for name in "ab"}
    assert sorted(rows["a"]) == sorted([*range(23), *range(23)])
    assert sorted(rows["b"][:8]) == list(range(8)) and len(rows["b"]) == 12
    assert {found[i]["stream"] for i in range(len(found))} == {"a", "b"}
    first = found[0]
    assert first["input_ids"].shape == first["attention_mask"].shape and len(first["labels"]["mood"]) == len(
        first["input_ids"]
    )


def test_the_same_seed_plans_the_same_run_and_another_seed_another():
    sizes = {"a": 40, "b": 20}
    assert plan(sizes, 5).batches == plan(sizes, 5).batches != plan(sizes, 6).batches


def test_a_task_beside_it_changes_nothing_in_a_tasks_own_batches():
    alone, beside = plan({"a": 40}).batches, plan({"a": 40, "b": 20}).batches
    assert alone == [x for x in beside if x[0] == "a"]


@given(
    st.lists(st.integers(1, 500), min_size=2, max_size=4),
    st.sampled_from(["proportional", "temperature", "uniform", "annealed"]),
    st.floats(1, 10),
)
@settings(max_examples=15)
def test_frequencies_are_those_of_theory(sizes, mode, temperature):
    names = [str(i) for i in range(len(sizes))]
    counts, steps = dict(zip(names, sizes, strict=True)), 4000
    sampling = SamplingRecipe(mode=mode, temperature=temperature, batches=steps)
    order = Counter(task_order(counts, counts, sampling, random.Random(0)))
    # The mean over the run: for the annealed mode, of a probability that changes.
    expected = [sum(probabilities(sizes, sampling, i / 50)[k] for i in range(50)) / 50 for k in range(len(sizes))]
    for name, share in zip(names, expected, strict=True):
        deviation = 5 * (share * (1 - share) / steps) ** 0.5 + 0.01  # five standard deviations, and the mean's coarseness
        assert abs(order[name] / steps - share) < deviation


def test_temperature_and_annealing_by_hand():
    assert probabilities([900, 100], SamplingRecipe(mode="proportional"), 0) == [0.9, 0.1]
    assert probabilities([900, 100], SamplingRecipe(mode="temperature", temperature=2), 0) == [0.75, 0.25]
    assert probabilities([900, 100], SamplingRecipe(mode="uniform"), 0) == [0.5, 0.5]
    annealed = [probabilities([900, 100], SamplingRecipe(mode="annealed"), x)[0] for x in (0, 0.5, 1)]
    assert annealed[0] == 0.9 > annealed[1] > annealed[2] > 0.5


@pytest.mark.parametrize("mode", ["epochs", "uniform"])
def test_a_run_is_a_whole_number_of_steps(mode):
    found = plan({"a": 40, "b": 4}, mode=mode, gradient_accumulation_steps=4)
    assert len(found) == 12, "eleven batches, filled up to three steps of four"


def test_a_stream_trains_several_heads_and_rewrites_as_many_texts_as_it_says():
    shares = {"lower": 0.25, "upper": 0.25}
    task = TaskRecipe(kind="sequence_classification", dataset="d", text_columns=["x"], label_column="y", rewrites=shares)
    stream = Stream({}, [{"input_ids": [1], "labels": {}, "text": "Ab"} for _ in range(400)])
    stream.add("mood", task, list(range(400)))
    stream.add("tone", task, [0.5] * 400)
    stream.rewrite = lambda example, form: {**example, "input_ids": [2 if form == "lower" else 3]}
    batches = BatchPlan({"d": stream}, SamplingRecipe(), 0, 1)
    found = [batches[i] for i in range(len(batches))]
    ids = [int(x) for batch in found for x in batch["input_ids"][:, 0]]
    assert len(ids) == 400 and 60 < ids.count(2) < 140 and 60 < ids.count(3) < 140
    assert [x.tolist() for x in found[0]["input_ids"]] == [x.tolist() for x in batches[0]["input_ids"]], "the same again"
    assert sorted(int(x) for batch in found for x in batch["labels"]["mood"]) == list(range(400))
    assert all(set(batch["labels"]) == {"mood", "tone"} and batch["stream"] == "d" for batch in found)
