"""The examples and the page on own tasks run as they stand."""

import re

import pytest

from tests import fresh
from tests.conftest import ROOT

PAGE = (ROOT / "docs/own-tasks.md").read_text("utf-8")


def test_stored_vectors_are_labelled_without_reading_a_text_again():
    said = fresh.run(["examples/label_your_vectors.py"]).stdout
    assert re.search(r"^alarm +Ring me up at dawn$.*^weather +Any storms on Sunday\?$", said, re.M | re.S)


def test_a_csv_is_annotated_and_explored(tmp_path):
    pytest.importorskip("matplotlib")
    said = fresh.run(["examples/explore_a_csv.py", "--input", "demo/reviews.csv", "--output", tmp_path]).stdout
    assert "Sony" in said and "positive" in said
    assert (tmp_path / "annotated.parquet").exists() and (tmp_path / "sentiment.png").stat().st_size > 1000


def test_the_pages_snippets_run(tmp_path):
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    said = fresh.run(["-c", snippet.replace('"my-model"', repr(str(tmp_path / "my-model")))]).stdout
    assert said.startswith("weather\naccuracy") and (tmp_path / "my-model/config.json").exists()
