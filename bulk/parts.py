"""Writes results as parts, joins the parts into the output, and owns every file beside the output."""

import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet

from bulk.annotator import Annotator, Result, annotate
from bulk.sources import InputError, Item

GROUP_PARTS = 8  # parts per row group of the parquet output; a file of many small groups is slow to read
LOCK = "annotate.lock"
SETTINGS = "settings.json"
OWN_NAMES = re.compile(rf"({LOCK}|{SETTINGS}|weights|\d{{8}}-[0-9a-f]{{16}}\.(jsonl|parquet|rejects)|.+\.tmp)")


class Output:
    """The output file, .jsonl or .parquet, and the files that belong to it, in the folder `side` or else beside it."""

    def __init__(self, path: Path, side: Path | None = None) -> None:
        side = side or path.parent
        self.path = path
        self.partial = side / f"{path.name}.partial"  # folder of the parts; it exists while the output is incomplete
        # What the run is: input, model, options, versions. Without it, the parts are leftovers.
        self.settings = self.partial / SETTINGS
        self.rejects = side / f"{path.name}.rejects.jsonl"  # the rows that could not be annotated, if there are any
        self.record = side / f".{path.name}.run.json"  # says of a complete output what `settings` says of an incomplete one

    def is_unfinished(self) -> bool:
        """Returns whether an earlier run can be resumed; raises an InputError if the folder of parts is somebody else's."""
        self._check_owner()
        return self.settings.exists()

    def count_rejects(self) -> int:
        """Returns the number of rows that could not be annotated."""
        return self.rejects.read_bytes().count(b"\n") if self.rejects.exists() else 0

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes away from the output; at the end, removes the folder of parts unless a run can be resumed.

        Raises:
            InputError: Another process holds the lock, or the folder of parts belongs to somebody else.
        """
        from filelock import Timeout

        try:
            with self._acquire_lock():
                try:
                    yield
                finally:
                    if not self.settings.exists():
                        self.clear()
                        (self.partial / LOCK).unlink()  # last: until then, nobody else can have a file here
        except Timeout:
            raise InputError(f"--output {self.path}: another process is writing it; wait for it or stop it.") from None
        finally:
            with suppress(OSError):  # not empty
                self.partial.rmdir()

    def _acquire_lock(self) -> AbstractContextManager[Any]:
        from filelock import FileLock

        while True:
            with suppress(FileNotFoundError, FileExistsError):  # another run has just ended and removed the folder
                self._check_owner()
                self.partial.mkdir(exist_ok=True)
                return FileLock(self.partial / LOCK).acquire(timeout=0)

    def clear(self) -> None:
        """Removes all files from the folder of parts except the lock, the settings first."""
        for path in sorted(self.partial.iterdir(), key=lambda path: path.name != SETTINGS):
            if path.name != LOCK:
                path.unlink(missing_ok=True)

    def _check_owner(self) -> None:
        try:
            is_folder = stat.S_ISDIR(os.lstat(self.partial).st_mode)
            found = list(os.scandir(self.partial)) if is_folder else []
        except FileNotFoundError:
            return
        is_marked = not found or LOCK in [x.name for x in found]
        foreign = [x for x in found if not OWN_NAMES.fullmatch(x.name) or x.is_symlink() or x.is_dir()]
        if not is_folder or not is_marked or foreign:
            raise InputError(
                f"--output {self.path}: the parts would go to {self.partial}, which is not a folder that annotate.py made; "
                "choose another output, or move it away."
            )


@contextmanager
def durable(path: Path, folder: Path) -> Iterator[BinaryIO]:
    """Opens a file that gets its name only once it is complete and on the disk; until then it is in `folder`."""
    temporary = folder / f"{path.name}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Makes renames durable, where the system allows it."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save_json(path: Path, fields: dict[str, Any], folder: Path) -> None:
    """Writes a durable JSON file; until it is complete it is in `folder`."""
    with durable(path, folder) as stream:
        stream.write(json.dumps(fields, indent=2).encode())


def write_part(part: Path, chunk: list[Item], annotator: Annotator) -> tuple[int, int]:
    """Writes the results of a chunk, its rejects first; returns the numbers of rows and tokens."""
    before = annotator.core.tokens_seen
    results = annotate(chunk, annotator)
    if rejects := [{"row": x["row"], "reason": x["error"]} for x in results if x["error"]]:
        with durable(part.with_suffix(".rejects"), part.parent) as stream:
            stream.write("".join(json.dumps(reject, ensure_ascii=False) + "\n" for reject in rejects).encode())
    with durable(part, part.parent) as stream:
        if part.suffix == ".parquet":
            schema = annotator.schema()
            columns = {name: [result.get(name) for result in results] for name in schema.names}
            pyarrow.parquet.write_table(pyarrow.table(columns, schema=schema), stream)
        else:
            stream.write("".join(to_json(result) + "\n" for result in results).encode())
    return len(chunk), annotator.core.tokens_seen - before


def to_json(result: Result) -> str:
    """Returns a result as one line of JSON; scores and vectors keep six significant digits."""
    return json.dumps(_plain({name: value for name, value in result.items() if value is not None}), ensure_ascii=False)


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def join(parts: list[Path], output: Output, schema: pyarrow.Schema) -> None:
    """Joins the parts into the output, and their rejects into its file of rejects."""
    rejects = [path for part in parts if (path := part.with_suffix(".rejects")).exists()]
    if rejects:
        with durable(output.rejects, output.partial) as stream:
            for path in rejects:
                stream.write(path.read_bytes())
    else:
        output.rejects.unlink(missing_ok=True)  # of an earlier run
    with durable(output.path, output.partial) as stream:
        if output.path.suffix != ".parquet":
            for part in parts:
                stream.write(part.read_bytes())
            return
        with pyarrow.parquet.ParquetWriter(stream, schema) as writer:
            for first in range(0, len(parts), GROUP_PARTS):
                group = (pyarrow.parquet.ParquetFile(part).read() for part in parts[first : first + GROUP_PARTS])
                writer.write_table(pyarrow.concat_tables(group))
                pyarrow.default_memory_pool().release_unused()  # else a long file's join takes more and more
