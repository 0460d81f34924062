"""The demo's functions: they show what the pipeline says, give a csv file back whole, and refuse bad input in plain words."""

import base64
import csv
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks_multitask import TaskSpec
from tests.conftest import ROOT, TEXTS

gr = pytest.importorskip("gradio")
from huggingface_hub import SpaceCard  # noqa: E402

from demo import app  # noqa: E402


@pytest.fixture(scope="module")
def demo(pipe: Any) -> app.Demo:
    return app.Demo(pipe)


@pytest.fixture
def csv_file(tmp_path: Path) -> Path:
    return tmp_path / "some texts.csv"


def write(file: Path, rows: list[list[str]]) -> str:
    with file.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows(rows)
    return str(file)


def annotated(demo: app.Demo, file: str, column: str = "text", with_vectors: bool = False) -> list[list[str]]:
    """Returns the annotated table, after a look at its preview."""
    link, preview = demo.annotate_file(file, column, with_vectors)
    content = base64.b64decode(re.search(r'href="data:text/csv;charset=utf-8;base64,([^"]*)"', link)[1])
    table = list(csv.reader(io.StringIO(content.decode("utf-8"), newline="")))
    assert preview["headers"][1:] == [name for name in table[0] if name.startswith("predicted_")]
    assert len(preview["data"]) == min(len(table) - 1, app.PREVIEW_ROWS)
    return table


def harmless(table: list[list[str]]) -> list[list[str]]:
    """Returns a table as it comes back: with apostrophes before formulas."""
    return [["'" + cell if app.FORMULA.match(cell) else cell for cell in row] for row in table]


def refusal(function: Any, *values: Any) -> str:
    """Returns the message with which values are refused."""
    with pytest.raises(gr.Error) as caught:
        function(*values)
    assert caught.value.print_exception is False and "Traceback" not in caught.value.message
    return caught.value.message


def test_a_text_is_shown_as_the_pipeline_reads_it(demo: app.Demo, pipe: Any) -> None:
    record = pipe(TEXTS[0])
    ner, pos, sentiment, topics, rating, picture, plain = demo.annotate(TEXTS[0])
    marked = gr.HighlightedText().postprocess(ner).model_dump()
    pieces = [(piece["token"], piece["class_or_confidence"]) for piece in marked]
    assert "".join(token for token, _ in pieces) == TEXTS[0]
    found = [(entity["word"], entity["entity_group"]) for entity in record["entities"]["ner"]]
    assert found and [piece for piece in pieces if piece[1]] == found
    assert pos["entities"] == record["entities"]["pos"]
    assert sentiment == record["labels"]["sentiment"]["scores"]
    answer = record["labels"]["topics"]
    assert {label: float(score) for label, score in re.findall(r"<li>(\w+) <b>([\d.]+)</b>", topics)} == {
        label: round(answer["scores"][label], 2) for label in answer["labels"]
    }
    assert rating == f"stars {record['labels']['rating']['values']['stars']:.2f}"
    assert json.loads(json.dumps(plain))["sentence_embedding"] == record["sentence_embedding"].tolist()
    assert re.findall(r'title="\d+: ([^"]+)"', picture) == [f"{value:.3f}" for value in record["sentence_embedding"]]


def test_a_chip_is_shown_for_what_passes_its_threshold_and_a_sentence_if_nothing_does() -> None:
    spec = TaskSpec(kind="sequence_classification", labels=["<joy>", "fear"], problem_type="multi_label_classification",
                    thresholds=[0.3, 0.6], fallback="fear")  # fmt: skip
    shown = app.chips(spec, {"scores": {"<joy>": 0.41, "fear": 0.55}})
    assert "<li>&lt;joy&gt; <b>0.41</b></li>" in shown and "fear" not in shown
    shown = app.chips(spec, {"scores": {"<joy>": 0.29, "fear": 0.55}})
    assert "<li>" not in shown and "Nothing passes its threshold. The answer is fear." in shown
    assert "fear 0.55 of 0.60, &lt;joy&gt; 0.29 of 0.30" in shown


def test_stored_vectors_move_to_what_encoding_anew_would_give(demo: app.Demo, pipe: Any) -> None:
    texts = ["I love it!", "so sad"]
    said, moved = demo.move(demo.encoder_vectors("\n".join(texts)))
    expected = [record["sentence_embedding"] for record in pipe(texts)]
    np.testing.assert_allclose([json.loads(line) for line in moved.splitlines()], expected, atol=1e-3)  # five decimals
    assert said.startswith("2 vectors: 32 → 8 dimensions")


def test_texts_are_compared_by_their_vectors(demo: app.Demo, pipe: Any) -> None:
    texts = ["<b>I love it!</b>", "so sad", "Paris & Rome"]
    table = demo.compare("\n" + "\r\n\n ".join(texts))
    vectors = np.stack([record["sentence_embedding"] for record in pipe(texts)])
    shown = [float(value) for value in re.findall(r">(-?\d\.\d\d)</td>", table)]
    np.testing.assert_allclose(shown, (vectors @ vectors.T).ravel(), atol=0.006)
    assert "<b>I love" not in table and "&lt;b&gt;I love it!" in table and "Paris &amp; Rome" in table
    assert 'title="2. so sad | 3. Paris &amp; Rome"' in table, "a cell names its two texts"
    pairs = [float(value) for value in re.findall(r"<li><b>(-?\d\.\d\d)</b>", table)]
    assert pairs == sorted(pairs, reverse=True) and len(pairs) == 3


def test_colours_tell_sign_and_size() -> None:
    assert app.colour(0.0) == "rgb(245,245,245)"
    assert app.colour(1.0) == app.colour(3.0) != app.colour(0.5)
    red, _, blue = map(int, re.findall(r"\d+", app.colour(-1.0)))
    assert blue > red


@pytest.mark.parametrize(
    ("method", "value", "message"),
    [
        ("annotate", "", "text is empty"),
        ("annotate", None, "text is empty"),
        ("annotate", " \n", "text is empty"),
        ("annotate", "a" * 20_001, "20,001 characters; allowed: 20,000"),
        ("annotate", "a\ud800", "lone surrogate at character 1"),
        ("compare", "only one\n", "1 lines; allowed: 2 to 12"),
        ("compare", None, "0 lines"),
        ("compare", "a\n" * 13, "13 lines"),
        ("compare", "a\n" + "b" * 20_001, "text 2 has 20,001 characters"),
        ("move", None, "0 lines; allowed: 1 to 12"),
        ("move", "[1, 2]", "line 1 is [1, 2]…; allowed: a JSON list of 32 numbers"),
        ("move", "\n" + str([0] * 32), "line 2 is"),
        ("move", str([float("nan")] * 32).replace("nan", "NaN"), "not all zero"),
        ("move", "[" * 100_000, "line 1 is"),
        ("columns", str(ROOT / "model.safetensors"), "bytes; allowed: 1,048,576"),
    ],
)
def test_bad_input_is_refused_in_plain_words(demo: app.Demo, method: str, value: Any, message: str) -> None:
    assert message in refusal(getattr(demo, method), value)


def test_a_csv_file_comes_back_whole_with_columns_added(demo: app.Demo, pipe: Any, csv_file: Path) -> None:
    rows = [["id", "text", "id"], *([str(i), text, 'a "note", quoted\nén'] for i, text in enumerate(TEXTS))]
    table = annotated(demo, write(csv_file, rows), with_vectors=True)
    assert [row[:3] for row in table] == rows
    for values, record in zip(table[1:], pipe(TEXTS), strict=True):
        row = dict(zip(table[0], values, strict=True))
        assert row["predicted_sentiment"] == record["labels"]["sentiment"]["label"]
        assert float(row["predicted_sentiment_score"]) == pytest.approx(record["labels"]["sentiment"]["score"], abs=1e-4)
        assert json.loads(row["predicted_topics"]) == record["labels"]["topics"]["labels"]
        assert float(row["predicted_rating_stars"]) == pytest.approx(record["labels"]["rating"]["values"]["stars"], abs=1e-4)
        spans = [(entity["start"], entity["end"], entity["word"]) for entity in json.loads(row["predicted_ner"])]
        assert spans == [(entity["start"], entity["end"], entity["word"]) for entity in record["entities"]["ner"]]
        np.testing.assert_allclose(json.loads(row["predicted_embedding"]), record["sentence_embedding"], atol=1e-6)


def test_a_formula_comes_back_as_text(demo: app.Demo, csv_file: Path) -> None:
    formulas = ['=HYPERLINK("http://x","y")', "@SUM(A1)", "+1+cmd|' /C calc'!A0", "-2+3", "\t=1", "\r=1", "＝1+1"]
    ordinary = ["-2", "+1.5", "-1,000", "a=b", "'=1", "", "me@example.org", "é"]
    table = annotated(demo, write(csv_file, [["=name", "text"], *([cell, cell] for cell in [*formulas, *ordinary])]))
    assert table[0][:2] == ["'=name", "text"]
    assert [row[:2] for row in table[1:]] == [[cell] * 2 for cell in [*("'" + x for x in formulas), *ordinary]]


def test_a_file_name_cannot_break_out_of_its_link() -> None:
    link = app.download_link('"><img src=x>.csv', [["a"]])
    assert "<img" not in link and "&quot;&gt;&lt;img src=x&gt;.csv" in link


def test_vectors_are_left_out_unless_wanted(demo: app.Demo) -> None:
    table = annotated(demo, str(app.HERE / "reviews.csv"))
    assert len(table) == 6 and "predicted_embedding" not in table[0] and "predicted_ner" in table[0]


def test_the_column_with_texts_is_found_or_asked_for(demo: app.Demo, csv_file: Path) -> None:
    for header, chosen in ((["id", "text"], "text"), (["review"], "review"), (["title", "review"], None)):
        update = demo.columns(write(csv_file, [header, ["a"] * len(header)]))
        assert ([name for name, _ in update.choices], update.value) == (header, chosen)
    assert demo.columns(None).choices == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 rows"),
        (b"text\n\n", "0 rows"),
        (b"id,text\n1,a\n2,b,c\n", "3 fields in the row that ends at line 3; the header has 2"),
        (b"id,text\n1\n", "1 fields in the row that ends at line 2"),
        (b'text\n"a\nb\n', "not a csv at line 3"),
        (b'text\n"a"b\n', "not a csv at line 2"),
        ("text\nén\n".encode("utf-16"), "not UTF-8 at byte 0"),
        ("text\nén\n".encode("latin-1"), "not UTF-8 at byte 5"),
        (b"id,review\n1,a\n", "column is text; allowed: id, review"),
        (b"id;text\n1;a\n", "allowed: id;text"),
        (b"<b>x</b>\na\n", "allowed: &lt;b&gt;x&lt;/b&gt;"),
        (b",".join(b"column number %d" % i for i in range(100)) + b"\n" + b"," * 99, "column number 1, column number 2, "),
        (b"text,predicted_ner\na,b\n", "file has the columns predicted_ner already"),
        (b"text\n" + b"a\n" * 1_001, "1,001 rows below the header; allowed: 1 to 1,000"),
        (b"," * 500_000, "500,001 columns"),
        (b"a" * 100_000, "the longest name 100,000 characters"),
        (b"a" * 1_048_577, "1,048,577 bytes; allowed: 1,048,576"),
    ],
)
def test_bad_files_are_refused_in_plain_words(demo: app.Demo, csv_file: Path, content: bytes, message: str) -> None:
    csv_file.write_bytes(content)
    answer = refusal(demo.annotate_file, str(csv_file), "text", False)
    assert message in answer and len(answer) < 300


def test_no_file_is_asked_for(demo: app.Demo) -> None:
    assert "upload a csv file" in refusal(demo.annotate_file, None, "text", False)


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from([b"text", b",", b'"', b"\n", b"\r", b"\0", b"=1", b"\xff", "é😀".encode(), b"\xef\xbb\xbf"]))
)
def test_any_bytes_are_annotated_or_refused(
    demo: app.Demo, tmp_path_factory: pytest.TempPathFactory, parts: list[bytes]
) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz.csv"
    file.write_bytes(b"text" + b"".join(parts))
    try:
        header, rows = app.read_table(str(file))
        table = annotated(demo, str(file), header[0])
    except gr.Error as error:
        assert re.search(r"(file|column) (is|has) ", error.message)
    else:
        assert [row[: len(header)] for row in table] == harmless([header, *rows])


@settings(max_examples=25)
@given(st.lists(st.lists(st.text(max_size=12), min_size=2, max_size=2), min_size=1, max_size=6))
def test_any_table_comes_back_with_its_own_cells(
    demo: app.Demo, tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]]
) -> None:
    table = [["text", "é 😀"], *rows]
    file = write(tmp_path_factory.getbasetemp() / "table.csv", table)
    assert [row[:2] for row in annotated(demo, file)] == harmless(table)


def test_a_space_takes_the_model_that_its_readme_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert app.default_model() == str(ROOT)
    card = SpaceCard.load(app.HERE / "README.md")
    assert card.data.sdk == "gradio" and card.data.sdk_version == gr.__version__
    space = shutil.copytree(app.HERE, tmp_path / "space" / "app")
    assert (space / card.data.app_file).exists()
    monkeypatch.setattr(app, "HERE", space)
    assert app.default_model() == card.data.models[0]
    (space / "README.md").write_text("---\nsdk: gradio\n---\n")
    with pytest.raises(ValueError, match="write its id as USER/NAME under 'models'"):
        app.default_model()


def test_a_model_that_cannot_be_loaded_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        app.main([str(tmp_path / "nothing")])
    assert f"model {tmp_path / 'nothing'} cannot be loaded" in capsys.readouterr().err
