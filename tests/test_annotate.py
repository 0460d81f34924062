"""The command line: what it prints, reads and writes, and what a bad row or file does."""

import errno
import io
import json
import os
import shutil
import sys
from pathlib import Path
from threading import Thread
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import annotate
from bulk import parts, sources
from bulk import run as bulk_run
from tests.conftest import TASKS, TEXTS

PARIS = "Tim loves Paris."


@pytest.fixture
def run(release, capsys, monkeypatch):
    """Runs `annotate.py` in this process on the tiny release; returns exit code, standard output and error."""

    def call(*arguments, stdin: bytes | None = None):
        if stdin is not None:
            read, write = os.pipe()
            os.write(write, stdin)
            os.close(write)
            monkeypatch.setattr(sys, "stdin", os.fdopen(read))
        monkeypatch.setattr(sys, "argv", ["annotate.py", "--model", str(release), "--device", "cpu", *map(str, arguments)])
        capsys.readouterr()
        try:
            annotate.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, f"{err}{code if isinstance(code, str) else ''}"

    return call


def names(folder: Path) -> list[str]:
    """Returns the sorted names of what a folder holds, hidden files aside."""
    return sorted(x.name for x in folder.iterdir() if not x.name.startswith("."))


def records(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_summary_for_people(run):
    code, out, err = run(TEXTS[0], "so sad")
    assert code == 0 and err == ""
    assert "\033[" not in out, "colours only on a terminal"
    for name in TASKS:
        assert name in out
    assert "8 dimensions:" in out and out.count("sentiment") == 2


def test_entities_are_shown_in_their_places_and_colours_only_where_asked():
    entities = [
        {"entity_group": "PER", "score": 0.987, "word": "Tim", "start": 0, "end": 3},
        {"entity_group": "LOC", "score": 0.5, "word": "Paris", "start": 10, "end": 15},
    ]
    result = {"row": 0, "text": PARIS, "error": None, "entities": {"ner": entities}}
    assert annotate.summary(result, colour=False) == "ner         [Tim PER 0.99] loves [Paris LOC 0.50]."
    assert "\033[35m[Tim PER 0.99]\033[0m" in annotate.summary(result, colour=True)


def test_json_lines_hold_what_the_pipeline_gives(run, pipe):
    code, out, err = run(TEXTS[0], "", "--json")
    found = records(out)
    assert code == 0 and err == "" and [x["row"] for x in found] == [0, 1] and found[0]["text"] == TEXTS[0]
    expected = pipe(TEXTS[0])
    assert found[0]["sentence_embedding"] == pytest.approx(expected["sentence_embedding"].tolist(), abs=1e-5)
    assert found[0]["labels"]["sentiment"]["label"] == expected["labels"]["sentiment"]["label"]
    spans = [[(x["entity_group"], x["start"], x["end"]) for x in y["entities"]["ner"]] for y in (found[0], expected)]
    assert spans[0] == spans[1]


def test_tasks_and_embedding_can_be_left_out(run):
    _, out, _ = run(PARIS, "--json", "--tasks", "ner", "--no-embedding", "--batch-tokens", "64")
    assert set(records(out)[0]) == {"row", "text", "entities"}
    _, out, _ = run("--tasks", "ner,rating", PARIS, "--json")
    assert set(records(out)[0]) == {"row", "text", "entities", "labels", "sentence_embedding"}


ROWS = ["Tim loves Paris.", "", "mau\u00f1ana, 😀 ok", 'quoted "text", with comma']


def write_input(path, file_format):
    if file_format == "parquet":
        pq.write_table(pa.table({"id": range(len(ROWS)), "review": ROWS}), path)
    elif file_format == "jsonl":
        path.write_text("".join(json.dumps({"id": i, "review": x}) + "\n" for i, x in enumerate(ROWS)))
    elif file_format == "csv":
        quoted = ['"' + x.replace('"', '""') + '"' for x in ROWS]
        path.write_text("id,review\n" + "".join(f"{i},{x}\r\n" for i, x in enumerate(quoted)), newline="")
    else:
        path.write_text("\n".join(ROWS) + "\n")


@pytest.mark.parametrize("file_format", ["csv", "jsonl", "parquet", "txt"])
@pytest.mark.parametrize("output", ["jsonl", "parquet"])
def test_every_file_format_in_and_out_gives_the_same_rows(run, pipe, tmp_path, file_format, output):
    write_input(tmp_path / f"in.{file_format}", file_format)
    column = [] if file_format == "txt" else ["--text-column", "review"]
    code, out, err = run("--input", tmp_path / f"in.{file_format}", *column, "--output", tmp_path / f"out.{output}")
    assert code == 0 and out == "" and ("4/4" in err or "4 texts" in err), err
    if output == "jsonl":
        found = records((tmp_path / "out.jsonl").read_text())
    else:
        found = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [x["row"] for x in found] == [0, 1, 2, 3] and [x["text"] for x in found] == ROWS
    for result, expected in zip(found, pipe(ROWS), strict=True):
        assert result.get("error") is None
        assert result["sentence_embedding"] == pytest.approx(expected["sentence_embedding"].tolist(), abs=1e-5)
        assert result["labels"]["topics"]["labels"] == expected["labels"]["topics"]["labels"]
        assert result["labels"]["rating"]["values"]["stars"] == pytest.approx(
            expected["labels"]["rating"]["values"]["stars"], abs=1e-3
        )
        assert [x["word"] for x in result["entities"]["pos"]] == [x["word"] for x in expected["entities"]["pos"]]
    assert names(tmp_path) == sorted([f"in.{file_format}", f"out.{output}"])


def test_a_bad_row_keeps_its_place_and_its_reason_and_costs_no_other_row(run, tmp_path):
    lines = [
        '{"text": "one"}',
        "not json",
        '{"text": null}',
        '{"other": 1}',
        '{"text": "\\ud83d"}',
        "[1]",
        '{"text": "two"}',
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    for output in ("out.jsonl", "out.parquet"):
        code, _, err = run("--input", tmp_path / "in.jsonl", "--output", tmp_path / output)
        assert code == 0 and "5 rows could not be annotated" in err
    found = records((tmp_path / "out.jsonl").read_text())
    assert [x["row"] for x in found] == list(range(7))
    assert [x.get("text") for x in found] == ["one", None, None, None, None, None, "two"]
    reasons = ["row 1 is not valid JSON", "row 2 is None (NoneType), not a text", "row 3 is not an object with the field 'text'",
               "row 4 is no valid Unicode", "row 5 is not an object"]  # fmt: skip
    for result, reason in zip(found[1:6], reasons, strict=True):
        assert result["error"].startswith(reason) and "labels" not in result
    table = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [x["error"] for x in table] == [x.get("error") for x in found] and table[6]["labels"]["sentiment"]["label"]


def test_bytes_that_are_no_utf8_cost_only_their_row(run, tmp_path):
    (tmp_path / "in.csv").write_bytes(b"text\nfine\nbro\xffken\nfine too\n")
    _, out, err = run("--input", tmp_path / "in.csv", "--no-embedding", "--tasks", "sentiment")
    assert ["error" in x for x in records(out)] == [False, True, False] and "1 rows" in err


def test_standard_input_is_read_as_text_lines_or_as_told(run):
    code, out, err = run("--input", "-", "--no-embedding", "--tasks", "ner", stdin="one\ntwo é\n".encode())
    assert code == 0 and [x["text"] for x in records(out)] == ["one", "two é"] and err == ""
    _, out, _ = run("--input", "-", "--input-format", "jsonl", stdin=b'{"text": "a\\nb"}\n')
    assert [x["text"] for x in records(out)] == ["a\nb"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give texts or --input FILE, one of the two"),
        (["x", "--input", "y.csv"], "give texts or --input FILE, one of the two"),
        (["x", "--output", "out.csv"], "the name must end in .jsonl or .parquet"),
        (["--input", "in.tsv"], "the suffix is unknown; name the format with --input-format (csv, jsonl, parquet, text)"),
        (["--input", "-", "--text-column", "a"], "--text-column needs an input with columns"),
        (["x", "--output", "no/such/out.jsonl"], "the folder no/such does not exist"),
        (["x", "--tasks", "irony"], r"tasks holds ['irony']; this model's tasks are: sentiment"),
        (["--input", "no-such-file.csv"], "--input no-such-file.csv cannot be read"),
        (["x", "--model", "/no/such/folder"], "--model /no/such/folder cannot be loaded"),
        (["x", "--batch-tokens", "0"], "batch_tokens is 0"),
        (["x", "--output", "tests"], "the name must end in .jsonl or .parquet"),
        (["x", "--resume"], "--resume and --num-workers need a file to write; name it with --output"),
        (["x", "--num-workers", "2"], "--resume and --num-workers need a file to write; name it with --output"),
        (["x", "--num-workers", "0"], "--num-workers is 0; it must be at least 1"),
        (
            ["x", "--backend", "onnx", "--dtype", "bfloat16"],
            "--dtype bfloat16 is for PyTorch; leave it out, or leave out --ba",
        ),
        (["x", "--output", "out.jsonl", "--resume"], "--resume needs --input FILE"),
        (["--input", "in.jsonl", "--output", "in.jsonl"], "--output in.jsonl would overwrite the input"),
        (["x", "--engine", "ray"], "--engine ray needs a folder of files as --input and a folder as --output"),
        (["--engine", "ray", "--input", ".", "--output", "o", "--overwrite"], "--overwrite is for files"),
        (["--engine", "ray", "--input", ".", "--output", "tests"], "--output tests is not empty"),
    ],
)
def test_mistakes_on_the_command_line_are_named(run, arguments, message):
    code, out, err = run(*arguments)
    assert code not in (0, None) and message in err and "Traceback" not in err and out == ""


def test_a_missing_column_lists_the_columns_there_are(run, tmp_path):
    write_input(tmp_path / "in.csv", "csv")
    write_input(tmp_path / "in.parquet", "parquet")
    for name in ("in.csv", "in.parquet"):
        code, _, err = run("--input", tmp_path / name, "--output", tmp_path / "out.jsonl")
        assert code != 0 and "--text-column text: the file has the columns id, review" in err
        assert sorted(x.name for x in tmp_path.iterdir()) == ["in.csv", "in.parquet"], "nothing half-written stays"


def test_endings_count_in_any_case_and_what_is_no_text_is_refused(run, tmp_path):
    write_input(tmp_path / "IN.CSV", "csv")
    _, out, _ = run("--input", tmp_path / "IN.CSV", "--text-column", "review", "--tasks", "rating", "--no-embedding")
    assert [x["text"] for x in records(out)] == ROWS
    (tmp_path / "wide.txt").write_text("one\ntwo\n", "utf-16")
    code, out, err = run("--input", tmp_path / "wide.txt")
    assert code != 0 and "is compressed or UTF-16" in err and out == ""


def test_json_nested_beyond_reason_costs_only_its_row(run, tmp_path):
    (tmp_path / "in.jsonl").write_text("[" * 100_000 + '\n{"text": "fine"}\n')
    code, out, err = run("--input", tmp_path / "in.jsonl", "--tasks", "rating", "--no-embedding")
    assert code == 0 and ["error" in x for x in records(out)] == [True, False] and "1 rows" in err


def test_a_console_of_few_characters_still_shows_the_summary(run, monkeypatch):
    for options, expected in (((), "8 dimensions"), (("--json",), "love 😀")):
        console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", console)
        assert run("love 😀", *options)[0] == 0
        console.flush()
        assert expected in console.buffer.getvalue().decode("utf-8")


def test_a_broken_parquet_file_is_named(run, tmp_path):
    (tmp_path / "in.parquet").write_bytes(b"PAR1 no")
    code, _, err = run("--input", tmp_path / "in.parquet")
    assert code != 0 and "in.parquet" in err and "Traceback" not in err


def test_an_existing_output_is_kept_unless_told_otherwise(run, tmp_path):
    write_input(tmp_path / "in.txt", "txt")
    (tmp_path / "out.jsonl").write_text("precious")
    code, _, err = run("--input", tmp_path / "in.txt", "--output", tmp_path / "out.jsonl")
    assert code != 0 and "exists" in err and (tmp_path / "out.jsonl").read_text() == "precious"
    code, _, _ = run("--input", tmp_path / "in.txt", "--output", tmp_path / "out.jsonl", "--overwrite")
    assert code == 0 and len(records((tmp_path / "out.jsonl").read_text())) == 4


def unfinished_run(run, tmp_path, monkeypatch, *arguments, error: BaseException | None = None) -> tuple[Any, str]:
    """Writes two of four chunks to out.jsonl, then fails; returns exit code and message."""
    monkeypatch.setattr(sources, "CHUNK_ROWS", 1)
    write_input(tmp_path / "in.jsonl", "jsonl")
    real, calls = bulk_run.write_part, 0

    def write_part(*given):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise error or OSError(errno.ENOSPC, "No space left on device")
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(bulk_run, "write_part", write_part)
        options = ("--input", tmp_path / "in.jsonl", "--text-column", "review", "--output", tmp_path / "out.jsonl")
        code, _, err = run(*options, *arguments)
    return code, err


OPTIONS = ("--text-column", "review", "--tasks", "rating,ner")


def test_a_full_disk_costs_nothing_that_is_written(run, tmp_path, monkeypatch):
    code, err = unfinished_run(run, tmp_path, monkeypatch, *OPTIONS)
    assert code == 1 and "No space left" in err and "are kept in" in err and "Continue with --resume." in err
    files = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    code, _, err = run(*files, *OPTIONS)
    assert code == 2 and "holds a run that was stopped; continue it with --resume, or start again with --overwrite" in err
    code, _, err = run(*files, *OPTIONS, "--resume")
    assert code == 0 and "4/4" in err
    run("--input", tmp_path / "in.jsonl", "--output", tmp_path / "whole.jsonl", *OPTIONS)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert names(tmp_path) == ["in.jsonl", "out.jsonl", "whole.jsonl"]
    code, _, err = run(*files, *OPTIONS, "--resume")
    assert code == 0 and "out.jsonl is complete; there was nothing left to compute" in err


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("call", [0, 1, 4, 9])
def test_a_disk_that_fills_up_anywhere_is_survived(run, tmp_path, monkeypatch, step, call):
    monkeypatch.setattr(sources, "CHUNK_ROWS", 1)
    write_input(tmp_path / "in.jsonl", "jsonl")
    arguments = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", *OPTIONS)
    real, calls = getattr(os, step), 0

    def full(*given):
        nonlocal calls
        calls += 1
        if calls > call:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(parts.os, step, full)
        code, _, err = run(*arguments)
    if code == 0:  # there are fewer such calls
        assert call == 9 and step == "replace"
        return
    assert "No space left" in err and "Traceback" not in err and not (tmp_path / "out.jsonl").exists()
    assert not list(tmp_path.glob("**/*.tmp")), "what cannot be kept takes no room"
    assert run(*arguments, "--resume")[0] == 0
    assert [x["text"] for x in records((tmp_path / "out.jsonl").read_text())] == ROWS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "rating"], "--tasks was ['rating', 'ner'] and is ['rating']"),
        (["--text-column", "id"], "--text-column was 'review' and is 'id'"),
        (["--no-embedding"], "--no-embedding was False and is True"),
        (["--batch-tokens", "7"], "--batch-tokens was None and is 7"),
        (["--num-workers", "2"], "--num-workers was 1 and is 2"),
        (["--input", "other.jsonl"], "sha256 of --input's rows was"),
    ],
)
def test_resuming_with_other_settings_is_refused_and_says_which(run, tmp_path, monkeypatch, arguments, message):
    unfinished_run(run, tmp_path, monkeypatch, *OPTIONS)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.jsonl").write_text((tmp_path / "in.jsonl").read_text().replace("Paris", "Rome"))
    files = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    code, _, err = run(*files, *OPTIONS, "--resume", *arguments)
    assert code == 1 and message in err and "Use the input and settings of the first run, or start a new one" in err
    assert len(list((tmp_path / "out.jsonl.partial").glob("0*.jsonl"))) == 2, "nothing is lost"
    assert run(*files, *OPTIONS, "--overwrite", *arguments[:0])[0] == 0
    assert len(records((tmp_path / "out.jsonl").read_text())) == 4


def test_another_model_is_another_setting(run, release, tmp_path, monkeypatch):
    unfinished_run(run, tmp_path, monkeypatch, *OPTIONS)
    other = Path(shutil.copytree(release, tmp_path / "other"))
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    files = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    code, _, err = run(*files, *OPTIONS, "--resume", "--model", other)
    assert code == 1 and "content of --model was" in err
    same = shutil.copytree(release, tmp_path / "same")
    assert run(*files, *OPTIONS, "--resume", "--model", same)[0] == 0


def test_a_complete_output_is_only_called_so_if_input_and_settings_are_those_that_made_it(run, tmp_path):
    write_input(tmp_path / "in.jsonl", "jsonl")
    (tmp_path / "other.jsonl").write_text((tmp_path / "in.jsonl").read_text().replace("Paris", "Rome"))
    output, made = ("--output", tmp_path / "out.jsonl"), tmp_path / "out.jsonl"
    files = ("--input", tmp_path / "in.jsonl", *output)
    assert run(*files, *OPTIONS)[0] == 0
    record, content = tmp_path / ".out.jsonl.run.json", made.read_bytes()
    assert json.loads(record.read_text())["rows of --input"] == 4
    for changed, difference in [
        (("--input", tmp_path / "other.jsonl", *OPTIONS), "sha256 of --input's rows was"),
        (("--input", tmp_path / "in.jsonl", *OPTIONS, "--tasks", "ner"), "--tasks was ['rating', 'ner'] and is ['ner']"),
    ]:
        code, _, err = run(*output, *changed, "--resume")
        assert code == 1 and difference in err and made.read_bytes() == content
    moved = (tmp_path / "in.jsonl").rename(tmp_path / "moved.jsonl")
    code, _, err = run("--input", moved, *output, *OPTIONS, "--resume")
    assert code == 0 and "is complete" in err and made.read_bytes() == content, "the content counts, not the name"
    made.write_text("of another program")
    code, _, err = run("--input", moved, *output, *OPTIONS, "--resume")
    assert code == 1 and "sha256 of --output was" in err
    record.unlink()
    code, _, err = run("--input", moved, *output, *OPTIONS, "--resume")
    assert code == 1 and "which says how it was made, does not" in err and made.read_text() == "of another program"
    assert names(tmp_path) == ["moved.jsonl", "other.jsonl", "out.jsonl"]


def test_an_input_that_changed_since_the_run_was_stopped_is_refused_whatever_its_date_says(run, tmp_path, monkeypatch):
    unfinished_run(run, tmp_path, monkeypatch, *OPTIONS)
    source = tmp_path / "in.jsonl"
    date = source.stat()
    source.write_text(source.read_text().replace("Paris", "Milan"))
    os.utime(source, ns=(date.st_atime_ns, date.st_mtime_ns))
    assert source.stat().st_size == date.st_size
    code, _, err = run("--input", source, "--output", tmp_path / "out.jsonl", *OPTIONS, "--resume")
    assert code == 1 and "sha256 of --input's rows was" in err and not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("change", ["shrinks", "grows", "other rows"])
def test_an_input_that_changes_during_the_run_gives_no_output(run, tmp_path, monkeypatch, suffix, change):
    source, lines = tmp_path / "in.txt", [f"text {number:05}\n" for number in range(3000)]  # more than is read ahead
    source.write_text("".join(lines))
    changed = {"shrinks": lines[:1482], "grows": [*lines, "more\n"], "other rows": [*lines[:2990], *lines[:10]]}[change]
    monkeypatch.setattr(sources, "CHUNK_ROWS", 50)
    monkeypatch.setattr(annotate, "Bar", type("Bar", (annotate.Bar,), {"add": lambda *_: overwrite(source, changed)}))
    options = ("--input", source, "--output", tmp_path / f"out.{suffix}", "--tasks", "rating", "--no-embedding")
    code, _, err = run(*options)
    assert code == 1 and "--input changed during the run" in err and "sha256 of --input's rows was" in err
    assert (f"rows of --input was 3000 and is {len(changed)}" in err) == (len(changed) != 3000)
    assert names(tmp_path) == ["in.txt", f"out.{suffix}.partial"]
    code, _, err = run(*options, "--resume")
    assert code == 1 and "sha256 of --input's rows was" in err
    monkeypatch.setattr(annotate.Bar, "add", lambda *_: None)
    overwrite(source, lines)
    assert run(*options, "--resume")[0] == 0
    resumed = (tmp_path / f"out.{suffix}").read_bytes()
    assert run(*options, "--overwrite")[0] == 0
    assert resumed == (tmp_path / f"out.{suffix}").read_bytes(), "no part of other rows is joined to them"


def overwrite(path: Path, lines: list[str]) -> None:
    """Writes a file in place, as whoever has it open sees it."""
    with open(path, "r+") as stream:
        stream.write("".join(lines))
        stream.truncate()


@pytest.mark.parametrize("options", [[], ["--overwrite"], ["--resume"]])
def test_a_folder_of_somebody_else_is_not_taken_for_ours(run, tmp_path, options):
    write_input(tmp_path / "in.txt", "txt")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/settings.json").write_text("{}")
    for place in ("out.jsonl.partial", "out.parquet.partial"):
        (tmp_path / place).symlink_to("precious") if "jsonl" in place else shutil.copytree(
            tmp_path / "precious", tmp_path / place
        )
        output = tmp_path / place.removesuffix(".partial")
        code, _, err = run("--input", tmp_path / "in.txt", "--output", output, *options)
        assert code == 2 and f"{place}, which is not a folder that annotate.py made" in err
        assert names(tmp_path / place) == ["settings.json"] and not output.exists()


def test_a_parquet_string_that_is_not_utf8_costs_only_its_row(run, tmp_path):
    column = pa.array([b"one", b"bro\xffken", b"two"]).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "in.parquet")
    options = ("--input", tmp_path / "in.parquet", "--tasks", "rating", "--output")
    for output in (tmp_path / "out.parquet", tmp_path / "out.jsonl"):
        code, _, err = run(*options, output)
        assert code == 0 and "1 rows could not be annotated" in err
        assert "row 1 is not valid UTF-8" in output.with_name(output.name + ".rejects.jsonl").read_text()
    assert [x["text"] for x in pq.read_table(tmp_path / "out.parquet").to_pylist()] == ["one", None, "two"]


def test_the_input_is_never_written_over(run, tmp_path):
    source = tmp_path / "out.jsonl.rejects.jsonl"
    source.write_text('{"text": "one"}\n')
    (tmp_path / "link.jsonl").symlink_to(source)
    for output in (tmp_path / "out.jsonl", source, tmp_path / "link.jsonl"):
        code, _, err = run("--input", source, "--output", output, "--overwrite")
        assert code == 2 and "would overwrite the input" in err and source.read_text() == '{"text": "one"}\n'


def test_rejects_are_listed_with_row_and_reason(run, tmp_path):
    long = json.dumps({"text": "a" * 10_000_000})
    (tmp_path / "in.jsonl").write_text('{"text": "one"}\nnot json\n' + long + '\n{"text": "two"}\n')
    command = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.parquet", "--tasks", "rating")
    code, _, err = run(*command)
    assert code == 0 and "2 rows could not be annotated; see" in err and "out.parquet.rejects.jsonl" in err
    found = records((tmp_path / "out.parquet.rejects.jsonl").read_text())
    assert [x["row"] for x in found] == [1, 2] and found[0]["reason"].startswith("row 1 is not valid JSON")
    assert found[1]["reason"] == "row 2 has 10000000 characters, more than 1000000; divide the text"
    assert [x["text"] for x in pq.read_table(tmp_path / "out.parquet").to_pylist()] == ["one", None, None, "two"]
    (tmp_path / "out.parquet").unlink()
    code, _, err = run(*command)
    assert code == 2 and "out.parquet.rejects.jsonl exists" in err
    (tmp_path / "in.jsonl").write_text('{"text": "one"}\n')
    assert run(*command, "--overwrite")[0] == 0 and not (tmp_path / "out.parquet.rejects.jsonl").exists()


def test_a_column_that_no_row_has_is_an_error_and_no_file_of_rejects(run, tmp_path):
    write_input(tmp_path / "in.jsonl", "jsonl")
    code, _, err = run("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    assert code == 1 and "none of its 4 rows can be read; the last is not an object with the field 'text'" in err
    assert [x.name for x in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_csv_that_breaks_off_costs_its_last_row(run, tmp_path):
    (tmp_path / "in.csv").write_text('id,text\n1,"one"\n2\n3,"thr')
    code, out, _ = run("--input", tmp_path / "in.csv", "--tasks", "rating", "--no-embedding")
    assert code == 0 and [x.get("error") for x in records(out)] == [
        None,
        "row 1 has 1 fields, but the header has 2; quote fields that hold commas",
        "row 2 ends inside quotes: the file is cut off, or a quote is missing",
    ]
    (tmp_path / "in.csv").write_text('id,text\n1,"one\ntwo"')
    _, out, _ = run("--input", tmp_path / "in.csv", "--tasks", "rating", "--no-embedding")
    assert [x["text"] for x in records(out)] == ["one\ntwo"], "no newline at the end of the file is no fault"


def test_a_parquet_file_that_breaks_off_is_refused_before_anything_is_computed(run, tmp_path):
    table = pa.table({"text": [f"{row} " + "love " * 8 for row in range(40)]})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=10, compression="none", use_dictionary=False)
    whole = (tmp_path / "in.parquet").read_bytes()
    arguments = ("--input", tmp_path / "in.parquet", "--output", tmp_path / "out.jsonl", "--tasks", "rating")
    (tmp_path / "in.parquet").write_bytes(whole[: len(whole) // 2])
    code, _, err = run(*arguments)
    assert code == 1 and "in.parquet cannot be read as parquet" in err and "Traceback" not in err
    place = pq.ParquetFile(io.BytesIO(whole)).metadata.row_group(2).column(0).data_page_offset
    (tmp_path / "in.parquet").write_bytes(whole[:place] + b"\xff" * 40 + whole[place + 40 :])
    code, _, err = run(*arguments)
    assert code == 1 and "in.parquet cannot be read as parquet" in err and "Traceback" not in err
    assert names(tmp_path) == ["in.parquet"]


def test_a_pipe_cannot_be_resumed(run, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    options = ("--input", tmp_path / "pipe", "--output", tmp_path / "o.jsonl", "--input-format=text")
    code, _, err = run(*options, "--resume")
    assert code == 2 and "standard input and pipes cannot be read again" in err
    Thread(target=(tmp_path / "pipe").write_text, args=["one\ntwo\n"]).start()
    assert run(*options)[0] == 0 and [x["text"] for x in records((tmp_path / "o.jsonl").read_text())] == ["one", "two"]


def test_an_onnx_backend_runs_on_the_cpu_alone(run):
    code, _, err = run(PARIS, "--backend", "onnx-int8", "--device", "cuda:0")
    assert code == 2 and "--device cuda:0 is for PyTorch; --backend onnx-int8 runs on the CPU" in err


def test_bfloat16_gives_the_same_records_with_fewer_digits(run):
    (half,), (full,) = (records(run(PARIS, "--json", *dtype)[1]) for dtype in (["--dtype", "bfloat16"], []))
    assert half.keys() == full.keys() and half["entities"].keys() == full["entities"].keys()
    assert half["sentence_embedding"] != full["sentence_embedding"] == pytest.approx(half["sentence_embedding"], abs=0.05)
