"""Embeds, classifies and tags texts from the command line.

    python annotate.py "Tim Cook opened Apple's new store in Paris. I love it!"
    python annotate.py --input reviews.csv --text-column review --output reviews.parquet

Without --output, results are printed. In a file, each result has the number of its input row. A row that cannot be
annotated stays in its place, with the reason in its "error" field, and is listed in OUTPUT.rejects.jsonl.

Files are written in parts, and --resume continues from the parts of a run that was stopped or killed. With --engine ray,
input and output are folders. Ray runs on this machine, or on the cluster that RAY_ADDRESS names; all of its machines must
see both folders.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from bulk.annotator import Annotator, Settings, annotate
from bulk.parts import Output, to_json
from bulk.run import Progress, annotate_file
from bulk.sources import INPUT_FORMATS, ROWS, SUFFIXES, InputError, Row, Source, chunks

COLOURS = {"PER": 35, "ORG": 36, "LOC": 32}  # ANSI; other entities are yellow, labels bold


class Bar(Progress, AbstractContextManager):
    """Shows on standard error the progress of a run, its speed and the time left.

    `total` is the number of units to expect, if it is known. If the unit is not texts, each call of `add` counts one.
    """

    def __init__(self, total: int | None, unit: str = " texts") -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=total, unit=unit, smoothing=0)

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def skip(self, rows: int) -> None:
        self.bar.initial += rows  # the rate is this run's alone
        self.bar.update(rows)

    def add(self, rows: int, tokens: int) -> None:
        super().add(rows, tokens)
        seconds = self.bar.format_dict["elapsed"]
        is_rows = self.bar.unit == " texts"
        rates = [] if is_rows else [f"{self.rows / seconds:,.0f} texts/s"]
        self.bar.set_postfix_str(", ".join([*rates, f"{self.tokens / seconds:,.0f} tokens/s"]), refresh=False)
        self.bar.update(rows if is_rows else 1)


SHOWN = 5  # labels of a task in the readable output


def summary(result: dict[str, Any], colour: bool) -> str:
    """Returns a result as a few readable lines: entities marked in the text, labels with scores, the start of the vector."""
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
        parts = [paint(f"{label} {score:.2f}", 1 if label in best else 2) for label, score in ranked[:SHOWN]]
        lines.append(f"{name:<12}" + "  ".join(parts) + (" …" if len(ranked) > SHOWN else ""))
    if "sentence_embedding" in result:
        vector = result["sentence_embedding"]
        lines.append(f"{'embedding':<12}{len(vector)} dimensions: " + " ".join(f"{x:.3f}" for x in vector[:6]) + " …")
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
    """Parses and checks the command line; exits with a message if something is wrong."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        _check_input(args)
        if args.engine == "ray":
            _check_folders(args)
        elif args.output:
            _check_output(args)
        elif args.resume or args.num_workers > 1:
            raise InputError("--resume and --num-workers need a file to write; name it with --output")
    except InputError as error:
        parser.error(str(error))
    args.text_column = args.text_column or "text"
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("texts", nargs="*", metavar="TEXT")
    add("--input", help='a csv, jsonl, parquet or text file; "-": standard input; with Ray, a folder of such files')
    add("--input-format", choices=INPUT_FORMATS, help="default: by the file's suffix; text if it has none")
    add("--text-column", help='column or field that holds the text (default: "text")')
    add("--output", type=Path, help="a .jsonl or .parquet file; with Ray, a folder; default: standard output")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace an existing output, or a run that was stopped")
    existing.add_argument("--resume", action="store_true", help="continue a run that was stopped, if there is one")
    add("--json", action="store_true", help="print one JSON record per line")
    names = {"type": lambda names: [name.strip() for name in names.split(",")]}
    add("--tasks", **names, help="tasks to compute, separated by commas; default: all")
    add("--no-embedding", action="store_true", help="leave out the sentence embedding")
    model = str(Path(__file__).parent)
    add("--model", default=model, help="folder or Hub id; its code is executed; default: this repository")
    add("--revision", help="commit, tag or branch of a model on the Hub")
    add("--device", help='for instance "cpu" or "cuda:0"; default: a GPU if there is one, with Ray the CPU')
    add("--backend", choices=("torch", "onnx", "onnx-int8"), help="what runs the model; default: torch")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of PyTorch; default: float32")
    add("--batch-tokens", type=int, help="tokens per batch, padding included")
    add("--num-workers", type=int, default=1, help="processes that share the CPU and the weights; default: 1")
    add("--engine", choices=("local", "ray"), default="local", help="what runs the workers (ray: pip install 'ray[data]')")
    return parser


def _check_input(args: argparse.Namespace) -> None:
    if bool(args.texts) == bool(args.input):
        raise InputError("give texts or --input FILE, one of the two")
    if args.dtype and args.backend not in (None, "torch"):
        raise InputError(f"--dtype {args.dtype} is for PyTorch; leave it out, or leave out --backend {args.backend}")
    if args.device not in (None, "cpu") and args.backend not in (None, "torch"):
        raise InputError(f"--device {args.device} is for PyTorch; --backend {args.backend} runs on the CPU")
    if args.num_workers < 1:
        raise InputError(f"--num-workers is {args.num_workers}; it must be at least 1")
    if args.engine == "ray":
        return
    if args.input and not args.input_format:
        suffix, known = Path(args.input).suffix.lower(), ", ".join(INPUT_FORMATS)
        if suffix not in SUFFIXES:
            raise InputError(f"--input {args.input}: the suffix is unknown; name the format with --input-format ({known})")
        args.input_format = SUFFIXES[suffix]
    if args.text_column and args.input_format in (None, "text"):
        raise InputError(
            "--text-column needs an input with columns; name its format with --input-format csv, jsonl or parquet"
        )


def _check_output(args: argparse.Namespace) -> None:
    path, output = args.output, Output(args.output)
    if path.suffix not in (".jsonl", ".parquet"):
        raise InputError(f"--output {path}: the name must end in .jsonl or .parquet")
    if not path.parent.is_dir():
        raise InputError(f"--output {path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise InputError(f"--output {path} is a folder; choose another name")
    written = [x.resolve() for x in (path, output.rejects, output.record)]
    if args.input and Path(args.input).resolve() in written:
        raise InputError(f"--output {path} would overwrite the input; choose another name")
    if args.resume and not (args.input and Path(args.input).is_file()):
        raise InputError("--resume needs --input FILE; standard input and pipes cannot be read again")
    is_new = not (args.resume or args.overwrite)
    if output.is_unfinished() and is_new:
        raise InputError(
            f"--output {path}: {output.partial} holds a run that was stopped; continue it with --resume, or start again "
            "with --overwrite"
        )
    for existing in (path, output.rejects):
        if is_new and existing.exists():
            raise InputError(f"--output {path}: {existing} exists; choose another name or add --overwrite")


def _check_folders(args: argparse.Namespace) -> None:
    if not (args.input and args.output and Path(args.input).is_dir()):
        raise InputError("--engine ray needs a folder of files as --input and a folder as --output")
    if args.overwrite:
        raise InputError("--overwrite is for files; with --engine ray, remove the folder or continue with --resume")
    if args.output.exists() and not args.resume and any(args.output.iterdir()):
        raise InputError(f"--output {args.output} is not empty; choose another folder or add --resume")


def run(args: argparse.Namespace) -> int:
    """Annotates the texts, the file or the folder; returns the number of rows that could not be annotated."""
    names = ("model", "revision", "device", "backend", "dtype", "tasks", "batch_tokens")
    settings = Settings(embedding=not args.no_embedding, **{name: getattr(args, name) for name in names})
    if args.engine == "ray":
        from bulk.ray_engine import Folders, annotate_folder

        folders = Folders(Path(args.input), args.output, args.input_format, args.text_column)
        return annotate_folder(folders, settings, args.num_workers, args.resume, Bar)
    source = Source(args.input, args.input_format, args.text_column) if args.input else None
    rows = source.rows() if source else [(text, None) for text in args.texts]
    return _write_file(args, settings, source, rows) if args.output else _print(args, settings, rows)


def _print(args: argparse.Namespace, settings: Settings, rows: Iterable[Row]) -> int:
    annotator = Annotator(settings)
    results = (result for chunk in chunks(rows) for result in annotate(chunk, annotator))
    as_json, failed = bool(args.json or args.input), 0
    if as_json:
        sys.stdout.reconfigure(encoding="utf-8")
    else:
        sys.stdout.reconfigure(errors="replace")  # characters that the console cannot show become "?"
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for number, result in enumerate(results):
        failed += result["error"] is not None
        print(to_json(result) if as_json else "\n" * (number > 0) + summary(result, colour))
    return failed


def _write_file(args: argparse.Namespace, settings: Settings, source: Source | None, rows: Iterable[Row]) -> int:
    identity = source.identity() if source else {}
    annotator = Annotator(settings.divided(args.num_workers))
    with Bar(identity.get(ROWS) if source else len(args.texts)) as bar:
        identity |= {**annotator.identity(), "--num-workers": args.num_workers}
        failed = annotate_file(rows, Output(args.output), annotator, identity, bar, args.resume, args.num_workers)
    if args.resume and not bar.rows:
        print(f"annotate.py: {args.output} is complete; there was nothing left to compute.", file=sys.stderr)
    return failed


def _report(error: BaseException, args: argparse.Namespace) -> None:
    notes = getattr(error, "__notes__", [])
    if notes:
        again = args.engine == "ray" or (args.input and Path(args.input).is_file())
        notes.append("Continue with --resume." if again else "Start again with --overwrite; only files can be resumed.")
    what = "stopped" if isinstance(error, KeyboardInterrupt) else str(error).removesuffix(".")
    print(f"annotate.py: {what}.", *notes, file=sys.stderr)


def main() -> None:
    args = parse_args()

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt(number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        failed = run(args)
    except KeyboardInterrupt as error:
        _report(error, args)
        sys.exit(128 + (signal.SIGTERM if error.args else signal.SIGINT))  # `stop` alone gives an argument
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (InputError, ValueError, OSError) as error:
        _report(error, args)
        sys.exit(1)
    finally:
        signal.signal(signal.SIGTERM, before)
    if failed:
        rejects = args.output / "_rejects" if args.engine == "ray" else args.output and Output(args.output).rejects
        place = rejects or "their 'error' fields"
        print(f"annotate.py: {failed} rows could not be annotated; see {place}.", file=sys.stderr)


if __name__ == "__main__":
    main()
