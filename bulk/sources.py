"""Reads rows of text from files and groups them into chunks."""

import csv
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from annotator_multitask import CHUNK_CHARACTERS, chunked, text_problem

INPUT_FORMATS = ("csv", "jsonl", "parquet", "text")
SUFFIXES = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".txt": "text", "": "text"}
CHUNK_ROWS = 1024
MAX_CHARACTERS = 1_000_000  # of one text; anything longer is hardly a text, and memory would not stay flat
ROWS = "rows of --input"
MAX_CSV_FIELD = 2**27  # characters; a missing quote makes a field run on to the end of the file

Row = tuple[Any, str | None]  # the value found, and why it could not be read
Item = tuple[int, str | None, str | None]  # row number, text, and why the row cannot be annotated


class InputError(Exception):
    """Something that the user gave cannot be used; the message says what to change."""


class Fingerprint:
    """Counts and hashes the rows that pass through it, to tell whether an input has changed."""

    def __init__(self) -> None:
        self.rows = 0
        self.hash = hashlib.sha256()

    def watch(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Yields the rows unchanged."""
        for value, reason in rows:
            self.rows += 1
            self.hash.update(repr((value if isinstance(value, str) else f"{value!r:.50}", reason)).encode())
            yield value, reason

    def identity(self) -> dict[str, Any]:
        """Returns the number and hash of the rows seen so far."""
        return {ROWS: self.rows, "sha256 of --input's rows": self.hash.hexdigest()}


@dataclass(frozen=True)
class Source:
    """A file of texts."""

    name: str  # its path; "-" is standard input
    file_format: str  # one of `INPUT_FORMATS`
    column: str  # name of the column or field that holds the text

    @property
    def is_stream(self) -> bool:
        """Whether the rows can be read only once: standard input, or a pipe."""
        return self.name == "-" or (Path(self.name).exists() and not Path(self.name).is_file())

    def rows(self) -> Iterator[Row]:
        """Yields one row at a time; raises an InputError if the file cannot be read, or lacks or repeats the column."""
        try:
            if not self.is_stream:  # UTF-16 and compressed files would be read as garbled text
                with open(self.name, "rb") as stream:
                    start = stream.read(4)
                if start.startswith((b"\xff\xfe", b"\xfe\xff", b"\x1f\x8b", b"PK\x03\x04")):
                    raise InputError(f"--input {self.name} is compressed or UTF-16; decompress it or convert it to UTF-8.")
            if self.file_format == "parquet":
                yield from _read_parquet(self.name, self.column)
                return
            # Bytes that are not UTF-8 become lone surrogates, so that only their own row is rejected.
            file = sys.stdin.fileno() if self.name == "-" else self.name
            read = {"csv": _read_csv, "jsonl": _read_jsonl, "text": _read_text}[self.file_format]
            with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="", closefd=self.name != "-") as stream:
                yield from read(stream, self.column)
        except (OSError, csv.Error, pyarrow.ArrowException) as error:
            raise InputError(f"--input {self.name} cannot be read as {self.file_format}: {error}") from error

    def identity(self) -> dict[str, Any]:
        """Returns what a resumed run must have in common with the first one; reads all rows, except those of a stream.

        Raises:
            InputError: The file cannot be read, or none of its rows can.
        """
        options = {"--input-format": self.file_format, "--text-column": self.column}
        if self.is_stream:
            return options
        found, reason, is_readable = Fingerprint(), None, False
        for _, reason in found.watch(self.rows()):
            is_readable |= reason is None
        if found.rows and not is_readable:
            raise InputError(f"--input {self.name}: none of its {found.rows} rows can be read; the last {reason}.")
        return {**options, **found.identity()}


def _check_column(column: str, names: list[str]) -> None:
    if column not in names:
        raise InputError(f"--text-column {column}: the file has the columns {', '.join(names)}.")
    if repeated := [name for name, count in Counter(names).items() if name and count > 1]:
        raise InputError(f"--input has several columns named {', '.join(repeated)}; give each column a name of its own.")


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

    reader = csv.reader(lines())
    header = next(reader, [])
    _check_column(column, header)
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield None, f"is not valid csv: {error}"
            continue
        if is_at_end:  # a complete row never needs the line after it
            yield None, "ends inside quotes: the file is cut off, or a quote is missing"
        elif len(fields) == len(header):
            yield fields[header.index(column)], None
        elif fields:  # a blank line is not a row
            yield None, f"has {len(fields)} fields, but the header has {len(header)}; quote fields that hold commas"


def _read_jsonl(stream: Iterable[str], column: str) -> Iterator[Row]:
    for line in stream:
        if not line.strip():
            continue  # as every reader of JSON lines does
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield None, f"is not valid JSON: {error}"
            continue
        if not isinstance(fields, dict) or column not in fields:
            yield None, f"is not an object with the field {column!r} (--text-column)"
        elif isinstance(fields[column], (dict, list)):  # its repr could exceed the recursion limit
            yield None, f"has a {type(fields[column]).__name__} in the field {column!r}, not a text"
        else:
            yield fields[column], None


def _read_parquet(name: str, column: str) -> Iterator[Row]:
    origin = sys.stdin.buffer if name == "-" else name
    file = pyarrow.parquet.ParquetFile(origin)
    _check_column(column, file.schema_arrow.names)
    if pyarrow.types.is_dictionary(file.schema_arrow.field(column).type):  # read otherwise, one bad string fails the batch
        file = pyarrow.parquet.ParquetFile(origin, read_dictionary=[column])
    for batch in file.iter_batches(CHUNK_ROWS, columns=[column]):
        for value in batch.column(0):
            try:
                yield value.as_py(), None
            except UnicodeDecodeError as error:
                yield None, f"is not valid UTF-8: {error}"


def chunks(rows: Iterable[Row]) -> Iterator[list[Item]]:
    """Yields lists of bounded size of numbered rows; a row that cannot be annotated has a reason instead of a text."""

    def items() -> Iterator[Item]:
        for row, (value, reason) in enumerate(rows):
            problem = reason or text_problem(value)
            if problem is None and len(value) > MAX_CHARACTERS:
                problem = f"has {len(value)} characters, more than {MAX_CHARACTERS}; divide the text"
            yield row, value if problem is None else None, problem

    return chunked(items(), lambda item: len(item[1] or ""), CHUNK_ROWS, CHUNK_CHARACTERS)
