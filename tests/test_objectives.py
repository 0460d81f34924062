"""Losses: each equals what its paper says on numbers worked out by hand, and none is ever undefined."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.recipe import TaskRecipe
from modeling_multitask import IGNORE_INDEX, task_loss
from tasks_multitask import TaskSpec
from training.objectives import LossWeights, class_weights, classification_loss, embedding_loss, label_counts, preserve_loss

SINGLE = TaskSpec(kind="sequence_classification", labels=["a", "b"])
MULTI = TaskSpec(kind="sequence_classification", labels=["a", "b"], problem_type="multi_label_classification")
TAGS = TaskSpec(kind="token_classification", labels=["O", "B-X", "I-X"])
LOGITS = torch.tensor([[2.0, 0.0], [0.0, 1.0]])


def recipe(**fields) -> TaskRecipe:
    return TaskRecipe(kind="sequence_classification", dataset="", text_columns=["x"], label_column="y", **fields)


def test_without_options_it_is_the_models_own_loss():
    labels = torch.tensor([0, 0])
    assert torch.equal(classification_loss(SINGLE, LOGITS, labels, recipe(), None), task_loss(SINGLE, LOGITS, labels))


def test_class_weights_and_focal_exponent_by_hand():
    labels = torch.tensor([0, 0])
    right, wrong = math.exp(2) / (1 + math.exp(2)), 1 / (1 + math.exp(1))  # probability of the true label of each row
    found = classification_loss(SINGLE, LOGITS, labels, recipe(), torch.tensor([3.0, 1.0]))
    assert found.item() == pytest.approx(3 * (-math.log(right) - math.log(wrong)) / 2)
    found = classification_loss(SINGLE, LOGITS, labels, recipe(focal_gamma=2.0), None)
    assert found.item() == pytest.approx((-math.log(right) * (1 - right) ** 2 - math.log(wrong) * (1 - wrong) ** 2) / 2)


def test_multi_label_options_by_hand():
    labels, p = torch.tensor([[1.0, 0.0]]), 1 / (1 + math.exp(-2))
    found = classification_loss(MULTI, LOGITS[:1], labels, recipe(focal_gamma=1.0), torch.tensor([2.0, 1.0]))
    assert found.item() == pytest.approx((-2 * math.log(p) * (1 - p) - math.log(0.5) * 0.5) / 2)


@given(st.lists(st.lists(st.sampled_from([IGNORE_INDEX, 0, 1, 2]), min_size=3, max_size=3), min_size=1, max_size=4))
def test_ignored_labels_count_for_nothing_and_never_make_nan(rows):
    labels = torch.tensor(rows)
    logits = torch.randn(*labels.shape, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    logits = logits * torch.tensor([1.0, 40.0, 1.0])  # some are as certain as float32 can be
    for options in (recipe(focal_gamma=2.0), recipe(focal_gamma=0.5)):
        found = classification_loss(TAGS, logits, labels, options, torch.tensor([0.5, 2.0, 2.0]))
        (gradient,) = torch.autograd.grad(found, logits, retain_graph=True)
        assert torch.isfinite(found) and torch.isfinite(gradient).all()
        kept = labels != IGNORE_INDEX
        if kept.any():
            flat = classification_loss(TAGS, logits[kept], labels[kept], options, torch.tensor([0.5, 2.0, 2.0]))
            assert found.item() == pytest.approx(flat.item(), rel=1e-5)
        else:
            assert found.item() == 0.0 and found.requires_grad


@given(
    st.lists(st.integers(0, 1000), min_size=2, max_size=6).filter(any),
    st.sampled_from(["inverse_frequency", "effective_number"]),
)
def test_class_weights_average_to_one_over_the_examples_and_favour_rare_classes(counts, method):
    weights = class_weights(torch.tensor(counts), method)
    assert (weights * torch.tensor(counts)).sum().item() == pytest.approx(sum(counts), rel=1e-4)
    ranked = sorted((count, weight) for count, weight in zip(counts, weights.tolist(), strict=True) if count)
    assert all(a[1] >= b[1] - 1e-5 * a[1] for a, b in pairwise(ranked))


def test_class_weights_by_hand():
    assert class_weights(torch.tensor([30, 10]), "inverse_frequency").tolist() == pytest.approx([2 / 3, 2.0])
    mild = class_weights(torch.tensor([3000, 1000]), "effective_number")
    assert 1 < mild[1] / mild[0] < 3
    assert class_weights(torch.tensor([30, 10, 0]), "inverse_frequency").tolist() == pytest.approx([2 / 3, 2.0, 1.0])
    assert class_weights(torch.tensor([0, 0]), "effective_number").tolist() == [1.0, 1.0]


def test_labels_are_counted_per_kind():
    assert label_counts(SINGLE, [0, 1, 1, IGNORE_INDEX]).tolist() == [1, 2]
    assert label_counts(TAGS, [[0, IGNORE_INDEX, 1], [0]]).tolist() == [2, 1, 0]
    assert label_counts(MULTI, [[1.0, 0.0], [1.0, 1.0], [-100.0, -100.0]]).tolist() == [2, 1]


def test_scored_pairs_are_sentence_transformers_cosent():
    views, scores = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 0.9, 0.4, 0.6])
    cosines = torch.nn.functional.cosine_similarity(views[:4], views[4:])
    terms = [math.exp(20 * (cosines[i] - cosines[j])) for i in range(4) for j in range(4) if scores[i] < scores[j]]
    assert embedding_loss([views], scores).item() == pytest.approx(math.log(1 + sum(terms)), rel=1e-5)


def test_an_unmoved_embedding_costs_nothing_and_a_moved_one_does():
    start = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    unit = torch.nn.functional.normalize(start, dim=-1)
    for mode in ("cosine", "similarity", "both"):
        assert preserve_loss(start * 3, unit, start, mode).item() == pytest.approx(0, abs=1e-6)
    moved = unit.roll(1, dims=1)  # each vector is turned, and all alike: they keep their similarities
    assert preserve_loss(moved, moved, start, "similarity").item() == pytest.approx(0, abs=1e-6)
    assert preserve_loss(moved, moved, start, "cosine") > 0.1
    other = torch.nn.functional.normalize(torch.randn(6, 3, generator=torch.Generator().manual_seed(1)), dim=-1)
    assert preserve_loss(start, other, start, "similarity") > 0.1, "vectors of any width can be compared"


def test_loss_weights_by_hand():
    tasks = {"a": recipe(loss_weight=2.0), "b": recipe()}
    one = torch.tensor(1.0)
    assert LossWeights(tasks, "fixed")("a", one) == 2.0
    learned = LossWeights(tasks, "uncertainty")
    assert learned("a", one) == 2.0
    with torch.no_grad():
        learned.log_variances["a"].fill_(1.0)
    assert learned("a", one).item() == pytest.approx(2 * math.exp(-1) + 0.5)
    learned("b", one).backward()
    assert learned.log_variances["b"].grad.item() == pytest.approx(-0.5), "a loss of 1 is more than its variance explains"


def test_labels_that_a_data_set_never_marks_are_not_punished():
    spec = TaskSpec(kind="token_classification", labels=["O", "B-PER", "I-PER", "B-MISC", "I-MISC"])
    task = TaskRecipe(kind=spec.kind, dataset="d", text_columns=["x"], label_column="y", labels=spec.labels, unsaid=["MISC"])
    logits = torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([[0, 1, IGNORE_INDEX]])
    loss = classification_loss(spec, logits, labels, task, None)
    p = logits.detach().softmax(-1)[0]
    expected = -((p[0, 0] + p[0, 3] + p[0, 4]).log() + p[1, 1].log()) / 2
    torch.testing.assert_close(loss, expected)
    loss.backward()
    # Where an O may hide a MISC, the step leaves their ratio alone: neither is preferred to the other.
    grad = logits.grad[0, 0]
    torch.testing.assert_close(grad[[0, 3, 4]] / p[0, [0, 3, 4]], (grad[0] / p[0, 0]).expand(3))
    assert logits.grad.isfinite().all()
