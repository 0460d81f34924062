"""Annotates one file, so that a run can be stopped at any moment and resumed."""

import json
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from bulk.annotator import Annotator
from bulk.parts import Output, join, save_json, write_part
from bulk.sources import ROWS, Fingerprint, InputError, Item, Row, chunks
from bulk.workers import write_parts
from tasks_multitask import sha256


class Progress:
    """Counts what a run has done."""

    rows = tokens = 0

    def skip(self, rows: int) -> None:
        """Counts rows that an earlier run has done."""

    def add(self, rows: int, tokens: int) -> None:
        """Counts rows that this run has done, and their tokens."""
        self.rows += rows
        self.tokens += tokens


def annotate_file(
    rows: Iterable[Row],
    output: Output,
    annotator: Annotator,
    identity: dict[str, Any],
    progress: Progress,
    resume: bool = False,
    workers: int = 1,
) -> int:
    """Writes the result of every row to a file, in order, and returns the number of rows that could not be annotated.

    An existing output is replaced at the end, in one step. `identity` is what a resumed run must have in common with the
    first one; if it holds what `Source.identity` returned, the rows are compared with it before they become the output.
    `resume` continues from the parts of an earlier run, if there are any; otherwise they are removed.

    Raises:
        InputError: The rows cannot be read or have changed, another process writes this output, a worker died, or the
            earlier run had other settings. Finished parts are kept.
    """
    with output.locked():
        if resume and output.path.exists() and not output.settings.exists():
            if not output.record.exists():
                raise InputError(
                    f"--resume: {output.path} exists, but {output.record}, which says how it was made, does not. "
                    "Choose another output, or start again with --overwrite."
                )
            check_identity("--resume", output.record, {**identity, "sha256 of --output": sha256(output.path)})
            progress.skip(identity.get(ROWS, 0))
            return output.count_rejects()
        if resume and output.settings.exists():
            check_identity("--resume", output.settings, identity)
            for path in output.partial.glob("*.tmp"):
                path.unlink()
        else:
            output.clear()
            save_json(output.settings, identity, output.partial)
        with _parts_kept(output):
            found = Fingerprint()
            parts = _write_parts(found, rows, output, annotator, progress, workers)
            if ROWS in identity:
                check_identity("--input changed during the run", identity, {**identity, **found.identity()})
            join(parts, output, annotator.schema())
            save_json(output.record, {**identity, "sha256 of --output": sha256(output.path)}, output.partial)
        output.settings.unlink()  # from here on, the output is complete
        return output.count_rejects()


def check_identity(what: str, then: Path | dict[str, Any], now: dict[str, Any]) -> None:
    """Raises an InputError, with each difference, if two runs do not have the same input and settings."""
    then = json.loads(then.read_text("utf-8")) if isinstance(then, Path) else then
    now = json.loads(json.dumps(now))
    if names := [name for name in {**then, **now} if then.get(name) != now.get(name)]:
        changes = "; ".join(f"{name} was {then.get(name)!r} and is {now.get(name)!r}" for name in names)
        raise InputError(f"{what}: {changes}. Use the input and settings of the first run, or start a new one.")


@contextmanager
def _parts_kept(output: Output) -> Iterator[None]:
    """Notes on any error where the finished parts are; without any, there is nothing to resume."""
    try:
        yield
    except BaseException as error:
        if any(output.partial.glob(f"0*{output.path.suffix}")):
            error.add_note(f"Finished parts are kept in {output.partial}.")
        else:
            output.settings.unlink()
        raise


def _write_parts(
    found: Fingerprint, rows: Iterable[Row], output: Output, annotator: Annotator, progress: Progress, workers: int
) -> list[Path]:
    """Writes the parts that do not exist yet; returns the paths of all, in order."""
    parts: list[Path] = []

    def missing() -> Iterator[tuple[Path, list[Item]]]:
        for chunk in chunks(found.watch(rows)):
            # The name holds the hash of all rows up to the end of the part: other rows, another part.
            parts.append(output.partial / f"{len(parts):08}-{found.hash.hexdigest()[:16]}{output.path.suffix}")
            if parts[-1].exists():
                progress.skip(len(chunk))
            else:
                yield parts[-1], chunk

    if workers > 1:
        written = write_parts(missing(), annotator, output.partial, workers)
    else:
        written = (write_part(part, chunk, annotator) for part, chunk in missing())
    with closing(written):  # ends the workers, whatever happens
        for rows_and_tokens in written:
            progress.add(*rows_and_tokens)
    return parts
