"""The benchmark's small mode runs, compares what it says it compares, and reports what it finds."""

import json
import sys

import pytest

from benchmarks import run


def test_a_small_run_writes_table_and_picture(release, tmp_path, monkeypatch, capsys):
    texts = [f"Text number {i} of Kofi Annan." for i in range(6)]
    monkeypatch.setattr(run, "read_texts", lambda data, count: texts)
    output = tmp_path / "results/benchmarks.json"
    arguments = ["run", "--model", str(release), "--data", str(tmp_path), "--rounds", "2", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", arguments)
    run.main()
    found = json.loads(output.read_text())
    titles = [row["ratio"] for row in found["ratios"]]
    assert "time: all outputs / bare encoder, same batches" in titles
    assert "throughput: pipeline / SentenceTransformer.encode" in titles
    assert all(title in capsys.readouterr().out for title in titles[:1])
    assert all(len(seconds) == 2 for seconds in found["seconds"].values())
    assert sum(found["shares"]["torch"].values()) == pytest.approx(1)
    assert output.with_suffix(".png").exists()


def test_every_round_runs_all_jobs_and_begins_with_another():
    order = []
    jobs = {name: (lambda name=name: order.append(name)) for name in "abc"}
    seconds = run.run_rounds(jobs, 3, lambda line: None)
    assert order == list("abcbcacab")
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_ratio_is_taken_within_each_round():
    seconds = {"bare encoder": [1.0, 10.0, 2.0], "all outputs": [1.5, 11.0, 2.2]}
    (row,) = run.compare(seconds)
    assert row["median"] == pytest.approx(1.1) and row["must"] == 1.08, "the slow second round counts like the others"


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
    class Config:
        hidden_size, intermediate_size, num_hidden_layers = 4, 8, 2

    class Window:
        input_ids = [0] * 10

    one = run.encoder_flops(Config, [Window])
    assert one == 10 * 2 * 2 * (4 * 16 + 2 * 32) + 4 * 2 * 4 * 100
    assert run.encoder_flops(Config, [Window, Window]) == 2 * one
