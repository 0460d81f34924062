"""The configuration: what it accepts, what it refuses and in which words, and that it survives the disk."""

import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, BertConfig

from configuration_multitask import MultiTaskConfig
from tasks_multitask import KINDS, POOLING_MODES, PROBLEM_TYPES, TaskSpec
from tests.conftest import ENCODERS, TASKS, tiny_config

names = st.from_regex(r"[a-z][a-z0-9_]{0,9}", fullmatch=True).filter(lambda x: not hasattr(torch.nn.ModuleDict, x))
label_lists = st.lists(st.text(min_size=1, max_size=8).filter(lambda x: x[:2] not in ("B-", "I-")), min_size=2, unique=True)
numbers = st.floats(min_value=0.01, max_value=10, allow_nan=False)


@st.composite
def specs(draw: st.DrawFn) -> dict:
    labels = draw(label_lists)
    spec = {
        "kind": draw(st.sampled_from(KINDS)),
        "labels": labels,
        "temperature": draw(numbers),
    }
    spec |= draw(st.fixed_dictionaries({}, optional={"hidden_dim": st.integers(1, 64)}))
    if spec["kind"] == KINDS[0]:
        spec["problem_type"] = draw(st.sampled_from(PROBLEM_TYPES))
        if spec["problem_type"] == PROBLEM_TYPES[1]:
            spec["thresholds"] = draw(st.lists(st.floats(0, 1), min_size=len(labels), max_size=len(labels)))
    return spec


@given(
    tasks=st.dictionaries(names, specs(), max_size=4),
    pooling_mode=st.sampled_from(POOLING_MODES),
    embedding_dim=st.none() | st.integers(1, 512),
    layers=st.integers(0, 2),
    model_type=st.sampled_from(ENCODERS),
)
def test_any_allowed_configuration_survives_json(tasks, pooling_mode, embedding_dim, layers, model_type):
    fields = {"pooling_mode": pooling_mode, "embedding_dim": embedding_dim, "num_task_layers": layers}
    config = tiny_config(model_type, tasks=tasks, **fields)
    again = MultiTaskConfig(**json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict()
    assert list(again.tasks) == list(tasks), "the order of tasks says which one is the default"
    for name, spec in tasks.items():
        assert {k: v for k, v in again.task_specs[name].__dict__.items() if k in spec} == spec


@pytest.mark.parametrize("model_type", ENCODERS)
def test_the_file_is_the_encoders_own_configuration(model_type, tmp_path):
    config = tiny_config(model_type)
    config.save_pretrained(tmp_path)
    native = AutoConfig.from_pretrained(tmp_path)  # without trust: transformers' own class
    assert native.model_type == model_type
    assert type(native) is type(config.encoder_config)
    assert native.hidden_size == config.hidden_size == 32
    assert native.num_hidden_layers == config.num_hidden_layers == 2
    assert len(native.architectures) == 1 and native.architectures[0].endswith("Model")
    trusted = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    assert trusted.tasks == config.tasks and trusted.embedding_dim == 8


def test_encoder_fields_reach_the_encoder_config():
    config = tiny_config(hidden_dropout_prob=0.0)
    config.attention_probs_dropout_prob = 0.3
    encoder = config.encoder_config
    assert isinstance(encoder, BertConfig)
    assert encoder.hidden_dropout_prob == 0.0
    assert encoder.attention_probs_dropout_prob == 0.3
    assert not hasattr(encoder, "tasks")


NER = {"kind": "token_classification", "labels": ["O", "B-X", "I-X"]}
TEXT = {"kind": "sequence_classification", "labels": ["a", "b"]}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "no-such"}, "model_type is 'no-such'; allowed:"),
        ({"model_type": 3}, "model_type is 3"),
        ({"pooling_mode": "median"}, "pooling_mode is 'median'; allowed: cls, mean"),
        ({"pooling_mode": ["mean"]}, r"pooling_mode is \['mean'\]"),
        ({"embedding_dim": 0}, "embedding_dim is 0; allowed: an integer from 1"),
        ({"embedding_dim": True}, "embedding_dim is True"),
        ({"embedding_dim": "256"}, "embedding_dim is '256'"),
        ({"tasks": [TEXT]}, "tasks is .* must be an object"),
        ({"tasks": {"a": None}}, "tasks.a is None; it must be an object"),
        ({"tasks": {"a": []}}, r"tasks.a is \[\]"),
        ({"tasks": {"a.b": TEXT}}, "task name 'a.b'; allowed: letters"),
        ({"tasks": {"items": TEXT}}, "task name 'items'"),
        ({"tasks": {"half": TEXT}}, "task name 'half'"),
        ({"tasks": {"training": TEXT}}, "task name 'training'"),
        ({"tasks": {"a": {"kind": TEXT["kind"]}}}, r"tasks.a lacks the fields \['labels'\]"),
        ({"tasks": {"a": {**TEXT, "label": 1}}}, r"tasks.a has unknown fields \['label'\]; known fields: kind"),
        ({"tasks": {"a": {**TEXT, "kind": "ner"}}}, "tasks.a.kind is 'ner'; allowed: one of sequence_classification"),
        ({"tasks": {"a": {**TEXT, "labels": "ab"}}}, "tasks.a.labels is 'ab'; allowed: a non-empty list"),
        ({"tasks": {"a": {**TEXT, "labels": []}}}, r"tasks.a.labels is \[\]"),
        ({"tasks": {"a": {**TEXT, "labels": ["a"]}}}, "tasks.a.labels .* at least two labels"),
        ({"tasks": {"a": {**TEXT, "labels": ["a", "a"]}}}, "tasks.a.labels .* without duplicates"),
        ({"tasks": {"a": {**TEXT, "labels": ["a", 1]}}}, "tasks.a.labels"),
        ({"tasks": {"a": {**TEXT, "problem_type": "multi"}}}, "tasks.a.problem_type is 'multi'; allowed: one of single"),
        ({"tasks": {"a": {**NER, "problem_type": "regression"}}}, "tasks.a.problem_type .* null for a token"),
        ({"tasks": {"a": {**NER, "labels": ["O", "I-X"]}}}, "tasks.a.labels .* a 'B-<type>' for every"),
        ({"tasks": {"a": {**NER, "labels": ["B-X", "I-X"]}}}, "tasks.a.labels .* 'O' among them"),
        ({"tasks": {"a": {**TEXT, "classifier_dropout": 1.0}}}, r"tasks.a.classifier_dropout is 1.0; allowed: a number in"),
        ({"tasks": {"a": {**TEXT, "hidden_dim": 1.5}}}, "tasks.a.hidden_dim is 1.5"),
        ({"tasks": {"a": {**NER, "casing_dim": 0}}}, "tasks.a.casing_dim is 0; allowed: null or an integer from 1 to 65536"),
        ({"tasks": {"a": {**TEXT, "casing_dim": 8}}}, "tasks.a.casing_dim is 8; allowed: null for a sequence"),
        (
            {"tasks": {"a": {**TEXT, "pooling_mode": "sum"}}},
            "tasks.a.pooling_mode is 'sum'; allowed: null, or for a text cls",
        ),
        ({"tasks": {"a": {**TEXT, "reads": "all"}}}, "tasks.a.reads is 'all'; allowed: branch or encoder or both"),
        ({"tasks": {"a": {**NER, "reads": "both"}}}, "tasks.a.reads is 'both'; allowed: branch"),
        ({"tasks": {"a": {**NER, "pooling_mode": "cls"}}}, "tasks.a.pooling_mode is 'cls'"),
        (
            {"tasks": {"a": {**TEXT, "hidden_dim": 10**9}}},
            "tasks.a.hidden_dim is 1000000000; allowed: null or an integer from 1",
        ),
        ({"tasks": {"a": {**TEXT, "fallback": "a"}}}, "tasks.a.fallback is 'a'; allowed: null, or for multi_label"),
        ({"embedding_dim": 10**9}, "embedding_dim is 1000000000; allowed: an integer from 1 to 65536"),
        ({"num_task_layers": -1}, r"num_task_layers is -1; allowed: an integer from 0 \(no task branch\) to 2"),
        ({"num_task_layers": True}, "num_task_layers is True; allowed: an integer from 0"),
        ({"num_task_layers": 3}, "num_task_layers is 3; allowed: an integer from 0 .* to 2, the number of the encoder's"),
        ({"num_task_layers": "1"}, "num_task_layers is '1'"),
        ({"tasks": {"a": {**TEXT, "temperature": 0}}}, "tasks.a.temperature is 0; allowed: a positive number"),
        ({"tasks": {"a": {**TEXT, "temperature": float("nan")}}}, "tasks.a.temperature is nan"),
        ({"tasks": {"a": {**TEXT, "thresholds": [0.5, 0.5]}}}, "tasks.a.thresholds .* multi_label_classification"),
        ({"multitask_weights": "weights.bin"}, "multitask_weights is 'weights.bin'; allowed:"),
    ],
)
def test_errors_name_field_value_and_what_is_allowed(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**{"model_type": "bert", **fields})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda x: st.lists(x) | st.dictionaries(st.text(), x),
)


@given(field=st.sampled_from(["pooling_mode", "embedding_dim", "tasks", "multitask_weights"]), value=json_values)
def test_whatever_stands_in_a_field_is_accepted_or_named_in_a_value_error(field, value):
    try:
        tiny_config(**{field: value})
    except ValueError as error:
        assert field in str(error)


@given(fields=st.dictionaries(st.sampled_from(list(TaskSpec.__dataclass_fields__)), json_values))
def test_whatever_stands_in_a_task_is_accepted_or_a_value_error(fields):
    try:
        spec = TaskSpec.from_dict("a", fields)
    except ValueError as error:
        assert str(error).startswith("tasks.a")
    else:
        assert TaskSpec.from_dict("a", spec.to_dict()) == spec


def test_a_task_of_a_kind_is_picked_by_name_or_as_the_first():
    config = tiny_config()
    assert config.pick_task("sequence_classification", None) == "sentiment"
    assert config.pick_task("token_classification", "pos") == "pos"
    with pytest.raises(
        ValueError, match=re.escape("no task named 'ner' of kind sequence_classification; it has: sentiment")
    ):
        config.pick_task("sequence_classification", "ner")


def test_refused_tasks_leave_the_configuration_as_it_was():
    config = tiny_config()
    with pytest.raises(ValueError):
        config.set_tasks({"ok": TEXT, "bad": {"kind": "x", "labels": ["a", "b"]}})
    assert list(config.tasks) == list(TASKS)
