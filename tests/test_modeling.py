"""The model: pooling, heads, losses, and what users of transformers expect any model to do."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers.sentence_transformer.modules import Pooling

import modeling_multitask
from modeling_multitask import (
    IGNORE_INDEX,
    MultiTaskForSequenceClassification,
    MultiTaskForTokenClassification,
    MultiTaskModel,
    pool,
)
from tasks_multitask import CASINGS, POOLING_MODES
from tests.conftest import ENCODERS, TASKS, tiny_config, tiny_model

IDS = torch.tensor([[1, 20, 21, 22, 23, 24, 2], [1, 30, 31, 2, 0, 0, 0]])
MASK = (IDS != 0).long()


def run(model, ids=IDS, mask=MASK, **options):
    with torch.no_grad():
        return model(ids, attention_mask=mask, **options)


def assert_same_outputs(first, second, names=None, tolerance=0.0):
    torch.testing.assert_close(first.sentence_embedding, second.sentence_embedding, atol=tolerance, rtol=0)
    for name in names if names is not None else first.logits:
        torch.testing.assert_close(first.logits[name], second.logits[name], atol=tolerance, rtol=0)


# Pooling


@pytest.mark.parametrize("mask", [[1, 1, 1, 0], [0, 1, 1, 1]], ids=["padded right", "padded left"])
@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("cls", [1, 10]),
        ("lasttoken", [3, -6]),
        ("mean", [2, 2]),
        ("max", [3, 10]),
        ("mean_sqrt_len_tokens", [6 / math.sqrt(3), 6 / math.sqrt(3)]),
        ("weightedmean", [(1 + 2 * 2 + 3 * 3) / 6, (10 + 2 * 2 - 3 * 6) / 6]),
    ],
)
def test_pooling_by_hand(mode, expected, mask):
    tokens, padding = [[1.0, 10.0], [2.0, 2.0], [3.0, -6.0]], [[99.0, 99.0]]
    hidden = torch.tensor([tokens + padding if mask[-1] == 0 else padding + tokens])
    before = hidden.clone()
    torch.testing.assert_close(pool(hidden, torch.tensor([mask]), mode), torch.tensor([expected], dtype=torch.float))
    assert torch.equal(hidden, before), "pooling must not write into its input"


@given(
    seed=st.integers(0, 2**16),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    mode=st.sampled_from(POOLING_MODES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    left=st.booleans(),
)
def test_pooling_is_that_of_sentence_transformers(seed, lengths, mode, dtype, left):
    hidden = torch.randn(len(lengths), max(lengths), 6, generator=torch.Generator().manual_seed(seed)).to(dtype)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    mask = mask.flip(1) if left else mask
    reference = Pooling(6, pooling_mode=mode)({"token_embeddings": hidden, "attention_mask": mask})["sentence_embedding"]
    ours = pool(hidden, mask, mode)
    assert ours.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(ours, reference, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_a_row_without_tokens_pools_to_zero(mode):
    mask = torch.tensor([[0, 0, 0], [1, 1, 1]])
    pooled = pool(torch.randn(2, 3, 4), mask, mode)
    assert torch.equal(pooled[0], torch.zeros(4)) and pooled[1].abs().sum() > 0


# Encoders and outputs


@pytest.mark.parametrize("model_type", ENCODERS)
def test_every_encoder_gives_all_outputs_in_one_pass(model_type):
    model = tiny_model(model_type)
    calls = []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    out = run(model)
    assert len(calls) == 1
    assert out.last_hidden_state.shape == (2, 7, 32)
    assert out.sentence_embedding.shape == (2, 8)
    torch.testing.assert_close(out.sentence_embedding.norm(dim=-1), torch.ones(2))
    assert {name: tuple(x.shape) for name, x in out.logits.items()} == {
        "sentiment": (2, 3), "topics": (2, 2), "rating": (2, 1), "ner": (2, 7, 5), "pos": (2, 7, 3),
    }  # fmt: skip
    assert out.loss is None and out.hidden_states is None and out.attentions is None


@pytest.mark.parametrize("model_type", ENCODERS)
@pytest.mark.parametrize("mode", POOLING_MODES)
def test_padding_and_company_in_the_batch_change_nothing(model_type, mode):
    model = tiny_model(model_type, pooling_mode=mode)
    together = run(model)
    reordered = run(model, IDS.flip(0), MASK.flip(0))
    wider = run(
        model, torch.cat([IDS, torch.zeros(2, 5, dtype=torch.long)], 1), torch.cat([MASK, torch.zeros(2, 5)], 1).long()
    )
    for row, length in ((0, 7), (1, 4)):
        alone = run(model, IDS[row : row + 1, :length], MASK[row : row + 1, :length])
        for out, i in ((together, row), (reordered, 1 - row), (wider, row)):
            torch.testing.assert_close(alone.sentence_embedding[0], out.sentence_embedding[i], atol=2e-6, rtol=1e-5)
            for name in TASKS:
                a, b = alone.logits[name][0], out.logits[name][i]
                torch.testing.assert_close(a, b[:length] if b.dim() == 2 else b, atol=2e-5, rtol=1e-4)


def test_without_projection_the_embedding_is_the_pooled_vector():
    model = tiny_model(embedding_dim=None)
    out = run(model)
    pooled = pool(out.last_hidden_state, MASK, "mean")
    torch.testing.assert_close(out.sentence_embedding, pooled / pooled.norm(dim=-1, keepdim=True))


def test_no_mask_means_that_every_position_is_a_token():
    model = tiny_model()
    assert_same_outputs(run(model, IDS[:1], None), run(model, IDS[:1], torch.ones(1, 7).long()))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float])
def test_a_mask_may_be_of_any_dtype(dtype):
    model = tiny_model(num_task_layers=1)
    assert_same_outputs(run(model), run(model, IDS, MASK.to(dtype)))


def test_only_the_requested_heads_are_computed():
    model = tiny_model()
    everything, some, none = run(model), run(model, tasks=["ner", "topics"]), run(model, tasks=[])
    assert list(some.logits) == ["ner", "topics"] and none.logits == {}
    assert_same_outputs(everything, some, ["ner", "topics"])
    assert_same_outputs(everything, none, [])
    assert list(run(model, tasks="ner").logits) == ["ner"]
    assert_same_outputs(everything, run(model, None, inputs_embeds=model.get_input_embeddings()(IDS)))


def test_a_hidden_layer_makes_the_head_an_mlp():
    model = tiny_model()
    head, pooled = model.heads["topics"], torch.randn(3, 32)
    expected = head.classifier(torch.nn.functional.gelu(head.dense(pooled)))
    torch.testing.assert_close(head.classify(pooled), expected)


def test_a_head_can_pool_in_its_own_way():
    fields = {"kind": "sequence_classification", "labels": ["a", "b"]}
    model = tiny_model(tasks={"own": {**fields, "pooling_mode": "cls"}, "shared": fields})
    model.heads["shared"].load_state_dict(model.heads["own"].state_dict())
    out = run(model)
    torch.testing.assert_close(out.logits["own"], model.heads["own"].classify(pool(out.last_hidden_state, MASK, "cls")))
    torch.testing.assert_close(out.logits["shared"], model.heads["own"].classify(pool(out.last_hidden_state, MASK, "mean")))


def test_casing_reaches_its_head_and_nothing_else():
    ner = {"kind": "token_classification", "labels": ["O", "B-X"], "hidden_dim": 16}
    model = tiny_model(tasks={"cased": {**ner, "casing_dim": 4}, "uncased": ner})
    casing_ids = torch.arange(IDS.numel()).view_as(IDS) % len(CASINGS)
    unknown, known = run(model), run(model, casing_ids=casing_ids)
    assert_same_outputs(unknown, run(model, casing_ids=torch.zeros_like(IDS)))
    assert torch.equal(unknown.sentence_embedding, known.sentence_embedding)
    assert torch.equal(unknown.logits["uncased"], known.logits["uncased"])
    assert not torch.allclose(unknown.logits["cased"], known.logits["cased"])
    with pytest.raises(ValueError, match=r"casing_ids have shape \[1, 1\]; the input has"):
        run(model, casing_ids=casing_ids[:1, :1])


@pytest.mark.parametrize("layers", [0, 1])
def test_the_casing_of_padding_changes_nothing(layers):
    fields = {"kind": "token_classification", "labels": ["O", "B-X"], "casing_dim": 4}
    model = tiny_model(tasks={"ner": fields}, num_task_layers=layers)
    ids, casing_ids = torch.tensor([[1, 9, 8, 2]]), torch.tensor([[0, 2, 1, 0]])
    alone = model(ids, casing_ids=casing_ids).logits["ner"]
    padded = model(
        torch.tensor([[1, 9, 8, 2, 0, 0]]),
        attention_mask=torch.tensor([[1, 1, 1, 1, 0, 0]]),
        casing_ids=torch.tensor([[0, 2, 1, 0, 5, 5]]),
    ).logits["ner"]
    torch.testing.assert_close(padded[:, :4], alone)


def test_inputs_and_configuration_are_left_alone():
    model = tiny_model()
    ids, mask, config = IDS.clone(), MASK.clone(), copy.deepcopy(model.config.to_dict())
    labels = {"ner": torch.zeros_like(IDS)}
    model(ids, attention_mask=mask, labels=labels, output_hidden_states=True).loss.backward()
    assert torch.equal(ids, IDS) and torch.equal(mask, MASK) and model.config.to_dict() == config
    assert list(labels) == ["ner"]


def test_a_tuple_comes_back_on_request():
    out = run(tiny_model(), return_dict=False)
    assert isinstance(out, tuple) and out[0].shape == (2, 7, 32)


def test_fields_set_while_loading_are_checked(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert MultiTaskModel.from_pretrained(tmp_path, pooling_mode="cls").config.pooling_mode == "cls"
    with pytest.raises(ValueError, match="pooling_mode is 'sum'; allowed: cls"):
        MultiTaskModel.from_pretrained(tmp_path, pooling_mode="sum")
    with pytest.raises(ValueError, match="tasks is 3"):
        MultiTaskModel.from_pretrained(tmp_path, tasks=3)


# The fork: a task branch on the trunk of an encoder that stays as it is


def forked(model_type="bert", layers=2, **fields):
    """Returns a model of four layers whose branch starts as a copy of the encoder's last ones."""
    fields = {"num_hidden_layers": 4, "num_task_layers": layers, **fields}
    model = tiny_model(model_type, **fields)
    model.reset_branch()
    return model


def moved(model):
    """Returns a model whose branch is no longer a copy of anything."""
    with torch.no_grad():
        for x in model.task_branch.parameters():
            x.add_(torch.randn_like(x), alpha=0.3)
    return model


@pytest.mark.parametrize("model_type", ENCODERS)
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_a_fresh_branch_gives_what_the_encoder_gives_to_the_bit(model_type, layers):
    model, plain = forked(model_type, layers), tiny_model(model_type, num_hidden_layers=4)
    plain.load_state_dict({name: x for name, x in model.state_dict().items() if not name.startswith("task_branch")})
    assert_same_outputs(run(plain), run(model))


@pytest.mark.parametrize("model_type", ENCODERS)
def test_the_embedding_is_the_encoders_whatever_the_branch_does(model_type):
    model = forked(model_type)
    before = run(model)
    moved(model)
    after, alone = run(model), run(model, tasks=[])
    hidden = model.encoder(IDS, attention_mask=MASK).last_hidden_state
    for out in (before, after, alone):
        assert torch.equal(out.last_hidden_state, hidden)
        assert torch.equal(out.encoder_embedding, before.encoder_embedding)
        assert torch.equal(out.sentence_embedding, before.sentence_embedding)
    assert all(not torch.equal(after.logits[name], before.logits[name]) for name in TASKS)
    pooled = pool(hidden, MASK, "mean")
    torch.testing.assert_close(before.encoder_embedding, pooled / pooled.norm(dim=-1, keepdim=True))


@pytest.mark.parametrize("model_type", ENCODERS)
def test_labels_alone_are_the_same_labels_and_padding_changes_nothing(model_type):
    model = moved(forked(model_type))
    casing_ids = torch.arange(IDS.numel()).view_as(IDS) % len(CASINGS) * MASK
    both = run(model, casing_ids=casing_ids)
    labels = run(model, casing_ids=casing_ids, output_embedding=False)
    assert labels.sentence_embedding is None and labels.encoder_embedding is None and labels.last_hidden_state is None
    for name in TASKS:
        assert torch.equal(both.logits[name], labels.logits[name])
        alone = run(model, IDS[1:, :4], MASK[1:, :4], casing_ids=casing_ids[1:, :4], output_embedding=False).logits[name][0]
        a = both.logits[name][1]
        torch.testing.assert_close(a[:4] if a.dim() == 2 else a, alone, atol=2e-5, rtol=1e-4)


LAYERS = {
    "bert": "encoder.layer",
    "roberta": "encoder.layer",
    "xlm-roberta": "encoder.layer",
    "distilbert": "transformer.layer",
}


@pytest.mark.parametrize("model_type", ENCODERS)
@pytest.mark.parametrize(
    ("options", "upper", "branch"),
    [({}, 1, 1), ({"tasks": []}, 1, 0), ({"output_embedding": False}, 0, 1), ({"output_hidden_states": True}, 1, 1)],
    ids=["everything", "embedding alone", "labels alone", "with hidden states"],
)
def test_only_the_layers_that_are_needed_run(model_type, options, upper, branch):
    model = forked(model_type)
    counts = dict.fromkeys(["trunk", "upper", "branch"], 0)

    def count(part):
        return lambda *_: counts.update({part: counts[part] + 1})

    layers = model.encoder.get_submodule(LAYERS.get(model_type, "layers"))
    for part, modules in {"trunk": layers[:2], "upper": layers[2:], "branch": model.task_branch.layers}.items():
        for module in modules:
            module.register_forward_hook(count(part))
    run(model, **options)
    assert counts == {"trunk": 2, "upper": 2 * upper, "branch": 2 * branch}


@pytest.mark.parametrize("layers", [0, 2])
def test_a_head_can_read_the_encoders_vector_beside_the_branchs_or_in_its_place(layers):
    topic = {"kind": "sequence_classification", "labels": ["a", "b"]}
    model = forked(layers=2, tasks={"encoder": {**topic, "reads": "encoder"}, "both": {**topic, "reads": "both"}})
    if not layers:
        model = tiny_model(tasks=model.config.tasks)
    else:
        moved(model)
    out, alone = run(model), run(model, output_embedding=False)
    weight, bias = model.heads["encoder"].classifier.weight, model.heads["encoder"].classifier.bias
    torch.testing.assert_close(out.logits["encoder"], out.encoder_embedding @ weight.T + bias)
    own, other = model.heads["both"].classifier.weight.chunk(2, dim=1)
    model.heads["both"].classifier.weight.data = torch.cat([torch.zeros_like(own), other], dim=1)
    encoder_half = run(model).logits["both"] - model.heads["both"].classifier.bias
    torch.testing.assert_close(encoder_half, out.encoder_embedding @ other.T)
    assert all(torch.equal(alone.logits[name], out.logits[name]) for name in out.logits)
    if layers:
        called = []
        model.task_branch.register_forward_hook(lambda *_: called.append(1))
        run(model, tasks=["encoder"])
        assert not called, "the branch does not run for a head that does not read it"
        run(model, tasks=["both"])
        assert called


@pytest.mark.parametrize("model_type", ENCODERS)
def test_hidden_states_and_attentions_are_the_encoders(model_type):
    model = moved(forked(model_type, attn_implementation="eager"))
    for options in ({}, {"output_embedding": False}, {"tasks": []}):
        out = run(model, output_hidden_states=True, output_attentions=True, **options)
        assert len(out.hidden_states) == 5 and len(out.attentions) == 4
        assert torch.equal(out.hidden_states[-1], model.encoder(IDS, attention_mask=MASK).last_hidden_state)


def test_casing_enters_at_the_branch_and_starts_at_nothing():
    model = forked()
    casing_ids = torch.arange(IDS.numel()).view_as(IDS) % len(CASINGS)
    assert_same_outputs(run(model), run(model, casing_ids=casing_ids))
    with torch.no_grad():
        model.task_branch.casing.weight.normal_()
    unknown, known = run(model), run(model, casing_ids=casing_ids)
    assert torch.equal(unknown.sentence_embedding, known.sentence_embedding)
    assert all(not torch.allclose(unknown.logits[name], known.logits[name]) for name in TASKS)


def test_a_branch_is_saved_loaded_and_copied_whole(tmp_path):
    model = moved(forked())
    model.save_pretrained(tmp_path)
    for again in (MultiTaskModel.from_pretrained(tmp_path), copy.deepcopy(model)):
        assert_same_outputs(run(model), run(again), tolerance=1e-5)  # last bits depend on where weights lie in memory
        with torch.no_grad():  # its parts belong together: the views of the encoder run its own layers
            again.task_branch.layers[0].attention.output.dense.weight.mul_(2)
            again.encoder.encoder.layer[0].attention.output.dense.weight.mul_(2)
        changed, labels = run(again), run(again, output_embedding=False)
        assert not torch.allclose(changed.sentence_embedding, run(model).sentence_embedding)
        assert_same_outputs(changed, run(again, output_hidden_states=True), tolerance=1e-5)
        torch.testing.assert_close(changed.logits["ner"], labels.logits["ner"], atol=1e-5, rtol=1e-5)


def test_adding_and_removing_tasks_leaves_encoder_branch_and_other_heads_alone():
    model = moved(forked())
    before, weights = run(model), {name: x.clone() for name, x in model.state_dict().items()}
    model.add_task("irony", {"kind": "sequence_classification", "labels": ["no", "yes"]})
    assert_same_outputs(before, run(model))
    model.remove_task("irony")
    assert_same_outputs(before, run(model))
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("model_type", ENCODERS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_gradient_reaches_a_frozen_encoder(model_type, checkpointing):
    model = forked(model_type)
    model.encoder.requires_grad_(False)
    if checkpointing:
        model.activation_checkpointing_enable()
    model.train()
    model(IDS, attention_mask=MASK, labels={"ner": IDS.clamp(max=4)}, output_embedding=False).loss.backward()
    assert all(x.grad is None for x in model.encoder.parameters())
    assert all(
        x.grad is not None and x.grad.abs().sum() > 0 for x in model.task_branch.layers[0].parameters() if x.dim() > 1
    )


@pytest.mark.parametrize("model_type", ["bert", "modernbert"])
@pytest.mark.parametrize("options", [{}, {"output_embedding": False}, {"tasks": []}])
def test_torch_compile_agrees_on_the_fork(model_type, options):
    model = moved(forked(model_type))
    expected, out = run(model, **options), run(torch.compile(model, backend="aot_eager"), **options)
    for name in expected.logits:
        torch.testing.assert_close(out.logits[name], expected.logits[name], atol=1e-5, rtol=1e-5)
    assert (out.sentence_embedding is None) == (expected.sentence_embedding is None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_fork_in_half_precision(dtype):
    model = forked()
    full, half = run(model), run(model.to(dtype))
    assert half.sentence_embedding.dtype == half.encoder_embedding.dtype == half.logits["ner"].dtype == dtype
    assert torch.nn.functional.cosine_similarity(full.sentence_embedding, half.sentence_embedding.float()).min() > 0.99


def test_a_view_of_the_fork_runs_no_upper_layers():
    model = moved(forked())
    view = MultiTaskForSequenceClassification(model.config, task="topics").eval()
    view.load_state_dict(model.state_dict())
    calls = []
    view.encoder.encoder.layer[3].register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(run(view).logits, run(model).logits["topics"]) and not calls


def test_an_encoder_without_a_list_of_layers_is_refused():
    config = tiny_config(num_task_layers=1)
    config.num_hidden_layers = 2
    encoder = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="num_task_layers needs an encoder with a list of its 2 layers"):
        modeling_multitask._find_layers(encoder, 2)


# Tasks and labels


def test_added_and_removed_tasks_leave_all_other_outputs_bit_identical():
    model = tiny_model()
    before = run(model)
    model.add_task("irony", {"kind": "sequence_classification", "labels": ["no", "yes"], "hidden_dim": 4})
    with_irony = run(model)
    assert_same_outputs(before, with_irony)
    assert with_irony.logits["irony"].shape == (2, 2) and with_irony.logits["irony"].abs().sum() > 0
    assert model.config.tasks["irony"]["labels"] == ["no", "yes"]
    model.remove_task("irony")
    model.remove_task("ner")
    assert list(run(model).logits) == ["sentiment", "topics", "rating", "pos"] == list(model.config.tasks)
    assert_same_outputs(before, run(model), ["sentiment", "topics", "rating", "pos"])


def test_an_added_task_is_saved_and_loaded(tmp_path):
    model = tiny_model()
    model.add_task("irony", {"kind": "sequence_classification", "labels": ["no", "yes"]})
    model.save_pretrained(tmp_path)
    assert_same_outputs(run(model), run(MultiTaskModel.from_pretrained(tmp_path)), tolerance=1e-5)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda m: m(IDS, tasks=["irony"]), r"tasks holds \['irony'\]; this model's tasks are: sentiment, topics"),
        (
            lambda m: m(IDS, tasks=["ner"], labels={"pos": IDS}),
            r"labels are given for \['pos'\]; the tasks computed here are: ner",
        ),
        (
            lambda m: m(IDS, labels={"ner": IDS[:, :3]}),
            r"labels have shape \[2, 3\]; a token_classification head of 5 labels takes",
        ),
        (lambda m: m(IDS, labels={"topics": IDS[:, 0]}), r"labels have shape \[2\]; .* takes \[2, 2\]"),
        (lambda m: m(torch.ones(1, 40).long()), "The input has 40 tokens; this encoder takes 32. Tokenize with truncation"),
        (lambda m: m(IDS, labels=IDS), "labels is a Tensor; it must be a dict"),
        (lambda m: m(attention_mask=MASK), "Neither input_ids nor inputs_embeds is given"),
        (lambda m: m.add_task("ner", TASKS["ner"]), "tasks has 'ner' already"),
        (lambda m: m.add_task("a.b", TASKS["ner"]), "task name 'a.b'"),
        (lambda m: m.add_task("a", {"kind": "x", "labels": ["a"]}), "tasks.a.kind is 'x'"),
        (lambda m: m.remove_task("irony"), r"tasks holds \['irony'\]; this model's tasks are: sentiment"),
    ],
)
def test_errors_say_what_is_wrong_and_what_is_known(action, message):
    with pytest.raises(ValueError, match=message):
        action(tiny_model())


# Losses


def test_losses_are_the_textbook_ones():
    model = tiny_model()
    out = run(model)
    stars, topics = torch.tensor([3.0, -100.0]), torch.tensor([[1, 0], [0, IGNORE_INDEX]])
    tags = torch.full_like(IDS, IGNORE_INDEX)
    tags[0, 1:3] = torch.tensor([1, 2])
    labels = {"sentiment": torch.tensor([2, IGNORE_INDEX]), "rating": stars, "topics": topics, "ner": tags}
    losses = run(model, labels=labels).task_losses
    torch.testing.assert_close(losses["sentiment"], -out.logits["sentiment"][0].log_softmax(-1)[2])
    torch.testing.assert_close(losses["rating"], ((out.logits["rating"][:, 0] - stars) ** 2).mean())
    odds = out.logits["topics"]
    expected = -(odds[0, 0].sigmoid().log() + (-odds[0, 1]).sigmoid().log() + (-odds[1, 0]).sigmoid().log()) / 3
    torch.testing.assert_close(losses["topics"], expected)
    chosen = out.logits["ner"][0].log_softmax(-1)
    torch.testing.assert_close(losses["ner"], -(chosen[1, 1] + chosen[2, 2]) / 2)


def test_the_loss_is_the_sum_over_any_subset_of_tasks():
    model = tiny_model()
    labels = {"sentiment": torch.tensor([0, 1]), "rating": torch.tensor([[1.0], [2.0]])}
    out = run(model, labels=labels)
    assert list(out.task_losses) == ["sentiment", "rating"]
    torch.testing.assert_close(out.loss, out.task_losses["sentiment"] + out.task_losses["rating"])


def test_unlabelled_tasks_and_all_ignored_batches_train_nothing_and_are_never_nan():
    model = tiny_model()
    labels = {
        "sentiment": torch.tensor([0, 1]),
        "rating": torch.full((2,), float("nan")),
        "topics": torch.full((2, 2), IGNORE_INDEX),
        "ner": torch.full_like(IDS, IGNORE_INDEX),
    }
    out = model(IDS, attention_mask=MASK, labels=labels)
    assert {name: out.task_losses[name].item() for name in ("rating", "topics", "ner")} == {
        "rating": 0,
        "topics": 0,
        "ner": 0,
    }
    out.loss.backward()
    for name in ("rating", "topics", "ner"):
        assert all(x.grad is not None and torch.equal(x.grad, torch.zeros_like(x)) for x in model.heads[name].parameters())
    assert all(x.grad is None for x in model.heads["pos"].parameters())
    assert model.heads["sentiment"].classifier.weight.grad.abs().sum() > 0
    assert all(x.grad is None or x.grad.isfinite().all() for x in model.parameters())


# What any transformers model does


@pytest.mark.parametrize("model_type", ENCODERS)
def test_attention_implementation_reaches_the_encoder(model_type):
    model = tiny_model(model_type, attn_implementation="eager")
    assert model.encoder.config._attn_implementation == "eager"
    out = run(model, output_attentions=True, output_hidden_states=True)
    assert len(out.attentions) == 2 and out.attentions[0].shape == (2, 2, 7, 7)
    assert len(out.hidden_states) == 3
    fast = tiny_model(model_type, attn_implementation="sdpa")
    assert fast.encoder.config._attn_implementation == "sdpa"
    assert_same_outputs(out, run(fast), tolerance=1e-4)
    fast.set_attn_implementation("eager")
    assert fast.encoder.config._attn_implementation == "eager"


@pytest.mark.parametrize("model_type", ENCODERS)
def test_activation_checkpointing_gives_the_same_gradients(model_type):
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(model_type, hidden_dropout_prob=0.0)
        if checkpointing:
            model.activation_checkpointing_enable()
            assert model.is_activation_checkpointing
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.train()
        model(IDS, attention_mask=MASK, labels={"ner": IDS.clamp(max=4)}).loss.backward()
        gradients.append(model.get_input_embeddings().weight.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs_in_its_dtype_and_stays_near(dtype):
    model = tiny_model()
    full = run(model)
    half = run(model.to(dtype))
    assert half.sentence_embedding.dtype == dtype and half.logits["ner"].dtype == dtype
    similarity = torch.nn.functional.cosine_similarity(full.sentence_embedding, half.sentence_embedding.float())
    assert similarity.min() > 0.99
    loss = model(IDS, attention_mask=MASK, labels={"ner": IDS.clamp(max=4)}).loss
    assert loss.isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_text_without_tokens_has_the_zero_embedding(dtype):
    out = run(tiny_model().to(dtype), IDS, torch.stack([MASK[0], torch.zeros_like(MASK[0])]))
    assert torch.equal(out.sentence_embedding[1], torch.zeros(8, dtype=dtype)) and out.sentence_embedding[0].abs().sum() > 0


def test_a_checkpoint_loads_in_the_dtype_asked_for(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = MultiTaskModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {x.dtype for x in loaded.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("model_type", ["bert", "modernbert"])
def test_torch_compile_agrees(model_type):
    model = tiny_model(model_type)
    compiled = torch.compile(model, backend="aot_eager")
    assert_same_outputs(run(model), run(compiled), tolerance=1e-5)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "xlm-roberta"])
def test_peft_lora_finds_its_modules_by_itself(model_type):
    from peft import LoraConfig, TaskType, get_peft_model

    model = tiny_model(model_type)
    before = run(model)
    adapted = get_peft_model(model, LoraConfig(task_type=TaskType.FEATURE_EXTRACTION, r=2))
    assert_same_outputs(before, run(adapted), tolerance=1e-6)
    trained = [name for name, x in adapted.named_parameters() if x.requires_grad]
    assert trained and all("lora_" in name and model.base_model_prefix in name for name in trained)
    adapted.train()
    adapted(IDS, attention_mask=MASK, labels={"ner": IDS.clamp(max=4)}).loss.backward()
    assert any(x.grad.abs().sum() > 0 for x in adapted.parameters() if x.requires_grad)
    assert isinstance(adapted.merge_and_unload(), MultiTaskModel)


def test_the_base_model_is_the_encoder_and_embeddings_can_be_resized(tmp_path):
    model = tiny_model()
    assert model.base_model is model.encoder is model.bert
    model.resize_token_embeddings(330)
    model.save_pretrained(tmp_path)
    again = MultiTaskModel.from_pretrained(tmp_path)
    assert again.get_input_embeddings().num_embeddings == 330 == again.encoder.config.vocab_size
    assert_same_outputs(run(model), run(again), tolerance=1e-5)


# Head views


def test_a_view_answers_for_one_task_in_the_standard_way():
    model = tiny_model()
    view = MultiTaskForSequenceClassification(model.config, task="topics").eval()
    view.load_state_dict(model.state_dict())
    out = run(view, labels=torch.tensor([[1, 0], [0, 1]]))
    full = run(model, labels={"topics": torch.tensor([[1, 0], [0, 1]])})
    assert torch.equal(out.logits, full.logits["topics"]) and torch.equal(out.loss, full.loss)
    assert view.config.id2label == {0: "sport", 1: "politics"} and view.config.label2id == {"sport": 0, "politics": 1}
    assert view.config.problem_type == "multi_label_classification" and view.config.num_labels == 2
    assert not model.config.id2label and model.config.problem_type is None, "the shared configuration is not touched"
    assert "id2label" not in view.config.to_dict()


@pytest.mark.parametrize("view_class", [MultiTaskForSequenceClassification, MultiTaskForTokenClassification])
def test_a_view_cuts_what_the_encoder_cannot_take_and_says_so(view_class, caplog):
    modeling_multitask.logger.warning_once.cache_clear()
    view = view_class(tiny_config()).eval()
    ids = torch.randint(3, 320, (1, 50))
    with torch.no_grad(), caplog.at_level("WARNING"):
        modeling_multitask.logger.addHandler(caplog.handler)
        long, short = view(ids), view(ids[:, :32])
        modeling_multitask.logger.removeHandler(caplog.handler)
    assert torch.equal(long.logits, short.logits)
    assert "A text of 50 tokens is cut to the first 32" in caplog.text


def test_a_view_neither_cuts_a_batch_padded_on_the_left_nor_loses_its_own_task():
    view = MultiTaskForSequenceClassification(tiny_config(), task="topics")
    ids, mask = torch.full((2, 40), 5), torch.ones(2, 40).long()
    mask[1, :20] = 0
    with pytest.raises(ValueError, match="padded on the left cannot be cut to the 32"):
        view(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="This view shows the task 'topics'"):
        view.remove_task("topics")
    view.remove_task("ner")
    assert "ner" not in view.config.tasks


def test_a_view_of_a_missing_kind_says_what_there_is():
    config = tiny_config(tasks={"sentiment": TASKS["sentiment"]})
    with pytest.raises(ValueError, match="no task of kind token_classification; it has: none"):
        MultiTaskForTokenClassification(config)
