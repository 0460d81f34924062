"""Files beside the output: only our own are ever removed, and only by the process that holds the lock."""

import multiprocessing
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from bulk.parts import LOCK, Output, to_json
from bulk.sources import InputError

PROCESSES = multiprocessing.get_context("spawn")


def foreign_folder(output: Output, kind: str, elsewhere: Path) -> Path:
    """Makes something of somebody else's where the parts would go; returns the file that must survive."""
    folder = elsewhere if kind.startswith("link") else output.partial
    folder.mkdir(exist_ok=True)
    if kind.startswith("link"):
        output.partial.symlink_to(elsewhere)
    names = {"file": "thesis.txt", "names like ours": "settings.json", "folder": "settings.json", "link": "thesis.txt"}
    if kind in ("folder", "link to ours"):
        (folder / LOCK).touch()
    if kind == "folder":
        folder = folder / "00000000-0123456789abcdef.jsonl"
        folder.mkdir()
    precious = folder / names.get(kind, "settings.json")
    precious.write_text("precious")
    return precious


@pytest.mark.parametrize("kind", ["file", "names like ours", "folder", "link", "link to ours"])
def test_a_folder_that_is_not_ours_is_refused_and_stays_as_it_is(tmp_path, kind):
    output = Output(tmp_path / "out.jsonl")
    precious = foreign_folder(output, kind, tmp_path / "elsewhere")
    before = sorted(tmp_path.rglob("*"))
    for attempt in (output.is_unfinished, output.locked().__enter__):
        with pytest.raises(InputError, match="not a folder that annotate.py made"):
            attempt()
    assert precious.read_text() == "precious" and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", ["a file", "a dangling link"])
def test_what_is_no_folder_is_refused(tmp_path, kind):
    output = Output(tmp_path / "out.jsonl")
    output.partial.write_text("precious") if kind == "a file" else output.partial.symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="not a folder that annotate.py made"), output.locked():
        pass
    assert os.path.lexists(output.partial) and not (tmp_path / "nowhere").exists()


def test_our_own_leftovers_are_removed(tmp_path):
    output = Output(tmp_path / "out.jsonl")
    output.partial.mkdir()
    for name in (
        LOCK,
        "00000000-0123456789abcdef.jsonl",
        "00000000-0123456789abcdef.rejects",
        "settings.json.12.tmp",
        "weights",
    ):
        (output.partial / name).touch()
    with output.locked():
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_will_do(tmp_path):
    output = Output(tmp_path / "out.jsonl")
    output.partial.mkdir()
    with output.locked():
        assert (output.partial / LOCK).exists()


def enter(output: Path, start: Any, entered: Any, inside: Any) -> None:
    """Takes the lock many times; while it holds it, nobody else may."""
    start.wait()
    for _ in range(200):
        try:
            with Output(output).locked():
                with inside.get_lock():
                    inside.value += 1
                (Output(output).partial / "weights").write_text("mine")
                with entered.get_lock():
                    entered.value += 1
                assert inside.value == 1 and (Output(output).partial / "weights").read_text() == "mine"
                with inside.get_lock():
                    inside.value -= 1
        except InputError as error:
            assert "another process is writing it" in str(error)


def test_processes_that_start_together_never_share_the_folder_or_remove_it_from_each_other(tmp_path):
    start, entered, inside = PROCESSES.Barrier(4), PROCESSES.Value("i", 0), PROCESSES.Value("i", 0)
    arguments = (tmp_path / "out.jsonl", start, entered, inside)
    processes = [PROCESSES.Process(target=enter, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0, 0] and entered.value >= 200
    assert list(tmp_path.iterdir()) == []


def test_who_comes_too_late_leaves_everything_in_place(tmp_path):
    output = Output(tmp_path / "out.jsonl")
    with output.locked():
        output.settings.touch()
        found = []

        def come_second() -> None:
            with pytest.raises(InputError, match="another process is writing it"), Output(output.path).locked():
                pass
            found.extend(x.name for x in output.partial.iterdir())

        thread = threading.Thread(target=come_second)
        thread.start()
        thread.join()
        assert sorted(found) == [LOCK, "settings.json"]


def test_six_significant_digits():
    assert to_json({"a": 1 / 3, "b": [2e-9 / 3], "c": None}) == '{"a": 0.333333, "b": [6.66667e-10]}'
