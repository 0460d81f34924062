"""Measures speed side by side: `make bench`, or `python -m benchmarks.run --data DIR`.

Each way of working runs over the same texts, in rounds, each round in another order. What counts are the ratios of two
times of the same round, so that a machine that slows down for a while slows both; given are their medians and quartiles.
A ratio of entities per second also counts what each finds. Results go to results/benchmarks.json, with a picture beside it.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from transformers import pipeline

from benchmarks.rivals import SPACY, Finder, load_rivals
from common.data import load_split
from common.files import ROOT, environment_info
from pipeline_multitask import CPU_BATCH_TOKENS, ONNX_FILES, length_batches, pad_windows


class Ratio(NamedTuple):
    """What is compared: the times of two jobs, for a throughput the other's above ours.

    Attributes:
        title: What it is.
        above: Name of the job whose time stands above the line.
        below: Name of the job whose time stands below it.
        must: The limit that has to hold.
        aim: What would be good.
        per_entity: Whether the two are compared by the time for an entity in place of a text.
    """

    title: str
    above: str
    below: str
    must: float | None = None
    aim: float | None = None
    per_entity: bool = False


ENCODE = "SentenceTransformer.encode"
ALONE = {"embedding alone": {"tasks": []}, "labels and entities alone": {"embedding": False}}
RATIOS = [
    Ratio("throughput: one pass / three single-task passes", "three passes", "pipeline", 2.0, 2.3),
    Ratio(f"throughput: pipeline / {ENCODE}", ENCODE, "pipeline", 1.0, 1.2),
    Ratio(f"throughput: pipeline on ONNX / {ENCODE}", ENCODE, "pipeline, onnx"),
    Ratio(f"throughput: pipeline on int8 / {ENCODE}", ENCODE, "pipeline, onnx-int8", 1.7, 2.4),
    Ratio(f"throughput: embedding alone / {ENCODE}", ENCODE, "embedding alone"),
    Ratio(f"throughput: embedding alone on ONNX / {ENCODE}", ENCODE, "embedding alone, onnx"),
    Ratio(f"throughput: embedding alone on int8 / {ENCODE}", ENCODE, "embedding alone, onnx-int8", 2.3, 3.0),
    Ratio("time: all outputs / bare encoder, same batches", "all outputs", "bare encoder"),
    Ratio(f"throughput: labels and entities alone / {SPACY}", SPACY, "labels and entities alone"),
    Ratio(f"throughput: labels and entities alone on ONNX / {SPACY}", SPACY, "labels and entities alone, onnx"),
    Ratio(
        f"throughput: labels and entities alone on int8 / {SPACY}", SPACY, "labels and entities alone, onnx-int8", 1.0, 1.5
    ),
    Ratio(f"entities per second: pipeline / {SPACY}", SPACY, "pipeline", per_entity=True),
    Ratio(f"entities per second: pipeline on int8 / {SPACY}", SPACY, "pipeline, onnx-int8", per_entity=True),
]
OPTIONAL_LIBRARIES = ("onnxruntime", "spacy")
DOCUMENT_ROWS = 7  # consecutive sentences that make a document: long, and within the window, so that nobody cuts it


Job = Callable[[], int | None]  # does the work once; returns how many entities it has found, None if it looks for none


def read_texts(data: Path, count: int) -> list[str]:
    """Returns the given number of texts: half tweets, the rest sentences of the news, and one in twenty a longer document."""
    documents = count // 20
    sentences = [" ".join(tokens) for tokens in load_split(str(data / "conll2003"), "test", ["tokens"])["tokens"]]
    tweets = load_split(str(data / "tweet_sentiment"), "test", ["text"])["text"]
    long = [" ".join(sentences[start : start + DOCUMENT_ROWS]) for start in range(0, len(sentences), DOCUMENT_ROWS)]
    texts = [*tweets[: count // 2], *long[:documents]]
    texts += (sentences * (count // len(sentences) + 1))[: count - len(texts)]
    return [texts[i] for i in np.random.default_rng(13).permutation(len(texts))]


def forward_jobs(pipe: Any, texts: list[str]) -> dict[str, Job]:
    """Returns the forward passes alone, on the pipeline's own batches: of the encoder, and with all outputs."""
    tasks, pad_token_id = list(pipe.model.config.tasks), pipe.tokenizer.pad_token_id or 0
    batches = [
        {name: torch.from_numpy(value) for name, value in pad_windows(windows, pad_token_id).items()}
        for windows in length_batches(pipe.annotator.windows(texts, tasks), CPU_BATCH_TOKENS)
    ]

    @torch.inference_mode()
    def encoder() -> None:
        for batch in batches:
            pipe.model.encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])

    @torch.inference_mode()
    def everything() -> None:
        for batch in batches:
            pipe.model(**batch)

    return {"bare encoder": encoder, "all outputs": everything}


def three_passes(pipe: Any, texts: list[str]) -> Job:
    """Returns what people do without a shared encoder: separate embedding, sentiment and entity models."""
    heads = sorted(pipe.model.config.task_specs.items(), key=lambda item: item[1].kind)
    singles = [heads[0][0], heads[-1][0]]  # one of texts, one of words: what a model for each alone would compute

    def run() -> None:
        pipe(texts, tasks=[])
        for name in singles:
            pipe(texts, tasks=[name], embedding=False)

    return run


def encode_job(encoder: Any, texts: list[str]) -> Job:
    """Returns sentence-transformers' way to the embedding alone."""

    def run() -> None:
        encoder.encode(texts)

    return run


def pipeline_job(pipe: Any, texts: list[str], **options: Any) -> Job:
    """Returns the pipeline with all outputs, or with those that the options ask for."""
    return lambda: sum(len(found) for record in pipe(texts, **options) for found in record.get("entities", {}).values())


def load_pipes(model: str) -> dict[str, Any]:
    """Returns the pipeline on each backend that this folder holds an export for, by the backend's name."""
    found = ["torch"]
    if find_spec("onnxruntime"):
        found += [backend for backend, file in ONNX_FILES.items() if (Path(model) / file).exists()]
    options = {"model": model, "trust_remote_code": True, "device": "cpu"}
    return {backend: pipeline("multitask", backend=backend, **options) for backend in found}


def all_jobs(pipes: dict[str, Any], encoder: Any, rivals: dict[str, Finder], texts: list[str]) -> dict[str, Job]:
    """Returns every way of working that is installed, each over the same texts, by its name."""
    jobs = forward_jobs(pipes["torch"], texts)
    jobs[ENCODE] = encode_job(encoder, texts)
    jobs["three passes"] = three_passes(pipes["torch"], texts)
    for backend, pipe in pipes.items():
        for name, options in {"pipeline": {}, **ALONE}.items():
            jobs[name if backend == "torch" else f"{name}, {backend}"] = pipeline_job(pipe, texts, **options)
    return jobs | {name: partial(find, texts) for name, find in rivals.items()}


def run_rounds(
    jobs: dict[str, Job], rounds: int, log: Callable[[str], None]
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Returns the seconds of every job in every round, and the entities it finds; round r starts with the r-th job."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    entities: dict[str, int] = {}
    names = list(jobs)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            found = jobs[name]()
            seconds[name].append(time.perf_counter() - start)
            log(f"round {turn + 1} of {rounds}: {name} {seconds[name][-1]:.2f} s")
            if found is not None:
                entities[name] = found
    return seconds, entities


def compare(seconds: dict[str, list[float]], entities: dict[str, int]) -> list[dict[str, Any]]:
    """Returns each ratio whose two jobs have run (and found any), with its quartiles over the rounds."""
    rows = []
    for ratio in RATIOS:
        names = [name for name in (ratio.above, ratio.below) if name in seconds]
        counts = [entities.get(name, 0) if ratio.per_entity else 1 for name in names]
        if len(names) == 2 and all(counts):
            weight = counts[1] / counts[0]
            values = [weight * a / b for a, b in zip(seconds[ratio.above], seconds[ratio.below], strict=True)]
            low, middle, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
            limits = {"must": ratio.must, "aim": ratio.aim}
            rows.append({"ratio": ratio.title, "median": middle, "quartiles": [low, high], **limits})
    return rows


def rates(seconds: dict[str, list[float]], entities: dict[str, int], texts: int) -> dict[str, dict[str, float]]:
    """Returns how many texts each job does in a second, and how many entities it finds, by its median round."""
    found = {}
    for name, values in seconds.items():
        found[name] = {"texts_per_second": texts / statistics.median(values)}
        if name in entities:
            found[name]["entities_per_second"] = entities[name] / statistics.median(values)
    return found


def shares(pipe: Any, texts: list[str]) -> dict[str, float]:
    """Returns which share of the pipeline's time goes where; they add up to 1."""
    annotator, tasks, vector = pipe.annotator, list(pipe.model.config.tasks), "sentence_embedding"
    marks = [time.perf_counter()]
    windows = annotator.windows(texts, tasks)
    marks.append(time.perf_counter())
    for batch in length_batches(windows, CPU_BATCH_TOKENS):
        annotator.run(batch, tasks, vector)
    marks.append(time.perf_counter())
    annotator.records(texts, windows, tasks, vector)
    marks.append(time.perf_counter())
    parts = np.diff(marks) / (marks[-1] - marks[0])
    return dict(zip(("tokenization", "forward", "decoding"), parts.tolist(), strict=True))


def flops_per_second(tokens: int, hidden: int, inner: int) -> float:
    """Returns the floating-point operations a second that this machine does in the encoder's own matrix products."""
    x, up, down = torch.randn(tokens, hidden), torch.randn(hidden, inner), torch.randn(inner, hidden)
    for _ in range(3):
        x @ up @ down
    rates = []
    for _ in range(30):
        start = time.perf_counter()
        x @ up @ down
        rates.append(4 * tokens * hidden * inner / (time.perf_counter() - start))
    return statistics.median(rates)


def encoder_flops(config: Any, windows: list[Any]) -> float:
    """Returns the floating-point operations of the encoder's matrix products over all windows, without padding."""
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    lengths = np.array([len(window.input_ids) for window in windows], dtype=float)
    per_token = 2 * layers * (4 * hidden**2 + 2 * hidden * inner)
    return float((lengths * per_token + 4 * layers * hidden * lengths**2).sum())


def roofline(pipe: Any, texts: list[str], seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Returns which share of the machine's float32 matrix-product rate the bare encoder reaches, counting useful work alone."""
    config = pipe.model.config
    work = encoder_flops(config, pipe.annotator.windows(texts, []))
    peak = flops_per_second(CPU_BATCH_TOKENS, config.hidden_size, config.intermediate_size)
    share = work / statistics.median(seconds["bare encoder"]) / peak
    return {"encoder_operations": work, "operations_per_second": peak, "share_of_peak": share}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws the ratios with their quartiles, the limit as a line and the aim as a dot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 0.6 * len(rows) + 1), layout="constrained")
    for place, row in enumerate(reversed(rows)):
        axes.barh(place, row["median"], color="tab:blue", height=0.5)
        axes.plot(row["quartiles"], [place, place], color="gray", linewidth=3)
        for value, marker in ((row["must"], "|"), (row["aim"], "o")):
            if value:
                axes.plot(value, place, marker, color="tab:orange", markersize=12 if marker == "|" else 6)
    axes.set_yticks(range(len(rows)), [row["ratio"] for row in reversed(rows)])
    axes.set_xscale("log")
    axes.axvline(1, color="gray", linewidth=1)
    axes.set_xlabel("median over rounds; gray: quartiles\norange: what must hold (line), what we aim at (dot)")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def show(rows: list[dict[str, Any]]) -> str:
    """Returns the comparison as a table for a console."""
    lines = [f"{'':<68} {'median':>7}  quartiles      must   aim"]
    for row in rows:
        low, high = row["quartiles"]
        limits = "  ".join(f"{row[key]:5.2f}" if row[key] else "    –" for key in ("must", "aim"))
        lines.append(f"{row['ratio']:<68} {row['median']:7.2f}  {low:.2f} to {high:.2f}  {limits}")
    return "\n".join(lines)


def positive(text: str) -> int:
    """Returns a number from a command line, which must be at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not allowed: give a number from 1 up")
    return int(text)


def make_parser(description: str | None, texts: int, output: str) -> argparse.ArgumentParser:
    """Returns a parser of the options of whatever measures speed.

    Args:
        description: What the program does.
        texts: How many texts it reads by default.
        output: Where it writes by default, from the repository's root.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT), help="folder of a release; default: this repository")
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets conll2003 and tweet_sentiment")
    parser.add_argument("--texts", type=positive, default=texts)
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="of torch and ONNX Runtime")
    parser.add_argument("--output", type=Path, default=ROOT / output)
    return parser


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Writes a measurement, with what it depends on."""
    result = {**result, **environment_info()}
    result["libraries"] |= {name: version(name) for name in OPTIONAL_LIBRARIES if find_spec(name)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", "utf-8")


def main() -> None:
    parser = make_parser(__doc__, 10_000, "results/benchmarks.json")
    parser.add_argument("--rounds", type=positive, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    texts, pipes, rivals = read_texts(args.data, args.texts), load_pipes(args.model), load_rivals()
    encoder = SentenceTransformer(args.model, device="cpu")
    run_rounds(all_jobs(pipes, encoder, rivals, texts[:64]), 1, lambda line: None)  # warm-up
    jobs = all_jobs(pipes, encoder, rivals, texts)
    seconds, entities = run_rounds(jobs, args.rounds, lambda line: print(line, file=sys.stderr))
    rows = compare(seconds, entities)
    print(show(rows))
    result = {
        "command": f"python -m benchmarks.run --data DIR --texts {args.texts} --rounds {args.rounds} --threads {args.threads}",
        "texts": len(texts),
        "tokens": sum(len(window.input_ids) for window in pipes["torch"].annotator.windows(texts, [])),
        "characters": sum(map(len, texts)),
        "ratios": rows,
        "rates": rates(seconds, entities, len(texts)),
        "seconds": seconds,
        "entities": entities,
        "shares": {backend: shares(pipe, texts) for backend, pipe in pipes.items()},
        "roofline": roofline(pipes["torch"], texts, seconds),
    }
    write_result(args.output, result)
    draw(rows, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
