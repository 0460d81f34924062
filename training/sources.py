"""Rebuilds the data sets from their original files: `python -m training.sources --output data [NAME ...]`.

training/sources.toml lists where each data set comes from. A data set is downloaded, converted, compared with the rows that the
release was trained on, and only then moved into place: a folder of parquet files that recipes read with `--data data`. What fails
leaves nothing behind, and the others are built all the same.

What is checked: addresses name a commit, so their content cannot change; the number of bytes is compared with what the server
announces; `sha256` of a file where sources.toml gives it (only where the original file was at hand when the list was made); and
for every split the number of rows and a fingerprint of its converted rows.
"""

import argparse
import hashlib
import json
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from dataclasses import field
from http.client import HTTPException
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.error import HTTPError
from urllib.parse import urljoin
from urllib.request import urlopen

from datasets import ClassLabel, Dataset, Features, List, Value, disable_progress_bars
from pydantic import Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from common.data import DataError, load_split
from common.recipe import CONFIG, describe
from training.converters import CONVERTERS, Row, SourceError
from weights_multitask import sha256 as file_sha256

LIST = Path(__file__).with_name("sources.toml")
# Which rows a split holds, where that was drawn once and follows from no rule: document numbers, or `row_key`s.
SPLITS = Path(__file__).with_name("source_splits.json")
SECONDS = 60  # without a byte, until a download counts as failed
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
ColumnKind = Literal["text", "number", "tokens", "tags", "label", "labels"]


@dataclass(frozen=True, config=CONFIG)
class Source:
    """Where a data set comes from, and what it must hold.

    Attributes:
        name: Its folder.
        title: Its name in the data table.
        link: The page that a reader is sent to.
        license: What its publishers allow, as they say it.
        commercial: Whether that includes commercial use.
        use: What this repository does with it.
        citation: The work to cite.
        columns: Its columns, each with its kind.
        rows: Number of rows by split.
        labels: Label names, in order; for tags the kinds of entities, without "O" and prefixes.
        fingerprints: `fingerprint` by split.
        compared: The columns that fingerprints cover; empty: all.
        hub: A Hub id as recipes write it; it needs neither files nor a converter.
        converter: A key of `CONVERTERS`.
        base: What the addresses of `files` begin with; it names a commit.
        files: Addresses by the names that the converter knows.
        sha256: The sums of files, where known.
        options: The converter's further arguments.
    """

    name: str
    title: str
    link: str
    license: str
    commercial: bool
    use: str
    citation: str
    columns: dict[str, ColumnKind]
    rows: dict[str, int]
    labels: list[str] = field(default_factory=list)
    fingerprints: dict[str, str] = field(default_factory=dict)
    compared: list[str] = field(default_factory=list)
    hub: str = ""
    converter: Literal["", *CONVERTERS] = ""
    base: str = ""
    files: dict[str, str] = field(default_factory=dict)
    sha256: dict[str, Sha256] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @model_validator(mode="after")
    def check(self) -> "Source":
        """Raises a ValueError if nothing says how the source is fetched and converted."""
        addresses = [urljoin(self.base, x) for x in self.files.values()]
        known = bool(self.converter) and all(x.startswith(("https://", "http://127.0.0.1:")) for x in addresses)
        if not self.hub and not (known and set(self.sha256) <= set(self.files)):
            raise ValueError(
                "give `hub`, or `converter`, `files` that begin (or `base` does) with https://, and sha256 of these"
            )
        return self


# The list


def read_sources(path: Path = LIST) -> dict[str, Source]:
    """Returns the listed data sets by name; a SourceError names everything that is wrong with the list."""
    try:
        listed = tomllib.loads(path.read_text("utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise SourceError(f"{path}: {error}.") from error
    sources, problems = {}, []
    for name, entry in listed.items():
        try:
            sources[name] = Source(name=name, **entry)
        except ValidationError as error:
            problems += [f"{path.name}, {name}: {describe(x, Source)}" for x in error.errors()]
    if problems:
        raise SourceError("\n".join(problems))
    return sources


# Download


def fetch(address: str, path: Path, sha256: str | None = None) -> None:
    """Downloads a file; a SourceError says if the server does not give all of it, or it has another sum."""
    try:
        with urlopen(address, timeout=SECONDS) as response:
            path.write_bytes(response.read())
    except HTTPError as error:
        raise SourceError(f"{address}: the server answers {error}; correct the address in {LIST.name}.") from error
    except (OSError, HTTPException) as error:  # among them IncompleteRead, if the connection ended early
        raise SourceError(f"{address}: cannot be downloaded ({error}); run the command again.") from error
    if sha256 and (found := file_sha256(path)) != sha256:
        raise SourceError(f"{address}: sha256 is {found}; {LIST.name} says {sha256}. The file is not the expected one.")


# Build


def build(source: Source, output: Path) -> None:
    """Makes the folder of a data set in `output`, which is created, whole or not at all.

    Raises:
        SourceError: A file cannot be fetched or converted, the rows are not the expected ones, or something is there already.
        DataError: A data set on the Hub cannot be read.
    """
    target = output / source.name
    if target.exists():
        raise SourceError(f"{target} exists; remove it to build it again.")
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=f".{source.name}.") as temporary:
        if source.hub:
            names = list(source.columns)
            data = {split: load_split(source.hub, split, names).select_columns(names) for split in source.rows}
        else:
            paths = {name: Path(temporary, address.replace("/", "-")) for name, address in source.files.items()}
            for name, address in source.files.items():
                fetch(urljoin(source.base, address), paths[name], source.sha256.get(name))
            drawn = json.loads(SPLITS.read_text("utf-8")).get(source.name)
            options = {**source.options, **({"splits": drawn} if drawn else {})}
            found: dict[str, list[Row]] = {}
            for split, row in CONVERTERS[source.converter](paths, **options):
                found.setdefault(split, []).append(row)
            data = {split: to_dataset(rows, source, split) for split, rows in found.items()}
        if problems := differences(source, data):
            raise SourceError("\n".join(problems))
        folder = Path(temporary) / "folder"
        folder.mkdir()
        for split, rows in data.items():
            rows.to_parquet(folder / f"{split}.parquet")
        folder.rename(target)


def features_of(source: Source) -> Features:
    """Returns the column types of a data set."""
    bio = ["O", *(prefix + kind for kind in source.labels for prefix in ("B-", "I-"))]
    kinds = {
        "text": Value("string"),
        "number": Value("float32"),
        "tokens": List(Value("string")),
        "tags": List(ClassLabel(names=bio)),
        "label": ClassLabel(names=source.labels),
        "labels": List(ClassLabel(names=source.labels)),
    }
    return Features({column: kinds[kind] for column, kind in source.columns.items()})


def to_dataset(rows: list[Row], source: Source, split: str) -> Dataset:
    """Returns rows with label names as a data set; a SourceError names one that lacks a column or has an unlisted label."""
    features, encoded = features_of(source), []
    for index, row in enumerate(rows):
        try:
            encoded.append(features.encode_example({column: row[column] for column in features}))
        except (KeyError, ValueError) as error:
            raise SourceError(
                f"{source.name}, split {split}, row {index}: {error}; labels are {', '.join(source.labels)}."
            ) from error
    return Dataset.from_list(encoded, features=features)


def fingerprint(data: Dataset, columns: Iterable[str]) -> str:
    """Returns a hash of a split's columns, label names and values, whatever the order of its rows and the file format."""
    columns = sorted(columns)
    inner = {column: getattr(data.features[column], "feature", data.features[column]) for column in columns}
    head = json.dumps({column: getattr(feature, "names", None) for column, feature in inner.items()})
    values = zip(*(data[column][:] for column in columns), strict=True)  # as lists: reading row by row is slow
    rows = sorted(json.dumps([round(x, 5) if isinstance(x, float) else x for x in row]) for row in values)
    return hashlib.sha256("\n".join([head, *rows]).encode()).hexdigest()


def differences(source: Source, data: dict[str, Dataset]) -> list[str]:
    """Returns in what the splits differ from the listed numbers of rows and fingerprints."""
    problems = []
    for split, count in source.rows.items():
        rows, expected, where = data.get(split, []), source.fingerprints.get(split), f"{source.name}, split {split}"
        if len(rows) != count:
            problems.append(f"{where}: {len(rows)} rows; there must be {count}.")
        elif expected and expected != fingerprint(rows, source.compared or source.columns):
            problems.append(f"{where}: {count} rows, but some are not those that the release was trained on.")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="data sets of sources.toml; none: all of them")
    parser.add_argument("--output", type=Path, required=True, help="folder for the data sets' folders")
    args = parser.parse_args()
    sources = read_sources()
    if unknown := [name for name in args.names if name not in sources]:
        parser.error(f"no data set {', '.join(unknown)}; {LIST.name} lists {', '.join(sources)}")
    disable_progress_bars()
    failed = []
    for name in args.names or sources:
        try:
            build(sources[name], args.output)
            print(f"{args.output / name}: {sources[name].rows}")
        except (SourceError, DataError) as error:
            failed.append(name)
            print(error, file=sys.stderr)
    if failed:
        sys.exit(f"not built: {', '.join(failed)}")


if __name__ == "__main__":
    main()
