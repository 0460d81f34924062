"""Measures speed side by side: `make bench`, or `python -m benchmarks.run --data DIR`.

Each way of working runs over the same texts, in rounds, each round in another order. What counts are the ratios of two
times of the same round, so that a machine that slows down for a while slows both; given are their medians and quartiles.
Results go to results/benchmarks.json, with a picture beside it.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from transformers import pipeline

from evaluation.evaluate import ROOT, surroundings
from pipeline_multitask import CPU_BATCH_TOKENS, ONNX_FILES, length_batches, pad_windows
from training.data import load_split

Job = Callable[[], Any]
# What is compared: the title, whose time is above and whose below the line, the limit that must hold and the aim.
# For a throughput the times change places.
RATIOS = [
    ("time: all outputs / bare encoder, same batches", "all outputs", "bare encoder", 1.08, 1.03),
    ("throughput: one pass / three single-task passes", "three passes", "pipeline", 2.6, 2.9),
    ("throughput: pipeline / SentenceTransformer.encode", "SentenceTransformer.encode", "pipeline", 1.0, 1.2),
    ("throughput: pipeline on ONNX / SentenceTransformer.encode", "SentenceTransformer.encode", "pipeline, onnx", None, None),
    ("throughput: pipeline on int8 / SentenceTransformer.encode", "SentenceTransformer.encode", "pipeline, onnx-int8", 1.8, 3.0),
    ("throughput: pipeline / spaCy with NER alone", "spaCy, NER alone", "pipeline", None, None),
    ("throughput: pipeline on int8 / spaCy with NER alone", "spaCy, NER alone", "pipeline, onnx-int8", None, None),
]  # fmt: skip
DOCUMENT_ROWS = 7  # consecutive sentences that make a document: long, and within the window, so that nobody cuts it


def read_texts(data: Path, count: int) -> list[str]:
    """Returns so many texts: half tweets, the rest sentences of the news, and one in twenty a longer document."""
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
        for windows in length_batches(pipe.preprocess(texts, tasks=tasks), CPU_BATCH_TOKENS)
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
    """Returns what people do without a shared encoder: an embedding, a sentiment and an entity model, each by itself."""
    heads = sorted(pipe.model.config.task_specs.items(), key=lambda item: item[1].kind)
    singles = [heads[0][0], heads[-1][0]]  # one of texts, one of words: what a model for each alone would compute

    def run() -> None:
        pipe(texts, tasks=[])
        for name in singles:
            pipe(texts, tasks=[name], embedding=False)

    return run


def spacy_job(texts: list[str]) -> Job:
    """Returns spaCy's small English pipeline with all but entities switched off."""
    import en_core_web_sm

    entities = en_core_web_sm.load(exclude=["tagger", "parser", "attribute_ruler", "lemmatizer", "senter"])
    return lambda: [document.ents for document in entities.pipe(texts)]


def load_pipes(model: str) -> dict[str, Any]:
    """Returns the pipeline on each backend that this folder holds an export for, by the backend's name."""
    found = ["torch"]
    if find_spec("onnxruntime"):
        found += [backend for backend, file in ONNX_FILES.items() if (Path(model) / file).exists()]
    options = {"model": model, "trust_remote_code": True, "device": "cpu"}
    return {backend: pipeline("multitask", backend=backend, **options) for backend in found}


def all_jobs(pipes: dict[str, Any], sentence_transformer: Any, texts: list[str]) -> dict[str, Job]:
    """Returns every way of working that is installed, each over the same texts, by its name."""
    jobs = forward_jobs(pipes["torch"], texts)
    jobs["SentenceTransformer.encode"] = lambda: sentence_transformer.encode(texts)
    jobs["three passes"] = three_passes(pipes["torch"], texts)
    for backend, pipe in pipes.items():
        jobs["pipeline" if backend == "torch" else f"pipeline, {backend}"] = lambda pipe=pipe: pipe(texts)
    if find_spec("en_core_web_sm"):
        jobs["spaCy, NER alone"] = spacy_job(texts)
    return jobs


def run_rounds(jobs: dict[str, Job], rounds: int, log: Callable[[str], None]) -> dict[str, list[float]]:
    """Returns the seconds of every job in every round; round r starts with the r-th job."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    names = list(jobs)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            jobs[name]()
            seconds[name].append(time.perf_counter() - start)
            log(f"round {turn + 1} of {rounds}: {name} {seconds[name][-1]:.2f} s")
    return seconds


def compare(seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Returns each ratio whose two jobs have run, with its quartiles over the rounds."""
    rows = []
    for title, above, below, must, aim in RATIOS:
        if above in seconds and below in seconds:
            values = [a / b for a, b in zip(seconds[above], seconds[below], strict=True)]
            low, middle, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
            rows.append({"ratio": title, "median": middle, "quartiles": [low, high], "must": must, "aim": aim})
    return rows


def shares(pipe: Any, texts: list[str]) -> dict[str, float]:
    """Returns which share of the pipeline's time goes where; they add up to 1."""
    tasks = list(pipe.model.config.tasks)
    marks = [time.perf_counter()]
    windows = pipe.preprocess(texts, tasks=tasks)
    marks.append(time.perf_counter())
    for batch in length_batches(windows, CPU_BATCH_TOKENS):
        pipe._forward(batch, tasks=tasks)
    marks.append(time.perf_counter())
    pipe.postprocess(texts, windows, tasks=tasks, embedding=True)
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
    """Returns each job's achieved share of the machine's matrix-product rate, counting useful work alone."""
    config = pipe.model.config
    work = encoder_flops(config, pipe.preprocess(texts, tasks=[]))
    peak = flops_per_second(CPU_BATCH_TOKENS, config.hidden_size, config.intermediate_size)
    names = [name for name in seconds if name not in ("three passes", "spaCy, NER alone")]
    achieved = {name: work / statistics.median(seconds[name]) / peak for name in names}
    return {"encoder_operations": work, "operations_per_second": peak, "share_of_peak": achieved}


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
    axes.set_xlabel("median over rounds; gray: quartiles\norange: what must hold (line), what we aim at (dot)")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def show(rows: list[dict[str, Any]]) -> str:
    """Returns the comparison as a table for a console."""
    lines = [f"{'':<62} {'median':>7}  quartiles      must   aim"]
    for row in rows:
        low, high = row["quartiles"]
        limits = "  ".join(f"{row[key]:5.2f}" if row[key] else "    –" for key in ("must", "aim"))
        lines.append(f"{row['ratio']:<62} {row['median']:7.2f}  {low:.2f} to {high:.2f}  {limits}")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT), help="folder of a release; default: this repository")
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets conll2003 and tweet_sentiment")
    parser.add_argument("--texts", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch and ONNX Runtime")
    parser.add_argument("--output", type=Path, default=ROOT / "results/benchmarks.json")
    args = parser.parse_args()
    if args.texts < 1 or args.rounds < 1 or args.threads < 1:
        parser.error("--texts, --rounds and --threads must be at least 1")
    return args


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    texts, pipes = read_texts(args.data, args.texts), load_pipes(args.model)
    sentence_transformer = SentenceTransformer(args.model, device="cpu")
    run_rounds(all_jobs(pipes, sentence_transformer, texts[:64]), 1, lambda line: None)  # warm-up
    jobs = all_jobs(pipes, sentence_transformer, texts)
    seconds = run_rounds(jobs, args.rounds, lambda line: print(line, file=sys.stderr))
    rows = compare(seconds)
    print(show(rows))
    result = {
        "command": f"python -m benchmarks.run --data DIR --texts {args.texts} --rounds {args.rounds} --threads {args.threads}",
        "texts": len(texts),
        "tokens": sum(len(window.input_ids) for window in pipes["torch"].preprocess(texts, tasks=[])),
        "characters": sum(map(len, texts)),
        "ratios": rows,
        "seconds": seconds,
        "shares": {backend: shares(pipe, texts) for backend, pipe in pipes.items()},
        "roofline": roofline(pipes["torch"], texts, seconds),
        **surroundings(),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    draw(rows, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
