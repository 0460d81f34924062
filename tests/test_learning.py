"""Learning a task from examples that people have: each case does what its user wants, or says what to do."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import pipeline

import learning_multitask
from modeling_multitask import MultiTaskModel
from pipeline_multitask import MultiTaskPipeline
from tests.conftest import TEXTS, tiny_model, tiny_tokenizer

TASKS: dict[str, dict[str, Any]] = {
    "sentiment": {"kind": "sequence_classification", "labels": ["negative", "neutral", "positive"]},
    "ner": {"kind": "token_classification", "labels": ["O", "B-PER", "I-PER"], "casing_dim": 4},
}
CITIES = [f"{'paris' if i % 2 else 'love'} {'store ' * (i // 2 % 3)}{i // 2}" for i in range(40)]
LABELS = ["city" if i % 2 else "other" for i in range(40)]


def new_pipe(**fields: Any) -> MultiTaskPipeline:
    model = tiny_model(tasks=TASKS, num_task_layers=fields.pop("num_task_layers", 1), **fields)
    return MultiTaskPipeline(model=model, tokenizer=tiny_tokenizer(), device="cpu")


@pytest.fixture(scope="module")
def shared() -> MultiTaskPipeline:
    """A pipeline that refusals leave as it was."""
    return new_pipe()


def state(pipe: MultiTaskPipeline) -> dict[str, torch.Tensor]:
    return {key: x.clone() for key, x in pipe.model.state_dict().items()}


def assert_kept(pipe: MultiTaskPipeline, before: dict[str, torch.Tensor]) -> None:
    after = pipe.model.state_dict()
    assert all(torch.equal(x, after[key]) for key, x in before.items())


@pytest.mark.parametrize("branch", [0, 1])
def test_a_task_is_learned_and_everything_else_stays_to_the_bit(branch):
    pipe = new_pipe(num_task_layers=branch)
    weights, records = state(pipe), pipe(TEXTS)
    report = pipe.add_task("place", CITIES, LABELS)
    assert_kept(pipe, weights)
    after = pipe(TEXTS)
    for record in after:
        record["labels"].pop("place")
    assert repr(after) == repr(records)
    assert report["score"] > 0.8 and report["held_out"] == 40 and report["labels"] == ["city", "other"]
    answers = [x["labels"]["place"]["label"] for x in pipe(["paris store 7", "love store 7"])]
    assert answers == ["city", "other"]


def test_the_same_seed_gives_the_same_head_and_random_numbers_outside_are_left_alone(monkeypatch):
    torch.manual_seed(7)
    expected, of_gpus = torch.rand(1), []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", of_gpus.append)
    found = []
    for _ in range(2):
        pipe = new_pipe()
        torch.manual_seed(7)
        report = pipe.add_task("who", ["Tim is", "so Cook", "nobody"] * 4, [[(0, 3, "P")], [(3, 7, "P")], []] * 4, epochs=2)
        found.append((state(pipe), torch.rand(1)))
        assert report["kind"] == "entities"
    assert all(torch.equal(x, found[1][0][key]) for key, x in found[0][0].items())
    assert torch.equal(found[0][1], expected) and torch.equal(found[1][1], expected)
    assert of_gpus == [0, 7] * 2, "the seeds of the model and of this test alone"


def test_several_labels_get_thresholds_and_numbers_are_predicted():
    pipe = new_pipe()
    several = [["a", "b"] if i % 2 else [] if i % 4 else ["b"] for i in range(40)]
    report = pipe.add_task("topics", CITIES, several, labels=["b", "a"])
    spec = pipe.model.config.task_specs["topics"]
    assert report["kind"] == "labels" and spec.labels == ["b", "a"] and len(spec.thresholds) == 2
    assert "a" in pipe("paris store 3")["labels"]["topics"]["labels"]
    report = pipe.add_task("stars", CITIES, np.array([4.5 if i % 2 else 1.25 for i in range(40)]))
    assert report["metric"] == "r2" and report["score"] > 0.3
    values = [x["labels"]["stars"]["values"]["stars"] for x in pipe(CITIES[:2])]
    assert values[1] > values[0] + 1


def test_entities_are_learned_by_their_characters():
    pipe = new_pipe()
    texts = [f"{'Paris' if i % 2 else 'paris'} is so {i} {'x' * (1 + i % 4)}" for i in range(32)]
    report = pipe.add_task("place", texts, [[(0, 5, "LOC")] if i % 2 else [] for i in range(32)], casing_dim=8, epochs=30)
    assert pipe.model.config.tasks["place"]["labels"] == ["O", "B-LOC", "I-LOC"] and report["score"] > 0.9
    found = [
        [(x["start"], x["end"]) for x in record["entities"]["place"]]
        for record in pipe(["Paris is so xx", "paris is so xx"])
    ]
    assert found == [[(0, 5)], []]


def test_a_task_is_replaced_only_on_request_and_removed(shared):
    pipe = new_pipe()
    with pytest.raises(ValueError, match=r"tasks has 'sentiment' already; pass refit=True"):
        pipe.add_task("sentiment", CITIES, LABELS)
    pipe.add_task("sentiment", CITIES, LABELS, refit=True)
    assert list(pipe.model.config.tasks) == list(pipe.model.heads) == ["sentiment", "ner"], "the order stays"
    pipe.remove_task("sentiment")
    assert list(pipe("so sad")["entities"]) == ["ner"] and "labels" not in pipe("so sad")


def test_a_saved_pipeline_loads_elsewhere_and_learns_on(tmp_path, monkeypatch):
    pipe = new_pipe()
    pipe.add_task("place", CITIES, LABELS)
    pipe.save_pretrained(str(tmp_path / "saved"))
    monkeypatch.chdir(tmp_path)
    loaded = pipeline("multitask", model=str(tmp_path / "saved"), trust_remote_code=True, device="cpu")
    assert repr(loaded(TEXTS)) == repr(pipe(TEXTS))
    loaded.add_task("again", CITIES, LABELS)
    loaded.save_pretrained(str(tmp_path / "twice"))
    assert "again" in MultiTaskModel.from_pretrained(tmp_path / "twice").config.tasks
    assert Path(tmp_path / "twice/learning_multitask.py").exists()


# What people have


def test_missing_values_are_left_out_and_counted():
    texts = [*CITIES, None, "paris", "  ", float("nan"), "love"]
    report = new_pipe().add_task("place", texts, [*LABELS, "city", None, "city", "city", ""])
    assert report["rows"] == 40 and report["left_out"] == 5 and report["labels"] == ["city", "other"]


def test_duplicates_and_contradictions_are_counted_and_never_held_out_apart():
    report = new_pipe().add_task("place", [*CITIES, CITIES[0], CITIES[1]], [*LABELS, "city", "city"])
    assert report["duplicates"] == 2 and report["contradicting_texts"] == 1
    examples = learning_multitask.read_examples("x", CITIES * 2, LABELS * 2, None)
    for mask in learning_multitask.held_out(examples, 0):
        assert (mask[:40] == mask[40:]).all()


def test_labels_may_come_in_any_order_and_twice_and_spans_as_lists_or_tuples():
    targets = [["b", "a", "b"] if i % 2 else ["c"] for i in range(40)]
    examples = learning_multitask.read_examples("x", CITIES * 2, [*targets, *([set(x) for x in targets])], None)
    assert examples.facts["contradicting_texts"] == 0 and examples.targets[1] == ["a", "b"]
    spans = [[(4, 8, "A"), [0, 3, "B"]], []]
    assert learning_multitask.read_examples("x", ["Tim Cook", "a"], spans, None).targets[0] == [(0, 3, "B"), (4, 8, "A")]


def test_a_label_seen_once_is_learned_and_said():
    report = new_pipe().add_task("place", [*CITIES, "tim cook"], [*LABELS, "person"])
    assert report["labels"] == ["city", "other", "person"] and "1 labels occur once (person)" in report["notes"][0]


def test_a_hundred_labels_and_five_rows():
    texts = [f"{i} {'x' * j}" for i in range(100) for j in range(2)]
    report = new_pipe().add_task("many", texts, [f"label {i:03}" for i in range(100) for j in range(2)])
    assert len(report["labels"]) == 100 and len(report["confusions"]) <= 3
    report = new_pipe().add_task("few", CITIES[:5], LABELS[:5])
    assert report["rows"] == 5 and report["score"] is not None


def test_whole_numbers_are_learned_as_numbers_with_a_note():
    report = new_pipe().add_task("class", CITIES, [i % 3 for i in range(40)])
    assert report["kind"] == "number" and "give them as str" in report["notes"][0]


def test_much_memory_is_announced(shared, monkeypatch, caplog):
    monkeypatch.setattr(learning_multitask, "MUCH_MEMORY", 10)
    warnings: list[str] = []
    monkeypatch.setattr(learning_multitask.logger, "warning", warnings.append)
    learning_multitask.read_pooled(shared.annotator, "sentiment", ["a"] * 4, False, 3)
    assert warnings and "4 texts take" in warnings[0]


REFUSED = [
    (CITIES, LABELS[:3], "There are 40 texts and 3 labels"),
    (CITIES, [f"id{i}" for i in range(40)], "40 of 40 texts have a label that no other text has, such as 'id0'"),
    (CITIES, ["same"] * 40, "All 40 texts have the label 'same'"),
    (CITIES, [1.0] * 40, "the number 1.0 alone"),
    (CITIES, [*LABELS[:39], 5], r"labels\[39\] is 5, and labels\[0\] 'other'"),
    (CITIES, [None] * 40, "None of the 40 rows has both"),
    ([1, *CITIES[1:]], LABELS, r"texts\[0\] is 1 \(int\), not a text"),
    ("paris", ["city"], "give a list of texts"),
    (["Tim Cook"] * 2, [[(0, 99, "PER")], []], "lies outside the text 'Tim Cook'"),
    (["Tim Cook"] * 2, [[(0, 4, "PER"), (2, 8, "PER")], []], "overlap; keep one"),
    (["a b"] * 2, [[], []], "empty lists alone"),
]


@pytest.mark.parametrize(("texts", "labels", "message"), REFUSED)
def test_what_cannot_be_learned_is_refused_and_nothing_changes(shared, texts, labels, message):
    before, tasks = state(shared), dict(shared.model.config.tasks)
    with pytest.raises(ValueError, match=message):
        shared.add_task("new", texts, labels)
    assert_kept(shared, before)
    assert shared.model.config.tasks == tasks and list(shared.model.heads) == list(tasks)


def test_a_mistake_half_way_leaves_the_model_as_it_was(shared, monkeypatch):
    before = state(shared)

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(learning_multitask, "choose", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shared.add_task("sentiment", CITIES, LABELS, refit=True)
    assert_kept(shared, before)
    with pytest.raises(
        ValueError, match=r"head has the fields \['hidden_dim'\]; allowed here: fallback, pooling_mode, reads"
    ):
        shared.add_task("new", CITIES, LABELS, hidden_dim=3)
    with pytest.raises(ValueError, match="epochs is 3; it is an integer of at least 1, for entities"):
        shared.add_task("new", CITIES, LABELS, epochs=3)
    for names in (["a", "b"], "stars"):
        with pytest.raises(ValueError, match="allowed for numbers: a list with the one name of the value"):
            shared.add_task("new", CITIES, range(40), labels=names)
