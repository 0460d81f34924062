"""Files in parts: killed, stopped, or with several processes, the output is that of a run left alone."""

import contextlib
import errno
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

import annotate
from bulk import sources
from bulk.annotator import Annotator, Settings
from bulk.annotator import annotate as annotate_chunk
from bulk.parts import Output
from bulk.run import Progress, annotate_file
from bulk.sources import InputError, Source
from tests.conftest import TEXTS

WORDS = ["paris", "apple", "tim", "cook", "love", "store", "sad", "Rome", "closed", "all", "day"]
# Real processes that start in no time: copies of one that has imported everything and computed nothing.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.test_bulk_run"])


@pytest.fixture(autouse=True)
def chunks_as_they_are(monkeypatch):
    """Undoes what a test does to the size of chunks."""
    monkeypatch.setattr(sources, "CHUNK_ROWS", sources.CHUNK_ROWS)


def write_texts(path: Path, rows: int) -> Path:
    """Writes generated short texts; one row in fifty is bad."""
    draw = random.Random(0)
    with open(path, "w") as stream:
        for row in range(rows):
            text = " ".join(draw.choices(WORDS, k=draw.randint(1, 12)))
            stream.write("no json\n" if row % 50 == 25 else json.dumps({"text": text}) + "\n")
    return path


def load(release: Path, **settings: Any) -> Annotator:
    """Returns the tiny model, and makes chunks small."""
    sources.CHUNK_ROWS = 8
    return Annotator(Settings(str(release), device="cpu", threads=1, **settings))


def write(annotator: Annotator, source: Path, output: Path, progress: Any = None, **options: Any) -> int:
    rows = Source(str(source), "jsonl", "text").rows()
    return annotate_file(rows, Output(output), annotator, {}, progress or Progress(), **options)


def contents(output: Path) -> tuple[bytes, bytes]:
    """Returns the bytes of output and rejects, and checks that nothing else is left."""
    assert not Output(output).partial.exists()
    return output.read_bytes(), Output(output).rejects.read_bytes()


def elsewhere(function: Callable[..., None], *arguments: Any) -> None:
    """Runs a test's function in a process that may fork, which one with threads may not."""
    process = PROCESSES.Process(target=function, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0, "see standard error"


def fork(function: Callable[[], Any], cpu_seconds: float | None = None) -> int:
    """Runs a function in a copy of this process, killed once it has worked so long; returns the exit code, -9 if killed."""
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    process = psutil.Process(child)
    if cpu_seconds is not None:
        while sum(process.cpu_times()[:2]) < cpu_seconds and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.002)
        process.kill()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def cpu_seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def kill_at_random_moments(release: Path, folder: Path) -> None:
    annotator = load(release)
    source = write_texts(folder / "in.jsonl", 160)
    draw, whole, killed, resumed = random.Random(1), {}, 0, 0
    for moment in range(80):  # a run that other work on the machine made shorter than the first is done before its moment
        suffix = (".parquet", ".jsonl")[moment % 2]
        if suffix not in whole:
            begin = cpu_seconds_of_children()
            assert fork(partial(write, annotator, source, folder / f"whole{suffix}")) == 0
            whole[suffix] = contents(folder / f"whole{suffix}"), cpu_seconds_of_children() - begin
        expected, seconds = whole[suffix]
        output = folder / f"{moment}{suffix}"
        run = partial(write, annotator, source, output, resume=True)
        killed += fork(run, draw.uniform(0, seconds)) == -signal.SIGKILL
        resumed += len(list(Output(output).partial.glob("0*" + suffix))) > 0
        assert fork(run) == 0
        assert contents(output) == expected, moment
        if killed >= 20 and resumed >= 8:  # on a busy machine many moments lie before the first part
            break
    assert killed >= 20 and resumed >= 8, (killed, resumed)


@pytest.mark.slow
def test_killed_at_twenty_random_moments_it_goes_on_to_the_same_bytes(release, tmp_path):
    elsewhere(kill_at_random_moments, release, tmp_path)


def kill_before_step(step: int) -> None:
    """Makes this process kill itself before its n-th change of a file or folder, n being `step`."""

    def counted(change: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal step
            step -= 1
            if step < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*arguments, **options)

        return call

    for module, name in [(os, "mkdir"), (os, "fsync"), (os, "replace"), (os, "unlink"), (os, "rmdir"), (Path, "unlink")]:
        setattr(module, name, counted(getattr(module, name)))


def kill_at_every_step(release: Path, folder: Path) -> None:
    annotator = load(release, tasks=["rating"])
    source = write_texts(folder / "in.jsonl", 30)
    assert fork(partial(write, annotator, source, folder / "whole.jsonl")) == 0
    expected = contents(folder / "whole.jsonl")
    step, status = 0, -signal.SIGKILL
    while status == -signal.SIGKILL:
        output = folder / f"{step}.jsonl"
        output.write_text("of an earlier run")  # which stays until there is a better one

        def killed_run(step=step, output=output):
            kill_before_step(step)
            write(annotator, source, output)

        status = fork(killed_run)
        assert output.read_bytes() in (b"of an earlier run", expected[0])
        resume = Output(output).is_unfinished() or output.read_bytes() == expected[0]
        assert fork(partial(write, annotator, source, output, resume=resume)) == 0
        assert contents(output) == expected, step
        step += 1
    assert status == 0 and step > 30, (status, step)


@pytest.mark.slow
def test_killed_before_any_change_of_a_file_it_goes_on_to_the_same_bytes(release, tmp_path):
    elsewhere(kill_at_every_step, release, tmp_path)


def run_until_signal(release: Path, folder: Path, number: int) -> None:
    """Runs the command line; the tenth chunk's end is when the signal comes."""

    class Bar(annotate.Bar):
        def add(self, rows: int, tokens: int) -> None:
            super().add(rows, tokens)
            if self.rows == 80:
                os.kill(os.getpid(), number)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
    annotate.Bar = Bar
    sources.CHUNK_ROWS = 8
    command = ["--model", release, "--device", "cpu", "--input", folder / "in.jsonl", "--output", folder / "out.jsonl"]
    sys.argv = ["annotate.py", *map(str, command)]
    with open(folder / "stderr", "w") as stream, contextlib.redirect_stderr(stream):
        annotate.main()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_it_at_once_and_the_message_says_how_to_go_on(release, tmp_path, number, code):
    write_texts(tmp_path / "in.jsonl", 160)
    process = PROCESSES.Process(target=run_until_signal, args=(release, tmp_path, number))
    process.start()
    process.join()
    assert process.exitcode == code
    said = (tmp_path / "stderr").read_text()
    assert "annotate.py: stopped. Finished parts are kept in" in said and "Continue with --resume." in said
    assert "50%" in said and "texts/s" in said and "tokens/s" in said and "Traceback" not in said
    names = sorted(
        x.name for x in (tmp_path / "out.jsonl.partial").iterdir() if x.name not in ("annotate.lock", "settings.json")
    )
    assert [x[:8] for x in names if x.endswith(".jsonl")] == [f"{part:08}" for part in range(10)]
    assert not any(x.endswith(".tmp") for x in names)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_order_duplicates_and_batch_budgets_change_no_record(release, tmp_path, suffix):
    texts = [*TEXTS, *TEXTS[:2], "love " * 60]
    order = [3, 6, 0, 2, 5, 1, 4]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in texts))
    (tmp_path / "shuffled.jsonl").write_text("".join(json.dumps({"text": texts[i]}) + "\n" for i in order))

    def records(name: str, chunk_rows: int, **settings: Any) -> list[dict[str, Any]]:
        annotator, output = load(release, **settings), tmp_path / f"out{suffix}"
        sources.CHUNK_ROWS = chunk_rows
        write(annotator, tmp_path / name, output)
        return [json.loads(x) for x in output.open()] if suffix == ".jsonl" else pq.read_table(output).to_pylist()

    expected = records("in.jsonl", 100)
    for found in (records("in.jsonl", 100, batch_tokens=1), records("in.jsonl", 2, batch_tokens=10_000)):
        for one, other in zip(expected, found, strict=True):
            assert_same(one, other)
    for row, found in zip(order, records("shuffled.jsonl", 3), strict=True):
        assert_same({**expected[row], "row": found["row"]}, found)
    for first, second in ((0, 4), (1, 5)):
        assert_same({**expected[first], "row": second}, expected[second])


def assert_same(one: Any, other: Any) -> None:
    """Checks that two records are equal, but for rounding."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_same(one[name], other[name])
    elif isinstance(one, list) and one and isinstance(one[0], float):
        np.testing.assert_allclose(one, other, atol=2e-5)
    elif isinstance(one, list):
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    else:
        assert one == (pytest.approx(other, abs=1e-4) if isinstance(one, float) else other)


def test_a_text_that_the_model_fails_on_is_rejected_alone_and_a_broken_model_is_no_reject():
    def run(texts: list[str]) -> list[dict[str, Any]]:
        if "bad" in texts:
            raise RuntimeError("out of memory")
        return [{"length": len(text)} for text in texts]

    results = annotate_chunk([(7, "one", None), (8, "bad", None), (9, None, "is None")], run)
    assert [x.get("length") for x in results] == [3, None, None]
    assert [x["error"] for x in results] == [
        None, "row 8 cannot be annotated: RuntimeError: out of memory", "row 9 is None",
    ]  # fmt: skip
    with pytest.raises(ZeroDivisionError):
        annotate_chunk([(0, "one", None)], lambda texts: [1 / 0])


def start_with_others(release: Path, source: Path, output: Path, start: Any, outcomes: Any) -> None:
    annotator = load(release, tasks=["rating"])
    start.wait()
    try:
        outcomes.put(str(write(annotator, source, output)))
    except InputError as error:
        outcomes.put(str(error))


def test_of_runs_started_together_one_writes_the_output_and_the_others_say_so(release, tmp_path):
    source = write_texts(tmp_path / "in.jsonl", 3000)
    start, outcomes = PROCESSES.Barrier(3), PROCESSES.Queue()
    arguments = (release, source, tmp_path / "out.jsonl", start, outcomes)
    processes = [PROCESSES.Process(target=start_with_others, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    found = sorted(outcomes.get(timeout=300) for _ in processes)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert found[2] == "60" and all("another process is writing it" in x for x in found[:2])
    write(load(release, tasks=["rating"]), source, tmp_path / "alone.jsonl")
    assert contents(tmp_path / "out.jsonl") == contents(tmp_path / "alone.jsonl")


class Events(Progress):
    """Calls a function once, after so many chunks."""

    def __init__(self, chunks: int, function: Callable[[], None]) -> None:
        self.left, self.function = chunks, function

    def add(self, rows: int, tokens: int) -> None:
        super().add(rows, tokens)
        self.left -= 1
        if self.left == 0:
            self.function()


def test_a_worker_that_dies_is_named_and_costs_nothing_and_workers_share_the_weights(release, tmp_path):
    annotator, source = load(release), write_texts(tmp_path / "in.jsonl", 320)
    output, processes = tmp_path / "two.parquet", []

    def kill_one() -> None:
        workers = multiprocessing.active_children()
        processes.extend(psutil.Process(worker.pid) for worker in workers)
        assert len(workers) == 2
        weights = str(Output(output).partial / "weights")
        assert any(weights in Path(f"/proc/{worker.pid}/maps").read_text() for worker in workers), "one may still be loading"
        workers[0].kill()

    with pytest.raises(InputError, match="a worker process died") as caught:
        write(annotator, source, output, Events(3, kill_one), workers=2)
    assert "are kept in" in caught.value.__notes__[0] and psutil.wait_procs(processes, timeout=60)[1] == []
    done = len(list(Output(output).partial.glob("0*.parquet")))
    progress = Progress()
    write(annotator, source, output, progress, resume=True)
    assert 3 <= done < 40 and progress.rows == 320 - 8 * done
    write(annotator, source, tmp_path / "one.parquet")
    assert contents(output) == contents(tmp_path / "one.parquet")


def run_out_of_space(release: Path, folder: Path) -> None:
    """Lets files grow to fewer and fewer bytes, with which a real disk's `write` fails, then resumes without a limit."""
    source, failures = write_texts(folder / "in.jsonl", 160), 0
    for suffix in (".jsonl", ".parquet"):
        annotator = load(release)
        write(annotator, source, folder / f"whole{suffix}")
        largest = (folder / f"whole{suffix}").stat().st_size
        for limit in (largest - 1, largest // 2, 3000, 300, 0):
            output = folder / f"{limit}{suffix}"
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                write(annotator, source, output)
            except OSError as error:
                failures += error.errno == errno.EFBIG
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            assert not output.exists() and not list(folder.rglob("*.tmp"))
            write(annotator, source, output, resume=True)
            assert contents(output) == contents(folder / f"whole{suffix}"), (suffix, limit)
    assert failures == 10, failures


def test_a_disk_without_space_costs_nothing_that_was_written(release, tmp_path):
    elsewhere(run_out_of_space, release, tmp_path)


def run_with_workers(release: Path, source: Path, output: Path, pids: Any) -> None:
    write(load(release), source, output, Events(2, lambda: pids.put(workers_of_this_process())), workers=2)


def workers_of_this_process() -> list[int]:
    return [process.pid for process in multiprocessing.active_children()]


@pytest.mark.slow
def test_workers_end_with_their_parent(release, tmp_path):
    source, pids = write_texts(tmp_path / "in.jsonl", 2000), PROCESSES.Queue()
    process = PROCESSES.Process(target=run_with_workers, args=(release, source, tmp_path / "out.jsonl", pids))
    process.start()
    workers = [psutil.Process(pid) for pid in pids.get(timeout=300)]
    process.kill()
    process.join()
    assert len(workers) == 2 and psutil.wait_procs(workers, timeout=60)[1] == []


def measure_memory(release: Path, folder: Path, rows: int, found: Any) -> None:
    annotator = load(release, tasks=["sentiment"], embedding=False)
    sources.CHUNK_ROWS = 1024
    process, resident = psutil.Process(), []

    class Memory(Progress):
        def add(self, rows: int, tokens: int) -> None:
            resident.append(process.memory_info().rss)

    write(annotator, write_texts(folder / "in.jsonl", rows), folder / "out.parquet", Memory())
    resident.append(process.memory_info().rss)  # the parts are joined
    found.put(resident)


def test_memory_stays_flat(release, tmp_path):
    """A short stream, chunk by chunk."""
    rows, found = 16384, PROCESSES.Queue()
    process = PROCESSES.Process(target=measure_memory, args=(release, tmp_path, rows, found))
    process.start()
    resident = [x / 2**20 for x in found.get()]
    process.join()
    assert max(resident) - resident[len(resident) // 4] < 40
    assert pq.read_metadata(tmp_path / "out.parquet").num_rows == rows
