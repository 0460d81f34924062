"""Folders of files, annotated by the actors of a Ray Data job.

A file is a shard: an actor reads it, and writes the parquet file of the same name. Ray hands the shards out, restarts an
actor that died and gives its shard to it again, which then goes on from the parts that are there (see `bulk`). Every
machine must see both folders, this code and a model that is a folder under the same paths.
"""

import json
import logging
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import bulk

SETTINGS = "_settings.json"  # readers of parquet folders pass over what begins with an underscore
WORK = "_rejects"  # shards are in it until they are complete; their rejects stay


@dataclass(frozen=True)
class Folders:
    """Where shards are read and written.

    Attributes:
        source: Folder of the input files.
        output: Folder of the output files.
        file_format: That of every input file, one of `bulk.INPUT_FORMATS`; None: by its ending.
        column: The column or field that holds the text.
    """

    source: Path
    output: Path
    file_format: str | None
    column: str

    def shards(self) -> list[str]:
        """Returns the names of the input files.

        Raises:
            InputError: There are none, or one is of unknown format.
        """
        names = sorted(x.name for x in self.source.iterdir() if x.is_file() and not x.name.startswith((".", "_")))
        unknown = [name for name in names if not self.file_format and Path(name).suffix.lower() not in bulk.ENDINGS]
        if unknown or not names:
            known = ", ".join(bulk.INPUT_FORMATS)
            found = f"say what {', '.join(unknown)} holds with --input-format ({known})" if names else "the folder is empty"
            raise bulk.InputError(f"--input {self.source}: {found}.")
        return names

    def read(self, shard: str) -> bulk.Source:
        """Returns the input file of a shard."""
        file_format = self.file_format or bulk.ENDINGS[Path(shard).suffix.lower()]
        return bulk.Source(str(self.source / shard), file_format, self.column)

    def target(self, shard: str) -> Path:
        """Returns the output file of a shard: its name, with ".parquet" added to another ending."""
        return self.output / (shard.removesuffix(".parquet") + ".parquet")

    def identity(self) -> dict[str, Any]:
        """Returns what tells whether these are the files that they were."""
        return {name: self.read(name).identity() for name in self.shards()}


class ShardWorker:
    """An actor: loads the model once and annotates shards; called by Ray with their names."""

    def __init__(self, folders: Folders, settings: bulk.Settings) -> None:
        self.folders = folders
        self.annotator = bulk.Annotator(settings)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        found = [self.annotate(str(shard)) for shard in batch["shard"]]
        return {name: [shard[name] for shard in found] for name in ("shard", "rows", "tokens", "error")}

    def annotate(self, shard: str) -> dict[str, Any]:
        """Writes a shard, or what is missing of it; returns the numbers of rows and tokens, and what went wrong."""
        target, progress, error = self.folders.target(shard), bulk.Progress(), None
        work = self.folders.output / WORK / target.name
        try:
            if not work.exists() and not target.exists():
                source = self.folders.read(shard)
                identity = {**source.identity(), **self.annotator.identity()}
                source.count()  # says at once if nothing of the file can be read
                bulk.annotate_file(source.rows(), work, self.annotator, identity, progress, resume=True)
            if work.exists():
                os.replace(work, target)
                bulk.sync_folder(target.parent)
        except (bulk.InputError, ValueError, OSError) as problem:
            error = str(problem)
        return {"shard": shard, "rows": progress.rows, "tokens": progress.tokens, "error": error or ""}


def annotate_folder(folders: Folders, settings: bulk.Settings, workers: int, resume: bool, bar: Callable[..., Any]) -> int:
    """Writes an output file for every input file; returns the number of rows that could not be annotated.

    Args:
        folders: Where the files are.
        settings: How to annotate. Without a device it is the CPU.
        workers: How many actors work, each with one core, or one GPU where the device is one.
        resume: Whether the output may hold shards of an earlier run.
        bar: Makes the `bulk.Progress` that is told of every shard.

    Raises:
        InputError: Ray is not installed, the earlier run had other settings, or a shard failed; the others are complete.
    """
    folders = replace(folders, source=folders.source.resolve(), output=folders.output.resolve())
    model = str(Path(settings.model).resolve()) if Path(settings.model).is_dir() else settings.model
    settings = replace(settings, model=model, device=settings.device or "cpu", threads=1)
    shards = folders.shards()
    bulk.Annotator(replace(settings, device="cpu"))  # says at once if a model or task is not there
    _open_folder(folders, {**settings.identity(), **folders.identity()}, resume)
    missing = [shard for shard in shards if not folders.target(shard).exists()]
    failed = []
    with bar(len(shards), " shards") as progress:
        progress.skip(len(shards) - len(missing))
        try:
            for shard in _run(folders, settings, missing, workers) if missing else ():
                progress.add(shard["rows"], shard["tokens"])
                failed += [f"{shard['shard']}: {shard['error']}"] if shard["error"] else []
        except BaseException as error:
            error.add_note(f"What is done is kept in {folders.output}.")
            raise
    if failed:
        raise bulk.InputError("; ".join([f"{len(failed)} of {len(shards)} shards failed", *failed]))
    return sum(path.read_bytes().count(b"\n") for path in (folders.output / WORK).glob("*.rejects.jsonl"))


def _open_folder(folders: Folders, identity: dict[str, Any], resume: bool) -> None:
    saved = folders.output / SETTINGS
    if resume and saved.exists():
        bulk.check_identity(json.loads(saved.read_text("utf-8")), json.loads(json.dumps(identity)))
    elif folders.output.exists() and any(folders.output.iterdir()):
        raise bulk.InputError(f"--output {folders.output} is not empty, and holds no run to resume; choose another folder")
    (folders.output / WORK).mkdir(parents=True, exist_ok=True)
    with bulk.durable(saved, folders.output / WORK) as stream:
        stream.write(json.dumps(identity, indent=2).encode())


def _start_ray() -> Any:
    """Returns Ray, connected to the cluster of RAY_ADDRESS or to one of this machine alone."""
    try:
        import ray.data
    except ImportError as error:
        raise bulk.InputError("--engine ray needs Ray: pip install 'ray[data]'") from error
    if not ray.is_initialized():
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
        except Exception as error:  # Ray has no class for it
            raise bulk.InputError(f"--engine ray: Ray cannot be started or reached: {error}") from error
        for number, handler in handlers.items():
            signal.signal(number, handler)  # Ray's would abort
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray


def _run(folders: Folders, settings: bulk.Settings, shards: list[str], workers: int) -> Iterator[dict[str, Any]]:
    """Yields what `ShardWorker.annotate` returns for each shard, as they are done."""
    ray = _start_ray()
    job = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards)).map_batches(
        ShardWorker,
        fn_constructor_args=(folders, settings),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(shards)), max_tasks_in_flight_per_actor=1),
        num_cpus=1,
        num_gpus=0 if settings.device == "cpu" else 1,
    )
    try:
        yield from job.iter_rows()
    except ray.exceptions.RayError as error:
        raise bulk.InputError(f"--engine ray: {error}") from error
