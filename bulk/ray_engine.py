"""Annotates a folder of files with the actors of a Ray Data job.

Each file is a shard: an actor reads it and writes a parquet file of the same name. Ray distributes the shards, restarts an
actor that died and gives it the shard again; the actor then resumes from the parts that exist. Every machine must see
the two folders, this code and a model that is a folder under the same paths.
"""

import logging
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bulk.annotator import Annotator, Settings
from bulk.parts import Output, save_json
from bulk.run import Progress, annotate_file, check_identity
from bulk.sources import INPUT_FORMATS, SUFFIXES, InputError, Source

SETTINGS = "_settings.json"  # readers of parquet folders skip names that begin with an underscore
SIDE = "_rejects"  # rejects, and the parts of shards that are not complete


@dataclass(frozen=True)
class Folders:
    """Where shards are read and written."""

    source: Path  # folder of the input files
    output: Path  # folder of the output files
    file_format: str | None  # of every input file, one of `INPUT_FORMATS`; None: by its suffix
    column: str  # name of the column or field that holds the text

    def shards(self) -> list[str]:
        """Returns the names of the input files.

        Raises:
            InputError: There are none, one has an unknown format, or two would be written to the same file.
        """
        names = sorted(x.name for x in self.source.iterdir() if x.is_file() and not x.name.startswith((".", "_")))
        if not names:
            raise InputError(f"--input {self.source}: the folder holds no files.")
        unknown = [name for name in names if not self.file_format and Path(name).suffix.lower() not in SUFFIXES]
        if unknown:
            unnamed, known = ", ".join(unknown), ", ".join(INPUT_FORMATS)
            raise InputError(f"--input {self.source}: name the format of {unnamed} with --input-format ({known}).")
        targets = [self.output_of(name).path for name in names]
        if clash := [name for name, target in zip(names, targets, strict=True) if targets.count(target) > 1]:
            raise InputError(f"--input {self.source}: {', '.join(clash)} would be written to the same file; rename one.")
        return names

    def source_of(self, shard: str) -> Source:
        """Returns the input file of a shard."""
        file_format = self.file_format or SUFFIXES[Path(shard).suffix.lower()]
        return Source(str(self.source / shard), file_format, self.column)

    def output_of(self, shard: str) -> Output:
        """Returns the output file of a shard, named like it; ".parquet" is added to any other suffix."""
        return Output(self.output / (shard.removesuffix(".parquet") + ".parquet"), self.output / SIDE)


class ShardWorker:
    """An actor: loads the model once and annotates shards; Ray calls it with one name at a time."""

    def __init__(self, folders: Folders, settings: Settings) -> None:
        self.folders = folders
        self.annotator = Annotator(settings)
        self.identity = self.annotator.identity()

    def __call__(self, row: dict[str, str]) -> dict[str, Any]:
        """Writes a shard, or what is missing of it; returns its rejects, the rows and tokens computed, and any error."""
        shard, progress, rejects, error = row["shard"], Progress(), 0, ""
        source = self.folders.source_of(shard)
        try:
            identity = {**source.identity(), **self.identity}
            output = self.folders.output_of(shard)
            rejects = annotate_file(source.rows(), output, self.annotator, identity, progress, resume=True)
        except (InputError, ValueError, OSError) as problem:
            error = str(problem)
        return {"shard": shard, "rejects": rejects, "rows": progress.rows, "tokens": progress.tokens, "error": error}


def annotate_folder(
    folders: Folders, settings: Settings, workers: int, resume: bool, progress_bar: Callable[..., Any]
) -> int:
    """Writes an output file for every input file; returns the number of rows that could not be annotated.

    Each of the workers is an actor with one core, or one GPU if the device is a GPU; the default device is the CPU. With
    `resume`, the output folder may hold shards of an earlier run. `progress_bar` is called with the number of shards and the
    unit, and returns a `Progress` that is told of every shard.

    Raises:
        InputError: Ray is not installed, the earlier run had other settings, or a shard failed; the others are complete.
    """
    folders = replace(folders, source=folders.source.resolve(), output=folders.output.resolve())
    model = str(Path(settings.model).resolve()) if Path(settings.model).is_dir() else settings.model
    settings = replace(settings, model=model, device=settings.device or "cpu", threads=1)
    shards = folders.shards()
    annotator = Annotator(replace(settings, device="cpu"))  # refuses an unknown model or task before Ray starts
    formats = {f"shard {shard}": folders.source_of(shard).file_format for shard in shards}
    identity = {**annotator.identity(), "--device": settings.device, "--text-column": folders.column, **formats}
    saved = folders.output / SETTINGS
    if resume and saved.exists():
        check_identity("--resume", saved, identity)
    elif folders.output.exists() and any(folders.output.iterdir()):
        raise InputError(f"--output {folders.output} is not empty and holds no run to resume; choose another folder.")
    (folders.output / SIDE).mkdir(parents=True, exist_ok=True)
    save_json(saved, identity, folders.output / SIDE)
    rejects, failed = 0, []
    with progress_bar(len(shards), " shards") as progress:
        try:
            for shard in _run(folders, settings, shards, workers):
                progress.add(shard["rows"], shard["tokens"])
                rejects += shard["rejects"]
                failed += [f"{shard['shard']}: {shard['error']}"] if shard["error"] else []
        except BaseException as error:
            error.add_note(f"Finished shards are kept in {folders.output}.")
            raise
    if failed:
        raise InputError("; ".join([f"{len(failed)} of {len(shards)} shards failed", *failed]))
    return rejects


def _start_ray() -> Any:
    """Returns Ray, connected to the cluster that RAY_ADDRESS names, or else to a new one that only this machine reaches."""
    address = os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":  # Ray's switch for the loopback interface; read when Ray is imported, here and in its processes
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    try:
        import ray.data
    except ImportError as error:
        raise InputError("--engine ray needs Ray: pip install 'ray[data]'") from error
    if not ray.is_initialized():
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            ray.init(address, include_dashboard=False, log_to_driver=False, logging_level="error")
        except Exception as error:  # Ray has no class of its own for this
            raise InputError(f"--engine ray: Ray cannot be started or reached: {error}") from error
        for number, handler in handlers.items():
            signal.signal(number, handler)  # Ray's handlers would abort the process
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray


def _run(folders: Folders, settings: Settings, shards: list[str], workers: int) -> Iterator[dict[str, Any]]:
    """Yields what `ShardWorker` returns for each shard, in the order in which they finish."""
    ray = _start_ray()
    job = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards)).map(
        ShardWorker,
        fn_constructor_args=(folders, settings),
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(shards)), max_tasks_in_flight_per_actor=1),
        num_cpus=1,
        num_gpus=0 if settings.device == "cpu" else 1,
    )
    try:
        yield from job.iter_rows()
    except ray.exceptions.RayError as error:
        raise InputError(f"--engine ray: {error}") from error
