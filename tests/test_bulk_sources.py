"""Reading: odd rows cost only themselves, and an input that is ambiguous is refused."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bulk import sources
from bulk.sources import InputError, Row, Source


def read(path: Path, column: str = "text") -> list[Row]:
    return list(Source(str(path), sources.SUFFIXES[path.suffix], column).rows())


def test_csv_rows_with_too_many_or_too_few_fields_are_rejected_among_good_ones(tmp_path):
    (tmp_path / "in.csv").write_text('id,text\n1,fine\n2,I hate this, truly\n3\n\n4,"quoted, truly"\n5,,\n6,\n')
    rows = read(tmp_path / "in.csv")
    assert [text for text, _ in rows] == ["fine", None, None, "quoted, truly", None, ""]
    assert [reason and reason.split(";")[0] for _, reason in rows] == [
        None, "has 3 fields, but the header has 2", "has 1 fields, but the header has 2", None,
        "has 3 fields, but the header has 2", None,
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_column_names_that_occur_twice_are_refused(tmp_path, suffix):
    path = tmp_path / f"in.{suffix}"
    if suffix == "csv":
        path.write_text("text,id,text\na,1,b\n")
    else:
        pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array([1]), pa.array(["b"])], ["text", "id", "text"]), path)
    with pytest.raises(InputError, match="several columns named text; give each column a name of its own"):
        read(path)


def test_unnamed_columns_of_a_csv_are_allowed(tmp_path):
    (tmp_path / "in.csv").write_text("text,,\na,,\n")
    assert read(tmp_path / "in.csv") == [("a", None)]


@pytest.mark.parametrize("of_type", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_a_parquet_string_that_is_not_utf8_is_rejected_among_good_ones(tmp_path, of_type):
    values = pa.array([b"one", b"bro\xffken", b"t\xc3\xa9l\xc3\xa9", None], pa.binary())
    if pa.types.is_dictionary(of_type):
        column = pa.DictionaryArray.from_arrays([0, 1, 2, None], values.slice(0, 3).view(pa.string()))
    else:
        column = (values if of_type == pa.string() else values.cast(pa.large_binary())).view(of_type)
    pq.write_table(pa.table({"text": column}), tmp_path / "in.parquet")
    rows = read(tmp_path / "in.parquet")
    assert [text for text, _ in rows] == ["one", None, "télé", None]
    assert [reason is None for _, reason in rows] == [True, False, True, True] and "is not valid UTF-8" in rows[1][1]


def test_json_at_any_depth_costs_only_its_row(tmp_path):
    lines = ['{"text": ' + "[" * depth + "]" * depth + "}\n" for depth in (1, 10, *range(900, 1000, 7), 100_000)]
    (tmp_path / "in.jsonl").write_text("".join(['{"text": "one"}\n', *lines, '{"text": "two"}\n']))
    found = [item for chunk in sources.chunks(read(tmp_path / "in.jsonl")) for item in chunk]
    assert [text for _, text, _ in found] == ["one", *[None] * len(lines), "two"]
    assert found[1][2] == "has a list in the field 'text', not a text"


def test_a_fingerprint_tells_rows_apart_and_files_alike(tmp_path):
    texts = {"a": "one\ntwo\n", "b": "one\r\ntwo", "c": "one\ntwo\n\n", "d": "onetwo\n", "e": "two\none\n"}
    found = {}
    for name, content in texts.items():
        (tmp_path / f"{name}.txt").write_text(content, newline="")
        found[name] = Source(str(tmp_path / f"{name}.txt"), "text", "text").identity()
    assert [found[name][sources.ROWS] for name in texts] == [2, 2, 3, 1, 2]
    assert found["a"] == found["b"] and len({json.dumps(x) for x in found.values()}) == 4


def test_a_chunk_is_bounded_in_rows_and_characters(monkeypatch):
    monkeypatch.setattr(sources, "CHUNK_ROWS", 3)
    monkeypatch.setattr(sources, "CHUNK_CHARACTERS", 10)
    monkeypatch.setattr(sources, "MAX_CHARACTERS", 12)
    rows = [("a" * 6, None), ("b" * 6, None), ("c", None), (None, "is gone"), ("d", None), ("e" * 13, None)]
    found = list(sources.chunks(rows))
    assert [[row for row, _, _ in chunk] for chunk in found] == [[0, 1], [2, 3, 4], [5]]
    assert found[1][1] == (3, None, "is gone")
    assert found[2] == [(5, None, "has 13 characters, more than 12; divide the text")]
