"""Whole files: rows in, results out in durable parts, so that a run that was stopped can go on.

The unit of work is a chunk of rows. Where a chunk ends depends on the rows alone, and texts are batched within a chunk, so
its result is the same whichever process computes it, and when. Each result is a file in `OUTPUT.partial`, which is there
either whole or not at all. When all are there, they are joined into the output.
"""

import csv
import hashlib
import importlib.metadata
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any, BinaryIO

INPUT_FORMATS = ("csv", "jsonl", "parquet", "text")
ENDINGS = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".txt": "text", "": "text"}
CHUNK_ROWS = 1024
CHUNK_CHARACTERS = 1_000_000
MAX_CHARACTERS = 1_000_000  # of one text; a longer one is hardly a text, and would not leave memory flat
MAX_CSV_FIELD = 2**27  # characters; where a quote is missing, a field goes on to the end of the file
GROUP_PARTS = 8  # parts in a row group of the parquet output: a file of many small groups is slow to read
SETTINGS = "settings.json"
MODEL_FILES = ("config.json", "tokenizer*.json", "*_multitask.py", "*.safetensors", "*/*.safetensors", "onnx/*.onnx")
LIBRARIES = ("torch", "transformers", "tokenizers", "pyarrow", "onnxruntime")

Row = tuple[Any, str | None]  # a text, or what stood there; and why it could not be read
Item = tuple[int, str | None, str | None]  # the number of a row, its text, and what is wrong with it
Result = dict[str, Any]


class InputError(Exception):
    """What the user gave cannot be worked with; the message says what to change."""


class Progress:
    """Counts what a run has done."""

    rows = tokens = 0

    def skip(self, rows: int) -> None:
        """Takes note of rows that an earlier run has done."""

    def add(self, rows: int, tokens: int) -> None:
        """Takes note of rows that this run has done, and of their tokens."""
        self.rows += rows
        self.tokens += tokens


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise InputError("Parquet files need pyarrow: pip install pyarrow") from error
    return pyarrow


# Reading


@dataclass(frozen=True)
class Source:
    """A file of texts.

    Attributes:
        name: Its path; "-" is standard input.
        file_format: One of `INPUT_FORMATS`.
        column: The column or field that holds the text.
    """

    name: str
    file_format: str
    column: str

    @property
    def is_file(self) -> bool:
        """Whether it can be read again: a file, and no pipe."""
        return self.name != "-" and Path(self.name).is_file()

    def rows(self) -> Iterator[Row]:
        """Yields the rows, one at a time.

        Raises:
            InputError: The file cannot be read, or has no such column.
        """
        try:
            if self.is_file:
                _refuse_other_encodings(self.name)
            if self.file_format == "parquet":
                yield from _read_parquet(self.name, self.column)
                return
            # Bytes that are no UTF-8 become surrogates, which makes their row an error and leaves the others whole.
            file = sys.stdin.fileno() if self.name == "-" else self.name
            read = {"csv": _read_csv, "jsonl": _read_jsonl, "text": _read_text}[self.file_format]
            with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="", closefd=self.name != "-") as stream:
                yield from read(stream, self.column)
        except (OSError, csv.Error) as error:
            raise InputError(f"--input {self.name} cannot be read: {error}") from error

    def count(self) -> int | None:
        """Returns the number of rows, or None for what can be read only once.

        Raises:
            InputError: The file cannot be read, or not one of its rows can.
        """
        if self.file_format == "parquet" and self.is_file:
            return _open_parquet(self.name).metadata.num_rows
        if self.name == "-" or (Path(self.name).exists() and not self.is_file):
            return None
        count, reason, is_readable = 0, None, False
        for _, reason in self.rows():
            count += 1
            is_readable |= reason is None
        if count and not is_readable:
            raise InputError(f"--input {self.name}: none of its {count} rows can be read; the last {reason}.")
        return count

    def identity(self) -> dict[str, Any]:
        """Returns what tells whether this is the file that it was."""
        options = {"--input": self.name, "--input-format": self.file_format, "--text-column": self.column}
        if not self.is_file:
            return options
        state, path = Path(self.name).stat(), str(Path(self.name).resolve())
        return {**options, "--input": path, "size of --input": state.st_size, "time of --input": state.st_mtime_ns}


def _refuse_other_encodings(path: str) -> None:
    """Raises an InputError for what would be read as text and is none: UTF-16 and compressed files."""
    with open(path, "rb") as stream:
        start = stream.read(4)
    if start.startswith((b"\xff\xfe", b"\xfe\xff", b"\x1f\x8b", b"PK\x03\x04")):
        raise InputError(f"--input {path} is compressed or UTF-16; unpack it or convert it to UTF-8.")


def _read_text(stream: Iterable[str], column: str) -> Iterator[Row]:
    for line in stream:
        yield line.rstrip("\r\n"), None


def _read_csv(stream: Iterable[str], column: str) -> Iterator[Row]:
    csv.field_size_limit(MAX_CSV_FIELD)
    is_at_end = False

    def lines() -> Iterator[str]:
        nonlocal is_at_end
        yield from stream
        is_at_end = True

    reader = csv.DictReader(lines())
    if column not in (reader.fieldnames or []):
        raise InputError(f"--text-column {column}: the file has the columns {', '.join(reader.fieldnames or [])}.")
    while True:
        try:
            value = next(reader)[column]
        except StopIteration:
            return
        except csv.Error as error:
            yield None, f"is no csv: {error}"
            continue
        if is_at_end:  # a whole row needs no look at what follows it
            yield None, "ends within quotes: the file breaks off, or a quote is missing"
        else:
            yield value, "has fewer fields than the header" if value is None else None


def _read_jsonl(stream: Iterable[str], column: str) -> Iterator[Row]:
    for line in stream:
        if not line.strip():
            continue  # as every reader of JSON lines does
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield None, f"is no JSON: {error}"
            continue
        if isinstance(fields, dict) and column in fields:
            yield fields[column], None
        else:
            yield None, f"is no object with the field {column!r} (--text-column)"


def _open_parquet(name: str) -> Any:
    pyarrow = _pyarrow()
    try:
        return pyarrow.parquet.ParquetFile(sys.stdin.buffer if name == "-" else name)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"--input {name} is no readable parquet file: {error}") from error


def _read_parquet(name: str, column: str) -> Iterator[Row]:
    file = _open_parquet(name)
    if column not in file.schema_arrow.names:
        raise InputError(f"--text-column {column}: the file has the columns {', '.join(file.schema_arrow.names)}.")
    try:
        for batch in file.iter_batches(CHUNK_ROWS, columns=[column]):
            for value in batch.column(0):
                yield value.as_py(), None
    except (_pyarrow().ArrowException, OSError) as error:
        raise InputError(f"--input {name} breaks off: {error}") from error


# Computing


@dataclass(frozen=True)
class Settings:
    """How texts are annotated.

    Attributes:
        model: Folder or Hub id.
        revision: Commit, tag or branch on the Hub.
        device: For instance "cpu"; None: a GPU if there is one.
        backend: What runs the model; None: the pipeline's default.
        tasks: Names of the tasks to compute; None: all.
        embedding: Whether to give the sentence embedding.
        batch_tokens: Tokens in one batch, padding included; None: the pipeline's default.
        threads: Threads of this process for the model; None: as many as torch takes by itself.
    """

    model: str
    revision: str | None = None
    device: str | None = None
    backend: str | None = None
    tasks: list[str] | None = None
    embedding: bool = True
    batch_tokens: int | None = None
    threads: int | None = None

    def identity(self) -> dict[str, Any]:
        """Returns what decides the results: settings, the model's content, this code and the libraries."""
        names = ("revision", "device", "backend", "tasks", "batch_tokens")
        options = {"--" + name.replace("_", "-"): getattr(self, name) for name in names}
        return {**options, "--no-embedding": not self.embedding, "content of --model": self._content(), **_versions()}

    def divided(self, workers: int) -> "Settings":
        """Returns the settings of each of several processes that share the CPU."""
        import torch

        return self if workers == 1 else replace(self, threads=max(1, torch.get_num_threads() // workers))

    def _content(self) -> str:
        """Returns a hash of a folder's model and of this file, or the commit of a model on the Hub."""
        if not Path(self.model).is_dir():
            from transformers import AutoConfig

            return AutoConfig.from_pretrained(self.model, revision=self.revision, trust_remote_code=True)._commit_hash
        paths = sorted(path for pattern in MODEL_FILES for path in Path(self.model).glob(pattern))
        digest = hashlib.sha256()
        for path in [Path(__file__), *paths]:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found["version of " + name] = importlib.metadata.version(name)
    return found


class Annotator:
    """A model that is loaded, and how to call it.

    Args:
        settings: The model and the options of every call.

    Raises:
        InputError: The model cannot be loaded.
        ValueError: An option is not allowed.
    """

    def __init__(self, settings: Settings) -> None:
        import torch

        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.settings = settings
        self.pipe = _load_pipeline(settings)
        self.options = {name: getattr(settings, name) for name in ("tasks", "embedding", "batch_tokens")}
        self.pipe([], **self.options)  # refuses unknown tasks before anything is read

    def __call__(self, texts: list[str]) -> list[Result]:
        return self.pipe(texts, **self.options)

    def map_weights(self, path: Path) -> None:
        """Takes the weights from a file of `torch.save`, whose pages all processes share."""
        import torch

        self.pipe.model.load_state_dict(torch.load(path, mmap=True), assign=True)

    def identity(self) -> dict[str, Any]:
        """Returns what decides the results."""
        import torch

        place = {"device": str(self.pipe.device), "threads of a process": torch.get_num_threads()}
        return {**self.settings.identity(), **place}

    @property
    def tokens(self) -> int:
        """Tokens of text read so far."""
        return getattr(self.pipe, "tokens_seen", 0)

    def schema(self) -> Any:
        """Returns the parquet schema of the results."""
        config, names = self.pipe.model.config, self.settings.tasks
        specs = {name: spec for name, spec in config.task_specs.items() if names is None or name in names}
        return arrow_schema(specs, (config.embedding_dim or config.hidden_size) if self.settings.embedding else None)


def _load_pipeline(settings: Settings) -> Any:
    from transformers import pipeline
    from transformers.utils import logging

    logging.disable_progress_bar()
    given = {name: getattr(settings, name) for name in ("device", "revision", "backend")}
    options = {name: value for name, value in given.items() if value is not None}
    try:
        return pipeline("multitask", model=settings.model, trust_remote_code=True, **options)
    except Exception as error:  # whatever it is, the model is what the user has to mend
        raise InputError(f"--model {settings.model} cannot be loaded: {error}") from error


def chunks(rows: Iterable[Row]) -> Iterator[list[Item]]:
    """Yields rows with their numbers, in lists of bounded size; what cannot be annotated gives way to the reason."""
    from pipeline_multitask import text_problem

    chunk: list[Item] = []
    characters = 0
    for row, (value, reason) in enumerate(rows):
        problem = reason or text_problem(value)
        if problem is None and len(value) > MAX_CHARACTERS:
            problem = f"has {len(value)} characters, more than {MAX_CHARACTERS}; divide the text"
        chunk.append((row, value if problem is None else None, problem))
        characters += len(value) if problem is None else 0
        if len(chunk) == CHUNK_ROWS or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def annotate(chunk: list[Item], run: Callable[[list[str]], list[Result]]) -> list[Result]:
    """Returns a result for every row, in their order: its number, its text, and its record or an error."""
    records = iter(_records([text for _, text, problem in chunk if problem is None], run))
    results = []
    for row, text, problem in chunk:
        record = next(records) if problem is None else problem
        if isinstance(record, str):
            results.append({"row": row, "text": None, "error": f"row {row} {record}"})
        else:
            results.append({"row": row, "text": text, "error": None, **record})
    return results


def _records(texts: list[str], run: Callable[[list[str]], list[Result]]) -> list[Result | str]:
    """Returns each text's record, or what went wrong with it."""
    try:
        return run(texts)
    except Exception:
        run(["a"])  # raises if it is not the texts that are at fault
        return [_record(text, run) for text in texts]


def _record(text: str, run: Callable[[list[str]], list[Result]]) -> Result | str:
    try:
        return run([text])[0]
    except Exception as error:
        return f"cannot be annotated: {type(error).__name__}: {error}"


# Writing


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


def arrow_schema(specs: dict[str, Any], embedding_dim: int | None) -> Any:
    """Returns the parquet schema of results with the tasks of `specs` and, unless None, an embedding."""
    arrow = _pyarrow()
    text, number = arrow.string(), arrow.float32()
    entity = arrow.struct(
        [("entity_group", text), ("score", number), ("word", text), ("start", arrow.int64()), ("end", arrow.int64())]
    )
    labels, entities = [], []
    for name, spec in specs.items():
        scores = arrow.struct([(label, number) for label in spec.labels])
        if spec.kind == "token_classification":
            entities.append((name, arrow.list_(entity)))
        elif spec.problem_type == "regression":
            labels.append((name, arrow.struct([("values", scores)])))
        elif spec.problem_type == "multi_label_classification":
            labels.append((name, arrow.struct([("labels", arrow.list_(text)), ("scores", scores)])))
        else:
            labels.append((name, arrow.struct([("label", text), ("score", number), ("scores", scores)])))
    columns = [("row", arrow.int64()), ("text", text), ("error", text)]
    columns += [("sentence_embedding", arrow.list_(number, embedding_dim))] if embedding_dim else []
    columns += [(name, arrow.struct(parts)) for name, parts in (("labels", labels), ("entities", entities)) if parts]
    return arrow.schema(columns)


@contextmanager
def durable(path: Path, folder: Path) -> Iterator[BinaryIO]:
    """Opens a file that appears under its name only once it is whole and on the disk; until then it is in `folder`."""
    temporary = folder / f"{path.name}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Makes a change of names durable, where the system lets one."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_part(part: Path, chunk: list[Item], annotator: Annotator) -> tuple[int, int]:
    """Writes the results of a chunk, its rejects first; returns the numbers of rows and tokens."""
    before = annotator.tokens
    results = annotate(chunk, annotator)
    if rejects := [{"row": x["row"], "reason": x["error"]} for x in results if x["error"]]:
        with durable(part.with_suffix(".rejects"), part.parent) as stream:
            stream.write("".join(json.dumps(reject, ensure_ascii=False) + "\n" for reject in rejects).encode())
    with durable(part, part.parent) as stream:
        if part.suffix == ".parquet":
            schema = annotator.schema()
            columns = {name: [result.get(name) for result in results] for name in schema.names}
            _pyarrow().parquet.write_table(_pyarrow().table(columns, schema=schema), stream)
        else:
            stream.write("".join(to_json(result) + "\n" for result in results).encode())
    return len(chunk), annotator.tokens - before


def _join(parts: list[Path], output: Path, schema: Any) -> int:
    """Joins the parts into the output and its rejects; returns the number of rejects."""
    folder = partial_folder(output)
    rejects = [path for part in parts if (path := part.with_suffix(".rejects")).exists()]
    failed = 0
    if rejects:
        with durable(rejects_file(output), folder) as stream:
            for path in rejects:
                lines = path.read_bytes()
                failed += lines.count(b"\n")
                stream.write(lines)
    else:
        rejects_file(output).unlink(missing_ok=True)  # of an earlier run
    with durable(output, folder) as stream:
        if output.suffix == ".parquet":
            _join_parquet(parts, stream, schema)
        else:
            for part in parts:
                stream.write(part.read_bytes())
    return failed


def _join_parquet(parts: list[Path], stream: BinaryIO, schema: Any) -> None:
    arrow = _pyarrow()
    with arrow.parquet.ParquetWriter(stream, schema) as writer:
        for first in range(0, len(parts), GROUP_PARTS):
            tables = [arrow.parquet.ParquetFile(part).read() for part in parts[first : first + GROUP_PARTS]]
            writer.write_table(arrow.concat_tables(tables))


# A run over a file


def partial_folder(output: Path) -> Path:
    """Returns the folder that holds the parts of an output that is not complete."""
    return output.with_name(output.name + ".partial")


def rejects_file(output: Path) -> Path:
    """Returns the file with the rows of an output that could not be annotated."""
    return output.with_name(output.name + ".rejects.jsonl")


def is_unfinished(output: Path) -> bool:
    """Returns whether an earlier run has left parts of this output."""
    return (partial_folder(output) / SETTINGS).exists()


def remove_litter(output: Path) -> None:
    """Removes the folder of parts, unless there is a run to go on with."""
    if not is_unfinished(output):
        shutil.rmtree(partial_folder(output), ignore_errors=True)


def check_identity(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises an InputError that names the settings in which a resumed run differs from the first."""
    names = [name for name in {**saved, **now} if saved.get(name) != now.get(name)]
    if names:
        changes = "; ".join(f"{name} was {saved.get(name)!r} and is {now.get(name)!r}" for name in names)
        raise InputError(f"--resume: {changes}. Resume with what the first run had, or start again with --overwrite.")


def annotate_file(
    rows: Iterable[Row],
    output: Path,
    annotator: Annotator,
    identity: dict[str, Any],
    progress: Progress,
    resume: bool = False,
    workers: int = 1,
) -> int:
    """Writes the result of every row to a file, in their order; returns the number of rows that could not be annotated.

    Args:
        rows: What `Source.rows` yields.
        output: The file, .jsonl or .parquet. It is replaced, at the end and at once.
        annotator: The model.
        identity: What a resumed run must have in common with the first.
        progress: Is told of every chunk.
        resume: Whether to go on from the parts of an earlier run, if there are any; they are thrown away otherwise.
        workers: How many processes compute.

    Raises:
        InputError: The rows cannot be read, another process writes this output, a worker died, or the earlier run was
            one of other settings. What has been done is kept, except in a folder without parts.
    """
    from filelock import FileLock, Timeout

    folder = partial_folder(output)
    folder.mkdir(exist_ok=True)
    try:
        with FileLock(folder / "lock", timeout=0):
            _open_folder(folder, identity, resume)
            with _parts_kept(output):
                parts = _write_parts(rows, output, annotator, progress, workers)
                failed = _join(parts, output, annotator.schema() if output.suffix == ".parquet" else None)
            (folder / SETTINGS).unlink()  # a folder without it is litter, should this process be killed now
    except Timeout:
        raise InputError(f"--output {output}: another process is writing to {folder}; wait for it or stop it.") from None
    finally:
        remove_litter(output)
    return failed


def _open_folder(folder: Path, identity: dict[str, Any], resume: bool) -> None:
    """Checks that a run can go on from the folder, or empties it for a new one."""
    if resume and (folder / SETTINGS).exists():
        check_identity(json.loads((folder / SETTINGS).read_text("utf-8")), json.loads(json.dumps(identity)))
        litter = list(folder.glob("*.tmp"))
    else:
        litter = [path for path in folder.iterdir() if path.name != "lock"]
    for path in sorted(litter, key=lambda path: path.name != SETTINGS):  # the settings first, here too
        path.unlink(missing_ok=True)
    if not (folder / SETTINGS).exists():
        with durable(folder / SETTINGS, folder) as stream:
            stream.write(json.dumps(identity, indent=2).encode())


@contextmanager
def _parts_kept(output: Path) -> Iterator[None]:
    """Whatever goes wrong, says where the parts are; if there are none, nothing has begun."""
    folder = partial_folder(output)
    try:
        yield
    except BaseException as error:
        if any(folder.glob("*" + output.suffix)):
            error.add_note(f"What is done is kept in {folder}.")
        else:
            (folder / SETTINGS).unlink()
        raise


def _write_parts(rows: Iterable[Row], output: Path, annotator: Annotator, progress: Progress, workers: int) -> list[Path]:
    """Writes the parts that are not there yet; returns the paths of all."""
    parts: list[Path] = []

    def missing() -> Iterator[tuple[Path, list[Item]]]:
        for chunk in chunks(rows):
            parts.append(partial_folder(output) / f"{len(parts):08}{output.suffix}")
            if parts[-1].exists():
                progress.skip(len(chunk))
            else:
                yield parts[-1], chunk

    if workers > 1:
        written = _in_workers(missing(), annotator, partial_folder(output), workers)
    else:
        written = (write_part(part, chunk, annotator) for part, chunk in missing())
    with closing(written):  # ends the workers, whatever happens
        for rows_and_tokens in written:
            progress.add(*rows_and_tokens)
    return parts


# Several processes

_annotator: Annotator  # of a worker process


def _in_workers(
    jobs: Iterable[tuple[Path, list[Item]]], annotator: Annotator, folder: Path, workers: int
) -> Iterator[tuple[int, int]]:
    """Yields what `write_part` returns for each job, as they are done."""
    weights = _share_weights(annotator, folder)
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (annotator.settings, weights))
    pending, strangers = set(), active_children()
    try:
        for part, chunk in jobs:
            with _signals_blocked():  # also in the workers that this may start: signals are for this process to handle
                pending.add(pool.submit(_write_part, part, chunk))
            if len(pending) >= 2 * workers:  # enough for nobody to wait, and few enough for memory to stay flat
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        yield from (future.result() for future in pending)
        pool.shutdown()
    except BrokenProcessPool as error:
        raise InputError("a worker process died, perhaps for want of memory; --resume goes on.") from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in active_children():
            if process not in strangers:
                process.kill()
                process.join()


def _share_weights(annotator: Annotator, folder: Path) -> Path | None:
    """Returns a file with the weights as they are in memory, for all processes to map; on a GPU each has its own."""
    import torch

    if annotator.pipe.device.type != "cpu":
        return None
    weights = folder / "weights"
    with durable(weights, folder) as stream:
        torch.save(annotator.pipe.model.state_dict(), stream)  # aligned as in memory, on which the last bits depend
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
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["RAYON_NUM_THREADS"] = str(settings.threads)  # the tokenizer's
    _annotator = Annotator(settings)
    if weights:
        _annotator.map_weights(weights)


def _end_with_parent() -> None:
    """Ends a worker whose parent was killed, which otherwise would wait for ever."""
    parent_process().join()
    os._exit(1)


def _write_part(part: Path, chunk: list[Item]) -> tuple[int, int]:
    return write_part(part, chunk, _annotator)
