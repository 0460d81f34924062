"""Embeds, classifies and tags texts from the command line.

    python annotate.py "Tim Cook opened Apple's new store in Paris. I love it!"
    python annotate.py --input reviews.csv --text-column review --output reviews.parquet

Without --output, results go to standard output. In a file, each result carries the number of its input row; a row
that cannot be annotated is kept, with the reason in its "error" field.
"""

import argparse
import csv
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

INPUT_FORMATS = ("csv", "jsonl", "parquet", "text")
ENDINGS = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".txt": "text", "": "text"}
CHUNK_ROWS = 1024
COLOURS = {"PER": 35, "ORG": 36, "LOC": 32}  # ANSI; other entities are yellow, labels bold
Row = tuple[Any, str | None]  # a text, or what stood there; and why it could not be read


class InputError(Exception):
    """What the user gave cannot be worked with; the message says what to change."""


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise InputError("Parquet files need pyarrow: pip install pyarrow") from error
    return pyarrow


def read_rows(source: str, file_format: str, column: str) -> Iterator[Row]:
    """Yields the rows of a file ("-": standard input), one at a time.

    Raises:
        InputError: The file cannot be read, or has no such column.
    """
    try:
        _refuse_other_encodings(source)
        if file_format == "parquet":
            yield from _read_parquet(source, column)
            return
        # Bytes that are no UTF-8 become surrogates, which makes their row an error and leaves the others whole.
        file = sys.stdin.fileno() if source == "-" else source
        with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="", closefd=source != "-") as stream:
            yield from {"csv": _read_csv, "jsonl": _read_jsonl, "text": _read_text}[file_format](stream, column)
    except OSError as error:
        raise InputError(f"--input {source} cannot be read: {error}") from error


def _refuse_other_encodings(source: str) -> None:
    """Raises an InputError for what would be read as text and is none: UTF-16 and compressed files."""
    if source != "-":
        with open(source, "rb") as stream:
            start = stream.read(4)
        if start.startswith((b"\xff\xfe", b"\xfe\xff", b"\x1f\x8b", b"PK\x03\x04")):
            raise InputError(f"--input {source} is compressed or UTF-16; unpack it or convert it to UTF-8.")


def _read_text(stream: Iterable[str], column: str) -> Iterator[Row]:
    for line in stream:
        yield line.rstrip("\r\n"), None


def _read_csv(stream: Iterable[str], column: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(stream)
    if column not in (reader.fieldnames or []):
        raise InputError(f"--text-column {column}: the file has the columns {', '.join(reader.fieldnames or [])}.")
    while True:
        try:
            yield next(reader)[column], None
        except StopIteration:
            return
        except csv.Error as error:
            yield None, f"is no csv: {error}"


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


def _open_parquet(source: str) -> Any:
    pyarrow = _pyarrow()
    try:
        return pyarrow.parquet.ParquetFile(sys.stdin.buffer if source == "-" else source)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"--input {source} is no readable parquet file: {error}") from error


def _read_parquet(source: str, column: str) -> Iterator[Row]:
    file = _open_parquet(source)
    if column not in file.schema_arrow.names:
        raise InputError(f"--text-column {column}: the file has the columns {', '.join(file.schema_arrow.names)}.")
    try:
        for batch in file.iter_batches(CHUNK_ROWS, columns=[column]):
            for value in batch.column(0):
                yield value.as_py(), None
    except (_pyarrow().ArrowException, OSError) as error:
        raise InputError(f"--input {source} breaks off: {error}") from error


def count_rows(source: str, file_format: str) -> int | None:
    """Returns the number of rows where the file states it."""
    return _open_parquet(source).metadata.num_rows if file_format == "parquet" and source != "-" else None


def annotate(rows: Iterable[Row], run: Callable[[list[str]], list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Yields a result for every row, in their order: its number, its text, and its record or an error."""
    from pipeline_multitask import text_problem

    numbered = enumerate(rows)
    while chunk := list(islice(numbered, CHUNK_ROWS)):
        problems = {row: reason or text_problem(value) for row, (value, reason) in chunk}
        records = iter(run([value for row, (value, _) in chunk if problems[row] is None]))
        for row, (value, _) in chunk:
            if problems[row] is None:
                yield {"row": row, "text": value, "error": None, **next(records)}
            else:
                yield {"row": row, "text": None, "error": f"row {row} {problems[row]}"}


def to_json(result: dict[str, Any]) -> str:
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


def write_jsonl(results: Iterable[dict[str, Any]], stream: Any) -> None:
    """Writes one line of JSON per result."""
    for result in results:
        stream.write(to_json(result) + "\n")


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


def write_parquet(results: Iterable[dict[str, Any]], path: Path, schema: Any) -> None:
    """Writes results in row groups."""
    arrow = _pyarrow()
    results = iter(results)
    with arrow.parquet.ParquetWriter(path, schema) as writer:
        while chunk := list(islice(results, CHUNK_ROWS)):
            columns = {name: [result.get(name) for result in chunk] for name in schema.names}
            writer.write_table(arrow.table(columns, schema=schema))


def summary(result: dict[str, Any], colour: bool) -> str:
    """Returns a result as a few readable lines: entities in their places, labels with scores, the vector's start."""
    if result["error"]:
        return result["error"]
    paint = (lambda text, code: f"\033[{code}m{text}\033[0m") if colour else (lambda text, code: text)
    lines = []
    for name, found in result.get("entities", {}).items():
        lines.append(f"{name:<12}" + mark_entities(result["text"], found, paint))
    for name, answer in result.get("labels", {}).items():
        scores = answer.get("scores", answer.get("values"))
        ranked = sorted(scores.items(), key=lambda item: -item[1])
        best = answer.get("labels", [ranked[0][0]])
        parts = [paint(f"{label} {score:.2f}", 1 if label in best else 2) for label, score in ranked]
        lines.append(f"{name:<12}" + "  ".join(parts))
    if "sentence_embedding" in result:
        vector = result["sentence_embedding"]
        lines.append(f"{'embedding':<12}{len(vector)} numbers: " + " ".join(f"{x:.3f}" for x in vector[:6]) + " …")
    return "\n".join(lines)


def mark_entities(text: str, entities: list[dict[str, Any]], paint: Callable[[str, int], str]) -> str:
    """Returns the text with each entity in brackets, followed by its group and score."""
    parts, end = [], 0
    for entity in entities:
        group = entity["entity_group"]
        marked = f"[{entity['word']} {group} {entity['score']:.2f}]"
        parts += [text[end : entity["start"]], paint(marked, COLOURS.get(group, 33))]
        end = entity["end"]
    return "".join([*parts, text[end:]])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the checked command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="*", metavar="TEXT")
    parser.add_argument("--input", help='a csv, jsonl, parquet or text file; "-" is standard input')
    parser.add_argument(
        "--input-format", choices=INPUT_FORMATS, help="default: by the file's ending; text if it says nothing"
    )
    parser.add_argument("--text-column", help='column or field that holds the text (default: "text")')
    parser.add_argument("--output", type=Path, help="a .jsonl or .parquet file; default: standard output")
    parser.add_argument("--overwrite", action="store_true", help="replace an output file that exists")
    parser.add_argument("--json", action="store_true", help="print one JSON record per line")
    parser.add_argument(
        "--tasks",
        type=lambda names: [name.strip() for name in names.split(",")],
        help="tasks to compute, separated by commas; default: all",
    )
    parser.add_argument("--no-embedding", action="store_true", help="leave out the sentence embedding")
    parser.add_argument(
        "--model", default=str(Path(__file__).parent), help="folder or Hub id, whose code is run; default: this repository"
    )
    parser.add_argument("--revision", help="commit, tag or branch of a model on the Hub")
    parser.add_argument("--device", help='for instance "cpu" or "cuda:0"; default: a GPU if there is one')
    parser.add_argument("--batch-tokens", type=int, help="tokens in one batch, padding included")
    args = parser.parse_args(argv)
    if bool(args.texts) == bool(args.input):
        parser.error("give either texts or --input FILE")
    if args.output and args.output.suffix not in (".jsonl", ".parquet"):
        parser.error(f"--output {args.output}: the name must end in .jsonl or .parquet")
    if args.output and args.output.exists() and not args.overwrite:
        parser.error(f"--output {args.output} exists; choose another name or add --overwrite")
    if args.output and not args.output.parent.is_dir():
        parser.error(f"--output {args.output}: there is no folder {args.output.parent}")
    if args.input and not args.input_format:
        ending = Path(args.input).suffix.lower()
        if ending not in ENDINGS:
            parser.error(f"--input {args.input}: say what it holds with --input-format ({', '.join(INPUT_FORMATS)})")
        args.input_format = ENDINGS[ending]
    if args.text_column and args.input_format in (None, "text"):
        parser.error(
            "--text-column needs an input of rows with columns; say which with --input-format csv, jsonl or parquet"
        )
    args.text_column = args.text_column or "text"
    return args


def load_pipeline(args: argparse.Namespace) -> Any:
    """Returns the multitask pipeline of the model that the command line names."""
    from transformers import pipeline
    from transformers.utils import logging

    logging.disable_progress_bar()
    options = {name: value for name, value in (("device", args.device), ("revision", args.revision)) if value}
    try:
        return pipeline("multitask", model=args.model, trust_remote_code=True, **options)
    except Exception as error:  # whatever it is, the model is what the user has to mend
        raise InputError(f"--model {args.model} cannot be loaded: {error}") from error


def run(args: argparse.Namespace) -> int:
    """Annotates what the command line names; returns the number of rows that could not be."""
    pipe = load_pipeline(args)
    options = {"tasks": args.tasks, "embedding": not args.no_embedding, "batch_tokens": args.batch_tokens}
    pipe([], **options)  # refuses unknown tasks before anything is read
    rows: Iterable[Row] = [(text, None) for text in args.texts]
    total = len(args.texts)
    if args.input:
        total = count_rows(args.input, args.input_format)
        rows = read_rows(args.input, args.input_format, args.text_column)
    failed = 0

    def watched() -> Iterator[dict[str, Any]]:
        nonlocal failed
        from tqdm import tqdm

        results = annotate(rows, lambda texts: pipe(texts, **options))
        for result in tqdm(results, total=total, unit=" texts", disable=not args.output):
            failed += result["error"] is not None
            yield result

    if args.output:
        _write_file(watched(), args, pipe.model.config)
    elif args.json or args.input:
        sys.stdout.reconfigure(encoding="utf-8")
        write_jsonl(watched(), sys.stdout)
    else:
        sys.stdout.reconfigure(errors="replace")  # a console that cannot show a character shows "?"
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        print("\n\n".join(summary(result, colour) for result in watched()))
    return failed


def _write_file(results: Iterator[dict[str, Any]], args: argparse.Namespace, config: Any) -> None:
    """Writes to a temporary name first, so that the output is either whole or not there."""
    partial = args.output.with_name(args.output.name + ".partial")
    try:
        if args.output.suffix == ".parquet":
            specs = {name: spec for name, spec in config.task_specs.items() if args.tasks is None or name in args.tasks}
            dim = None if args.no_embedding else config.embedding_dim or config.hidden_size
            write_parquet(results, partial, arrow_schema(specs, dim))
        else:
            with open(partial, "w", encoding="utf-8") as stream:
                write_jsonl(results, stream)
        os.replace(partial, args.output)
    finally:
        partial.unlink(missing_ok=True)


def main() -> None:
    args = parse_args()
    try:
        failed = run(args)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (InputError, ValueError, OSError) as error:
        sys.exit(f"annotate.py: {error}")
    if failed:
        print(f"annotate.py: {failed} rows could not be annotated; see their 'error' fields.", file=sys.stderr)


if __name__ == "__main__":
    main()
