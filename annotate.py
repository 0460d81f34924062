"""Embeds, classifies and tags texts from the command line.

    python annotate.py "Tim Cook opened Apple's new store in Paris. I love it!"
    python annotate.py --input reviews.csv --text-column review --output reviews.parquet

Without --output, results go to standard output. In a file, each result carries the number of its input row; a row
that cannot be annotated is kept, with the reason in its "error" field, and listed in OUTPUT.rejects.jsonl.

A file is written in parts that survive whatever stops the run; --resume goes on from them. With --engine ray, input and
output are folders, and the workers may be on many machines that all see them.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bulk

COLOURS = {"PER": 35, "ORG": 36, "LOC": 32}  # ANSI; other entities are yellow, labels bold


class Stopped(KeyboardInterrupt):
    """The process was asked to end (SIGTERM)."""


class Bar(bulk.Progress):
    """Shows on standard error how far a run is, how fast, and the time left.

    Args:
        total: How many there will be, if that is known.
        unit: Of what; if not of texts, then `add` counts one.
    """

    def __init__(self, total: int | None, unit: str = " texts") -> None:
        from tqdm import tqdm

        self.start = time.monotonic()
        self.bar = tqdm(total=total, unit=unit, smoothing=0)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def skip(self, rows: int) -> None:
        self.bar.initial += rows  # so that the rate is this run's
        self.bar.update(rows)

    def add(self, rows: int, tokens: int) -> None:
        super().add(rows, tokens)
        seconds = time.monotonic() - self.start
        is_rows = self.bar.unit == " texts"
        rates = [] if is_rows else [f"{self.rows / seconds:,.0f} texts/s"]
        self.bar.set_postfix_str(", ".join([*rates, f"{self.tokens / seconds:,.0f} tokens/s"]), refresh=False)
        self.bar.update(rows if is_rows else 1)


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
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        _check_input(args)
        if args.engine == "ray":
            _check_folders(args)
        elif args.output:
            _check_output(args)
        elif args.resume or args.num_workers > 1:
            raise bulk.InputError("--resume and --num-workers write files; say where with --output")
    except bulk.InputError as error:
        parser.error(str(error))
    args.text_column = args.text_column or "text"
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("texts", nargs="*", metavar="TEXT")
    add("--input", help='a csv, jsonl, parquet or text file; "-" is standard input; a folder of such files for Ray')
    add("--input-format", choices=bulk.INPUT_FORMATS, help="default: by the file's ending; text if it says nothing")
    add("--text-column", help='column or field that holds the text (default: "text")')
    add("--output", type=Path, help="a .jsonl or .parquet file, or a folder for Ray; default: standard output")
    add("--overwrite", action="store_true", help="replace an output file that exists, or what is there of it")
    add("--resume", action="store_true", help="go on where an earlier run was stopped, if one was")
    add("--json", action="store_true", help="print one JSON record per line")
    names = {"type": lambda names: [name.strip() for name in names.split(",")]}
    add("--tasks", **names, help="tasks to compute, separated by commas; default: all")
    add("--no-embedding", action="store_true", help="leave out the sentence embedding")
    model = str(Path(__file__).parent)
    add("--model", default=model, help="folder or Hub id, whose code is run; default: this repository")
    add("--revision", help="commit, tag or branch of a model on the Hub")
    add("--device", help='for instance "cpu" or "cuda:0"; default: a GPU if there is one, with Ray the CPU')
    add("--backend", choices=("torch", "onnx", "onnx-int8"), help="what runs the model; default: torch")
    add("--batch-tokens", type=int, help="tokens in one batch, padding included")
    add("--num-workers", type=int, default=1, help="processes that compute, sharing the CPU and the weights; default: 1")
    add("--engine", choices=("local", "ray"), default="local", help="what runs the workers (ray: pip install 'ray[data]')")
    return parser


def _check_input(args: argparse.Namespace) -> None:
    if bool(args.texts) == bool(args.input):
        raise bulk.InputError("give either texts or --input FILE")
    if args.num_workers < 1:
        raise bulk.InputError(f"--num-workers {args.num_workers}: at least one must work")
    if args.engine == "ray":
        return
    if args.input and not args.input_format:
        ending, known = Path(args.input).suffix.lower(), ", ".join(bulk.INPUT_FORMATS)
        if ending not in bulk.ENDINGS:
            raise bulk.InputError(f"--input {args.input}: say what it holds with --input-format ({known})")
        args.input_format = bulk.ENDINGS[ending]
    if args.text_column and args.input_format in (None, "text"):
        raise bulk.InputError(
            "--text-column needs an input of rows with columns; say which with --input-format csv, jsonl or parquet"
        )


def _check_output(args: argparse.Namespace) -> None:
    output = args.output
    if output.suffix not in (".jsonl", ".parquet"):
        raise bulk.InputError(f"--output {output}: the name must end in .jsonl or .parquet")
    if not output.parent.is_dir():
        raise bulk.InputError(f"--output {output}: there is no folder {output.parent}")
    if output.is_dir() or (args.input and output.resolve() == Path(args.input).resolve()):
        raise bulk.InputError(f"--output {output} is {'a folder' if output.is_dir() else 'the input'}; choose another name")
    if args.resume and not (args.input and Path(args.input).is_file()):
        raise bulk.InputError("--resume needs --input FILE: what is no file, such as standard input, cannot be read again")
    if args.resume or args.overwrite:
        return
    if bulk.is_unfinished(output):
        folder = bulk.partial_folder(output)
        raise bulk.InputError(
            f"--output {output}: {folder} holds a run that was stopped; go on with --resume or start again with --overwrite"
        )
    for path in (output, bulk.rejects_file(output)):
        if path.exists():
            raise bulk.InputError(f"--output {output}: {path} exists; choose another name or add --overwrite")


def _check_folders(args: argparse.Namespace) -> None:
    if not (args.input and args.output and Path(args.input).is_dir()):
        raise bulk.InputError("--engine ray reads a folder of files (--input) and writes a folder (--output)")
    if args.overwrite:
        raise bulk.InputError("--overwrite is for a file; with --engine ray, remove the folder or go on with --resume")
    if args.output.exists() and not args.resume and any(args.output.iterdir()):
        raise bulk.InputError(f"--output {args.output} is not empty; choose another folder or add --resume")


def run(args: argparse.Namespace) -> int:
    """Annotates what the command line names; returns the number of rows that could not be."""
    names = ("model", "revision", "device", "backend", "tasks", "batch_tokens")
    settings = bulk.Settings(embedding=not args.no_embedding, **{name: getattr(args, name) for name in names})
    if args.engine == "ray":
        import bulk_ray

        folders = bulk_ray.Folders(Path(args.input), args.output, args.input_format, args.text_column)
        return bulk_ray.annotate_folder(folders, settings, args.num_workers, args.resume, Bar)
    return _write_file(args, settings) if args.output else _print(args, settings)


def _source(args: argparse.Namespace) -> bulk.Source:
    return bulk.Source(args.input, args.input_format, args.text_column)


def _print(args: argparse.Namespace, settings: bulk.Settings) -> int:
    annotator = bulk.Annotator(settings)
    rows = _source(args).rows() if args.input else ((text, None) for text in args.texts)
    results = (result for chunk in bulk.chunks(rows) for result in bulk.annotate(chunk, annotator))
    failed = 0

    def watched() -> Iterator[dict[str, Any]]:
        nonlocal failed
        for result in results:
            failed += result["error"] is not None
            yield result

    if args.json or args.input:
        sys.stdout.reconfigure(encoding="utf-8")
        for result in watched():
            sys.stdout.write(bulk.to_json(result) + "\n")
    else:
        sys.stdout.reconfigure(errors="replace")  # a console that cannot show a character shows "?"
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        print("\n\n".join(summary(result, colour) for result in watched()))
    return failed


def _write_file(args: argparse.Namespace, settings: bulk.Settings) -> int:
    if args.resume and not args.overwrite and args.output.exists() and not bulk.is_unfinished(args.output):
        bulk.remove_litter(args.output)
        print(f"annotate.py: {args.output} is complete, there is nothing to resume.", file=sys.stderr)
        return 0
    source = _source(args) if args.input else None
    total = source.count() if source else len(args.texts)
    annotator = bulk.Annotator(settings.divided(args.num_workers))
    identity = {**(source.identity() if source else {}), **annotator.identity(), "--num-workers": args.num_workers}
    rows = source.rows() if source else [(text, None) for text in args.texts]
    with Bar(total) as bar:
        return bulk.annotate_file(rows, args.output, annotator, identity, bar, args.resume, args.num_workers)


def _stop(number: int, frame: Any) -> None:
    raise Stopped


def _report(error: BaseException, args: argparse.Namespace) -> None:
    notes = getattr(error, "__notes__", [])
    if notes:
        again = args.engine == "ray" or (args.input and Path(args.input).is_file())
        notes.append("--resume goes on from it." if again else "--overwrite starts again; no file, no --resume.")
    what = "stopped" if isinstance(error, KeyboardInterrupt) else str(error).removesuffix(".")
    print(f"annotate.py: {what}.", *notes, file=sys.stderr)


def _rejects(args: argparse.Namespace) -> str:
    if args.engine == "ray":
        return str(args.output / "_rejects")
    return str(bulk.rejects_file(args.output)) if args.output else "their 'error' fields"


def main() -> None:
    args = parse_args()
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        failed = run(args)
    except KeyboardInterrupt as error:
        _report(error, args)
        sys.exit(128 + (signal.SIGTERM if isinstance(error, Stopped) else signal.SIGINT))
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (bulk.InputError, ValueError, OSError) as error:
        _report(error, args)
        sys.exit(1)
    finally:
        signal.signal(signal.SIGTERM, before)
    if failed:
        print(f"annotate.py: {failed} rows could not be annotated; see {_rejects(args)}.", file=sys.stderr)


if __name__ == "__main__":
    main()
