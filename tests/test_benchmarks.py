"""The benchmarks' small modes run, compare what they say they compare, and report what they find."""

import json
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import pipeline

from benchmarks import memory, profile, rivals, run
from tests import conftest

TEXTS = [f"Text number {i} of Kofi Annan." for i in range(6)]
LONG_AND_SHORT = [*TEXTS, *conftest.TEXTS, "a " * 100]


@pytest.fixture
def run_main(release, tmp_path, monkeypatch) -> Any:
    """Returns a function that runs a benchmark's command line on a few texts and gives what it writes."""

    def run_module(module: Any, *arguments: str) -> dict[str, Any]:
        output = tmp_path / "results" / "found.json"
        given = ["--model", str(release), "--data", str(tmp_path)] if module is not memory else []
        monkeypatch.setattr(sys, "argv", ["benchmark", *given, "--output", str(output), *arguments])
        monkeypatch.setattr(module, "read_texts", lambda data, count: TEXTS, raising=False)
        module.main()
        return json.loads(output.read_text())

    return run_module


def test_a_small_run_writes_table_and_picture(run_main, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "load_rivals", lambda: {rivals.SPACY: len})
    found = run_main(run, "--rounds", "2")
    titles = [row["ratio"] for row in found["ratios"]]
    assert "time: all outputs / bare encoder, same batches" in titles
    assert "throughput: pipeline / SentenceTransformer.encode" in titles
    assert f"entities per second: pipeline / {rivals.SPACY}" in titles
    assert all(title in capsys.readouterr().out for title in titles[:1])
    assert all(len(seconds) == 2 for seconds in found["seconds"].values())
    assert found["rates"]["pipeline"].keys() == {"texts_per_second", "entities_per_second"}
    assert found["entities"]["embedding alone"] == 0
    assert sum(found["shares"]["torch"].values()) == pytest.approx(1)
    assert found["roofline"]["share_of_peak"] > 0
    assert (tmp_path / "results" / "found.png").exists()


def test_the_profile_names_the_largest_operators_and_adds_up(run_main, capsys):
    found = run_main(profile, "--texts", "6")
    rows = found["operators"]
    assert "aten::addmm" in {row["operator"] for row in rows} and all(row["calls"] > 0 for row in rows)
    assert [row["share"] for row in rows] == sorted((row["share"] for row in rows), reverse=True)
    assert sum(row["share"] for row in rows) + found["other_operators"] + found["rest"] == pytest.approx(1)
    assert "aten::addmm" in capsys.readouterr().out and found["rest"] > 0


def test_memory_is_that_of_the_command_line(run_main):
    found = run_main(memory, "--rows", "20")
    assert 50e6 < found["peak_bytes"]["20"] < 5e9, "what PyTorch alone takes, to what a tiny model never takes"
    assert found["ratio"] == 1


@pytest.mark.parametrize("argument", ["--rounds=0", "--texts=-1", "--threads=many"])
def test_a_number_that_is_none_is_refused_by_name(argument, run_main, capsys):
    with pytest.raises(SystemExit):
        run_main(run, argument)
    name, value = argument.split("=")
    assert f"argument {name}: {value} is not allowed: give a number from 1 up" in capsys.readouterr().err


def test_every_round_runs_all_jobs_and_begins_with_another():
    order = []
    jobs = {name: (lambda name=name: order.append(name)) for name in "abc"}
    seconds, entities = run.run_rounds(jobs, 3, lambda line: None)
    assert order == list("abcbcacab") and entities == {}
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_rates_are_those_of_the_median_round():
    found = run.rates({"fast": [8.0, 2.0, 4.0]}, {"fast": 20}, 40)
    assert found == {"fast": {"texts_per_second": 10.0, "entities_per_second": 5.0}}


def test_a_ratio_is_taken_within_each_round():
    seconds = {"bare encoder": [1.0, 10.0, 2.0], "all outputs": [1.5, 11.0, 2.2]}
    (row,) = run.compare(seconds, {})
    assert row["median"] == pytest.approx(1.1) and row["must"] is None, "the slow second round counts like the others"


def test_entities_per_second_count_what_is_found():
    seconds = {"pipeline": [2.0], "labels and entities alone": [0.5], rivals.SPACY: [1.0]}
    rows = run.compare(seconds, {"pipeline": 30, rivals.SPACY: 10})
    assert {row["ratio"]: row["median"] for row in rows} == {
        f"throughput: labels and entities alone / {rivals.SPACY}": 2,
        f"entities per second: pipeline / {rivals.SPACY}": 1.5,
    }
    without = run.compare(seconds, {"pipeline": 30, rivals.SPACY: 0})
    assert f"entities per second: pipeline / {rivals.SPACY}" not in {row["ratio"] for row in without}, "nothing to divide by"


def test_all_ratios_name_jobs_that_exist(pipe):
    jobs = run.all_jobs({"torch": pipe, "onnx": pipe, "onnx-int8": pipe}, None, {rivals.SPACY: len}, TEXTS)
    assert {name for ratio in run.RATIOS for name in (ratio.above, ratio.below)} <= set(jobs)
    assert jobs["pipeline"]() == sum(len(x) for record in pipe(TEXTS) for x in record["entities"].values()) > 0
    assert jobs["labels and entities alone"]() == jobs["pipeline"]() and jobs["embedding alone"]() == 0


def test_texts_are_of_three_kinds_and_the_same_every_time(tmp_path):
    pytest.importorskip("pyarrow")
    from datasets import Dataset

    words = Dataset.from_dict({"tokens": [["Sentence", str(i)] for i in range(50)]})
    tweets = Dataset.from_dict({"text": [f"tweet {i}" for i in range(60)]})
    for name, data in (("conll2003", words), ("tweet_sentiment", tweets)):
        (tmp_path / name).mkdir()
        data.to_parquet(str(tmp_path / name / "test.parquet"))
    texts = run.read_texts(tmp_path, 100)
    assert len(texts) == 100 and texts == run.read_texts(tmp_path, 100)
    assert sum(text.startswith("tweet") for text in texts) == 50
    assert sum(text.count("Sentence") == run.DOCUMENT_ROWS for text in texts) == 5


def test_the_work_of_a_window_grows_with_its_length_and_its_square():
    config = SimpleNamespace(hidden_size=4, intermediate_size=8, num_hidden_layers=2)
    window = SimpleNamespace(input_ids=[0] * 10)
    one = run.encoder_flops(config, [window])
    assert one == 10 * 2 * 2 * (4 * 16 + 2 * 32) + 4 * 2 * 4 * 100
    assert run.encoder_flops(config, [window, window]) == 2 * one


# What makes the model faster where it helps


def decisions(records: list[dict[str, Any]]) -> list[Any]:
    return [
        (
            record["labels"]["sentiment"]["label"],
            record["labels"]["topics"]["labels"],
            [(entity["start"], entity["end"], entity["entity_group"]) for entity in record["entities"]["ner"]],
        )
        for record in records
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_pipeline_in_half_precision_gives_nearly_the_same_vectors(release, pipe, dtype):
    half = pipeline("multitask", model=str(release), trust_remote_code=True, device="cpu", dtype=dtype)
    assert {parameter.dtype for parameter in half.model.parameters()} == {dtype}
    for record, expected in zip(half(LONG_AND_SHORT), pipe(LONG_AND_SHORT), strict=True):
        vector = record["sentence_embedding"]
        assert vector.dtype == np.float32 and np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
        assert vector @ expected["sentence_embedding"] > 0.99
        assert record["labels"]["sentiment"]["scores"] == pytest.approx(expected["labels"]["sentiment"]["scores"], abs=0.05)


def test_a_compiled_model_gives_the_same_records_whatever_the_shape(release, pipe):
    torch._dynamo.reset()
    compiled, traced = pipeline("multitask", model=str(release), trust_remote_code=True, device="cpu"), []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        traced.append(graph)
        return graph.forward

    compiled.model.compile(backend=backend, dynamic=True)
    for batch_tokens in (32, 64, 1024):  # each makes batches of other shapes
        found, expected = (each(LONG_AND_SHORT, batch_tokens=batch_tokens) for each in (compiled, pipe))
        assert decisions(found) == decisions(expected)
        for record, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(record["sentence_embedding"], other["sentence_embedding"], atol=1e-5)
    assert 1 <= len(traced) < torch._dynamo.config.recompile_limit, (
        "a graph serves many shapes, so that torch never gives up"
    )
