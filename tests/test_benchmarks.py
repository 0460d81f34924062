"""The benchmarks' small modes run, compare what they say they compare, and report what they find."""

import json
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import pipeline

from benchmarks import memory, rivals, run, starts
from tests import conftest

TEXTS = [f"Text number {i} of Kofi Annan." for i in range(6)]
LONG_AND_SHORT = [*TEXTS, *conftest.TEXTS, "a " * 100]


@pytest.fixture
def run_main(release, tmp_path, monkeypatch) -> Any:
    """Returns a function that runs a benchmark's command line on a few texts and gives what it writes."""

    def run_benchmark(*arguments: str) -> dict[str, Any]:
        output = tmp_path / "results" / "found.json"
        given = ["--model", str(release), "--data", str(tmp_path), "--output", str(output)]
        monkeypatch.setattr(sys, "argv", ["benchmark", *given, *arguments])
        monkeypatch.setattr(run, "read_texts", lambda data, count: TEXTS)
        run.main()
        return json.loads(output.read_text())

    return run_benchmark


def test_a_small_run_prints_and_writes_what_it_finds(run_main, monkeypatch, capsys):
    monkeypatch.setattr(run, "load_rivals", lambda *given: {rivals.SPACY: len, rivals.VADER: len})
    found = run_main("--rounds", "2", "--short", "3")
    assert "throughput: everything, PyTorch / SentenceTransformer.encode" in {row["ratio"] for row in found["ratios"]}
    assert found["ratios"][0]["ratio"] in capsys.readouterr().out
    assert all(len(seconds) == 2 for seconds in found["seconds"].values())
    short = found["one_short_text_milliseconds"]
    assert all(0 < x["median"] <= x["p95"] for x in short.values())
    assert {"everything, torch", "embedding alone, torch", run.ENCODE, rivals.SPACY} <= short.keys()
    assert 0.1 < found["shares"]["torch"]["forward"] < 1
    assert found["file_bytes"]["torch"] > 10_000


@pytest.mark.parametrize("argument", ["--rounds=0", "--texts=-1", "--threads=many"])
def test_a_number_that_is_none_is_refused_by_name(argument, run_main, capsys):
    with pytest.raises(SystemExit):
        run_main(argument)
    name, value = argument.split("=")
    assert f"argument {name}: {value} is not allowed: give a number from 1 up" in capsys.readouterr().err


@pytest.mark.slow
def test_one_text_from_the_shell(release, tmp_path, monkeypatch):
    output = tmp_path / "starts.json"
    monkeypatch.setattr(sys, "argv", ["starts", "--model", str(release), "--rounds", "1", "--output", str(output)])
    starts.main()
    ways = json.loads(output.read_text())["ways"]
    assert ways["torch"]["to_torch"] == 1 and ways["torch"]["seconds"] > 0 and ways["torch"]["peak_bytes"] > 50e6
    assert "onnx" not in ways, "this release has no export"


@pytest.mark.slow
def test_a_longer_file_takes_about_the_same_memory(tmp_path, monkeypatch):
    output = tmp_path / "memory.json"
    monkeypatch.setattr(sys, "argv", ["memory", "--rows", "1500", "3000", "--output", str(output)])
    memory.main()
    found = json.loads(output.read_text())
    assert found["peak_bytes"]["1500"] > 50e6 and 0.8 < found["ratio"] < 1.2


def test_every_round_runs_all_jobs_and_begins_with_another():
    order = []
    jobs = {name: (lambda name=name: order.append(name)) for name in "abc"}
    seconds = run.run_rounds(jobs, 3)
    assert order == list("abcbcacab")
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_ratio_is_taken_within_each_round():
    seconds = {run.ENCODE: [1.5, 11.0, 2.2], "everything, torch": [1.0, 10.0, 2.0]}
    (row,) = run.compare(run.RATIOS, seconds)
    assert row["median"] == pytest.approx(1.1), "the slow second round counts like the others"


def test_all_ratios_name_jobs_that_exist(pipe):
    others = {rivals.SPACY: len, rivals.FASTEMBED: len}
    encoder = SimpleNamespace(encode=len)
    jobs = run.all_jobs(dict.fromkeys(("torch", run.BFLOAT16, "onnx", "onnx-int8"), pipe), encoder, others, TEXTS)
    assert {name for pair in [*run.RATIOS.values(), *run.LATENCIES.values()] for name in pair} <= set(jobs)
    assert (
        "labels" not in jobs["embedding alone, torch"]()[0] and jobs["everything, onnx"]()[0].keys() == pipe(TEXTS[0]).keys()
    )


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


@pytest.mark.slow
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
