"""Python processes for tests, forked from one that has imported the large libraries already: a start costs no seconds.

They know nothing of the test's own process. Where an import itself is what is tested (its silence, its environment), start a
real one.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PRELOADED = ["torch", "transformers.pipelines", "sentence_transformers", "datasets"]


def start(arguments: list[str | Path], folder: Path, cwd: Path = ROOT) -> BaseProcess:
    """Starts `python ARGUMENTS` (a script, `-m MODULE` or `-c CODE`), its output going to out and err in a folder."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_main, args=(list(map(str, arguments)), folder, cwd, dict(os.environ)))
    process.start()
    return process


def run(arguments: list[str | Path], cwd: Path = ROOT, check: bool = True) -> subprocess.CompletedProcess:
    """Returns what `python ARGUMENTS` printed and how it ended; fails if it failed and `check` is on."""
    with tempfile.TemporaryDirectory() as folder:
        process = start(arguments, Path(folder), cwd)
        process.join()
        out, err = (Path(folder, name).read_text("utf-8") for name in ("out", "err"))
    assert not check or process.exitcode == 0, err[-3000:]
    return subprocess.CompletedProcess(arguments, process.exitcode, out, err)


def _main(arguments: list[str], folder: Path, cwd: Path, environment: dict[str, str]) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    form = arguments.pop(0) if arguments[0] in ("-m", "-c") else ""
    sys.argv = ["-c", *arguments[1:]] if form == "-c" else arguments
    sys.path[0] = str(cwd) if form else str(Path(arguments[0]).resolve().parent)
    try:
        if form == "-c":
            exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
        elif form == "-m":
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(arguments[0], run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
