"""Folders by Ray: a worker that is killed costs nothing, and a second run computes only what is missing."""

import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import annotate
from bulk.annotator import Annotator, Settings
from bulk.parts import Output
from bulk.run import Progress, annotate_file
from bulk.sources import Source
from tests.test_bulk_run import elsewhere, write_texts

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # as the engine does, which imports Ray later than this file
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 – Ray's name; its workers give way to other work, here to the tests beside these
ray = pytest.importorskip("ray")
pytest.importorskip("ray.data")
OPTIONS = ["--device", "cpu", "--tasks", "rating,sentiment", "--no-embedding"]


@pytest.fixture
def run(release, monkeypatch, capsys):
    """Runs `annotate.py --engine ray` in this process on a local cluster; returns exit code and standard error."""

    def call(*arguments, workers=1):
        command = ["annotate.py", "--model", str(release), "--engine", "ray", f"--num-workers={workers}", *OPTIONS]
        monkeypatch.setattr(sys, "argv", [*command, *map(str, arguments)])
        capsys.readouterr()
        try:
            annotate.main()
            return 0, capsys.readouterr().err
        except SystemExit as stop:
            return stop.code, capsys.readouterr().err

    return call


@pytest.fixture(scope="module", autouse=True)
def shut_down():
    yield
    ray.shutdown()


def kill_one_worker(output: Path, killed: list[int]) -> None:
    """Kills an actor once parts of a shard are there."""
    while not killed:
        time.sleep(0.05)
        if list(output.glob("_rejects/*.partial/0*.parquet")):
            actors = [x for x in psutil.Process().children(recursive=True) if "ray::MapWorker" in " ".join(x.cmdline())]
            for actor in actors[:1]:
                os.kill(actor.pid, signal.SIGKILL)
                killed.append(actor.pid)


def annotate_alone(release: Path, source: Path, output: Path) -> None:
    """Annotates each shard as one file. In a process of its own: on what a process did before, last bits can depend."""
    settings = Settings(str(release), device="cpu", threads=1, tasks=["rating", "sentiment"], embedding=False)
    annotator = Annotator(settings)
    for path in source.iterdir():
        rows = Source(str(path), "jsonl", "text").rows()
        annotate_file(rows, Output(output / f"{path.stem}.parquet"), annotator, {}, Progress())


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_nothing_and_shards_are_resumed(run, release, tmp_path):
    source, output, killed = tmp_path / "in", tmp_path / "out", []
    source.mkdir()
    for shard in range(3):
        write_texts(source / f"{shard}.jsonl", 2500 + 100 * shard)
    killer = threading.Thread(target=kill_one_worker, args=(output, killed), daemon=True)
    killer.start()
    code, err = run("--input", source, "--output", output, workers=2)
    assert code == 0 and killed and "3/3" in err and "texts/s" in err and "156 rows could not be annotated" in err, err
    table = pq.read_table(output).to_pylist()
    assert len(table) == 7800 and sum(x["error"] is not None for x in table) == 156
    elsewhere(annotate_alone, release, source, tmp_path)
    for shard in range(3):
        alone, written = tmp_path / f"{shard}.parquet", output / f"{shard}.jsonl.parquet"
        assert written.read_bytes() == alone.read_bytes()
        rejects = output / "_rejects" / f"{shard}.jsonl.parquet.rejects.jsonl"
        assert rejects.read_bytes() == Output(alone).rejects.read_bytes()

    times = {path.name: path.stat().st_mtime_ns for path in output.glob("*.parquet")}
    (output / "2.jsonl.parquet").unlink()
    code, err = run("--input", source, "--output", output)
    assert code == 2 and "is not empty; choose another folder or add --resume" in err
    code, err = run("--input", source, "--output", output, "--resume", "--batch-tokens", "9")
    assert code == 1 and "--batch-tokens was None and is 9" in err
    code, err = run("--input", source, "--output", output, "--resume")
    assert code == 0 and "3/3" in err
    changed = {path.name for path in output.glob("*.parquet") if path.stat().st_mtime_ns != times[path.name]}
    assert changed == {"2.jsonl.parquet"}


@pytest.mark.integrations
def test_a_machine_that_dies_costs_nothing(run, release, tmp_path, monkeypatch):
    from ray.cluster_utils import Cluster

    ray.shutdown()
    machine = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "object_store_memory": 100_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={**machine, "include_dashboard": False})
    second, source, output = cluster.add_node(**machine), tmp_path / "in", tmp_path / "out"
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    source.mkdir()
    for shard in range(4):
        write_texts(source / f"{shard}.jsonl", 4000)

    def kill_machine() -> None:
        while len({part.parent for part in output.glob("_rejects/*.partial/0*.parquet")}) < 2:  # both of them work
            time.sleep(0.05)
        cluster.remove_node(second, allow_graceful=False)

    threading.Thread(target=kill_machine, daemon=True).start()
    try:
        code, err = run("--input", source, "--output", output, workers=2)
        assert code == 0 and "4/4" in err and [node["Alive"] for node in ray.nodes()].count(False) == 1, err
    finally:
        ray.shutdown()
        cluster.shutdown()
    elsewhere(annotate_alone, release, source, tmp_path)
    for shard in range(4):
        assert (output / f"{shard}.jsonl.parquet").read_bytes() == (tmp_path / f"{shard}.parquet").read_bytes()


@pytest.mark.slow
def test_two_files_of_one_target_are_refused(run, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/reviews.csv").write_text("text\none\ntwo\nthree\n")
    pq.write_table(pa.table({"text": ["four"]}), tmp_path / "in/reviews.csv.parquet")
    code, err = run("--input", tmp_path / "in", "--output", tmp_path / "out")
    assert code == 1 and "reviews.csv, reviews.csv.parquet would be written to the same file; rename one" in err
    assert not (tmp_path / "out").exists()
    (tmp_path / "in/reviews.csv").rename(tmp_path / "in/more.csv")
    code, err = run("--input", tmp_path / "in", "--output", tmp_path / "out")
    texts = {x.name: pq.read_table(x)["text"].to_pylist() for x in (tmp_path / "out").glob("*.parquet")}
    assert code == 0 and texts == {"more.csv.parquet": ["one", "two", "three"], "reviews.csv.parquet": ["four"]}


@pytest.mark.slow
def test_a_shard_whose_input_changed_is_named_when_the_run_is_resumed(run, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"in/{name}.txt").write_text("one\ntwo\n")
    files = ("--input", tmp_path / "in", "--output", tmp_path / "out")
    assert run(*files)[0] == 0
    date = (tmp_path / "in/b.txt").stat()
    (tmp_path / "in/b.txt").write_text("one\nten\n")
    os.utime(tmp_path / "in/b.txt", ns=(date.st_atime_ns, date.st_mtime_ns))
    code, err = run(*files, "--resume")
    assert code == 1 and "1 of 2 shards failed; b.txt: --resume: sha256 of --input's rows was" in err


def test_ray_listens_on_the_loopback_interface_alone(run, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text("one\n")
    assert run("--input", tmp_path / "in", "--output", tmp_path / "out")[0] == 0
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    sockets = [x for process in family for x in process.net_connections("tcp") if x.status == psutil.CONN_LISTEN]
    assert sockets and {x.laddr.ip.removeprefix("::ffff:") for x in sockets} == {"127.0.0.1"}, sockets


def test_a_shard_that_cannot_be_read_is_named_and_the_others_are_written(run, tmp_path):
    (tmp_path / "in").mkdir()
    write_texts(tmp_path / "in/good.jsonl", 30)
    (tmp_path / "in/bad.parquet").write_bytes(b"PAR1 no")
    code, err = run("--input", tmp_path / "in", "--output", tmp_path / "out")
    assert code == 1 and "1 of 2 shards failed; bad.parquet: --input" in err and "cannot be read as parquet" in err
    assert [x.name for x in (tmp_path / "out").glob("*.parquet")] == ["good.jsonl.parquet"]
    shutil.copy(tmp_path / "in/good.jsonl", tmp_path / "in/more.xyz")
    code, err = run("--input", tmp_path / "in", "--output", tmp_path / "other")
    assert code == 1 and "name the format of more.xyz with --input-format" in err
