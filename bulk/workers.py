"""Worker processes that compute the parts of one file and share the model's weights."""

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path

from bulk.annotator import Annotator, Settings
from bulk.parts import durable, write_part
from bulk.sources import InputError, Item

_annotator: Annotator  # of a worker process


def write_parts(
    jobs: Iterable[tuple[Path, list[Item]]], annotator: Annotator, folder: Path, workers: int
) -> Iterator[tuple[int, int]]:
    """Yields what `write_part` returns for each job, as they finish; raises an InputError if a worker process died."""
    weights = _share_weights(annotator, folder)
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (annotator.settings, weights))
    pending, others = set(), active_children()
    try:
        for part, chunk in jobs:
            with _signals_blocked():  # also in workers started here: signals are for this process to handle
                pending.add(pool.submit(_write_part, part, chunk))
            if len(pending) >= 2 * workers:  # enough to keep every worker busy, few enough to keep memory flat
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        yield from (future.result() for future in pending)
        pool.shutdown()
    except BrokenProcessPool as error:
        raise InputError("a worker process died, possibly out of memory.") from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in active_children():
            if process not in others:
                process.kill()
                process.join()


def _share_weights(annotator: Annotator, folder: Path) -> Path | None:
    """Returns a file with the weights for all processes to map; None where each process reads its own."""
    if annotator.core.backend != "torch" or annotator.device != "cpu":
        return None
    import torch

    weights = folder / "weights"
    with durable(weights, folder) as stream:
        torch.save(annotator.core.model.state_dict(), stream)  # keeps alignment, on which the last bits of results depend
    annotator.map_weights(weights)
    return weights


@contextmanager
def _signals_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(settings: Settings, weights: Path | None) -> None:
    global _annotator
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    os.environ["RAYON_NUM_THREADS"] = str(settings.threads)  # threads of the tokenizer
    _annotator = Annotator(settings)
    if weights:
        _annotator.map_weights(weights)


def _exit_with_parent() -> None:
    """Ends this worker when its parent is killed; otherwise it would wait for work forever."""
    parent_process().join()
    os._exit(1)


def _write_part(part: Path, chunk: list[Item]) -> tuple[int, int]:
    return write_part(part, chunk, _annotator)
