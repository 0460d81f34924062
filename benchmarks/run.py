"""Measures speed side by side: `make bench`, or `python -m benchmarks.run --data DIR`.

Each way of working runs over the same texts, in rounds, each round in another order. What counts are the ratios of two
times of the same round, so that a machine that slows down for a while slows both; given are their medians and quartiles.
The same for one short text at a time. Then, for each backend: where the processor's time goes, and the size of its files.
Results go to results/benchmarks.json. Run it on a quiet machine, with `python -m release.onnx .` before it.
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from tqdm import tqdm
from transformers import pipeline

from annotator_multitask import BACKENDS, CPU_BATCH_TOKENS, ONNX_FILES, ONNX_PARTS, length_batches, onnx_part, pad_windows
from benchmarks.rivals import FASTEMBED, SPACY, Finder, load_rivals
from common.data import load_split
from common.files import ROOT, environment_info, write_json

ENCODE = "SentenceTransformer.encode"
SINGLE = "three single-task passes"  # of encoders of the same size: one embeds, one classifies, one tags
BFLOAT16 = "torch-bfloat16"
OUTPUTS: dict[str, dict[str, Any]] = {
    "everything": {}, "embedding alone": {"tasks": []}, "labels and entities alone": {"embedding": False},
}  # fmt: skip
# What is compared: the times of two jobs, the first divided by the second; for a throughput, the other's above ours.
RATIOS = {
    f"throughput: everything, PyTorch / {ENCODE}": (ENCODE, "everything, torch"),
    f"throughput: everything, PyTorch in bfloat16 / {ENCODE}": (ENCODE, f"everything, {BFLOAT16}"),
    f"throughput: everything, ONNX / {ENCODE}": (ENCODE, "everything, onnx"),
    f"throughput: everything, 8 bits / {ENCODE}": (ENCODE, "everything, onnx-int8"),
    f"throughput: embedding alone, ONNX / {ENCODE}": (ENCODE, "embedding alone, onnx"),
    f"throughput: embedding alone, 8 bits / {ENCODE}": (ENCODE, "embedding alone, onnx-int8"),
    f"throughput: embedding alone, 8 bits / {FASTEMBED}": (FASTEMBED, "embedding alone, onnx-int8"),
    f"throughput: labels and entities alone, ONNX / {SPACY}": (SPACY, "labels and entities alone, onnx"),
    f"throughput: labels and entities alone, 8 bits / {SPACY}": (SPACY, "labels and entities alone, onnx-int8"),
    "throughput: everything, PyTorch / three single-task passes": (SINGLE, "everything, torch"),
}
LATENCIES = {
    f"one short text: everything, PyTorch / {ENCODE}": ("everything, torch", ENCODE),
    f"one short text: everything, ONNX / {ENCODE}": ("everything, onnx", ENCODE),
    f"one short text: everything, 8 bits / {ENCODE}": ("everything, onnx-int8", ENCODE),
}
PASSES = {  # of the model alone, over the same batches
    f"one forward pass: {outputs} / the bare encoder": (outputs, "the bare encoder") for outputs in OUTPUTS
}
SHORT_TEXT = "Tim Cook opened Apple's new store in Paris. I love it!"
OPTIONAL_LIBRARIES = ("onnxruntime", "spacy", "vaderSentiment", "fastembed", "litserve")
DOCUMENT_ROWS = 7  # consecutive sentences that make a document: long, and within the window, so that nobody cuts it


Job = Callable[[], Any]  # does the work once


def read_texts(data: Path, count: int) -> list[str]:
    """Returns the given number of texts: half tweets, the rest sentences of the news, and one in twenty a longer document."""
    documents = count // 20
    sentences = [" ".join(tokens) for tokens in load_split(str(data / "conll2003"), "test", ["tokens"])["tokens"]]
    tweets = load_split(str(data / "tweet_sentiment"), "test", ["text"])["text"]
    long = [" ".join(sentences[start : start + DOCUMENT_ROWS]) for start in range(0, len(sentences), DOCUMENT_ROWS)]
    texts = [*tweets[: count // 2], *long[:documents]]
    texts += (sentences * (count // len(sentences) + 1))[: count - len(texts)]
    return [texts[i] for i in np.random.default_rng(13).permutation(len(texts))]


def three_passes(pipe: Any, texts: list[str]) -> Job:
    """Returns the work of an embedding, a sentiment and an entity model of this encoder's size, each by itself."""
    heads = sorted(pipe.model.config.task_specs.items(), key=lambda item: item[1].kind)
    singles = [heads[0][0], heads[-1][0]]  # one of texts, one of words: what a model for each alone would compute
    return lambda: [pipe(texts, tasks=[]), *(pipe(texts, tasks=[name], embedding=False) for name in singles)]


def load_pipes(model: str) -> dict[str, Any]:
    """Returns the pipeline on each backend that this folder holds an export for, by the backend's name, and in bfloat16."""
    has_runtime = find_spec("onnxruntime") is not None
    found = [x for x in BACKENDS if x == "torch" or (has_runtime and (Path(model) / ONNX_FILES[x]).exists())]
    options = {"model": model, "trust_remote_code": True, "device": "cpu"}
    pipes = {backend: pipeline("multitask", backend=backend, **options) for backend in found}
    return pipes | {BFLOAT16: pipeline("multitask", dtype="bfloat16", **options)}


def all_jobs(pipes: dict[str, Any], encoder: Any, rivals: dict[str, Finder], texts: list[str]) -> dict[str, Job]:
    """Returns every way of working that is installed, each over the same texts, by its name."""
    jobs: dict[str, Job] = {ENCODE: partial(encoder.encode, texts), SINGLE: three_passes(pipes["torch"], texts)}
    for (backend, pipe), (outputs, options) in product(pipes.items(), OUTPUTS.items()):
        jobs[f"{outputs}, {backend}"] = partial(pipe, texts, **options)
    return jobs | {name: partial(find, texts) for name, find in rivals.items()}


def pass_jobs(pipe: Any, texts: list[str]) -> dict[str, Job]:
    """Returns the forward passes of the encoder alone and of the model for each kind of output, over the same batches."""
    annotator, model = pipe.annotator, pipe.model
    groups = length_batches(annotator.windows(texts, list(model.config.tasks)), CPU_BATCH_TOKENS)
    padded = [pad_windows(group, annotator.pad_token_id) for group in groups]
    batches = [{name: torch.from_numpy(values) for name, values in batch.items()} for batch in padded]
    calls = {"everything": {}, "embedding alone": {"tasks": []}, "labels and entities alone": {"output_embedding": False}}

    @torch.inference_mode()
    def run(call: Callable[..., Any], **options: Any) -> None:
        for batch in batches:
            call(**batch, **options)

    def encode(input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: torch.Tensor) -> None:
        model.encoder(input_ids=input_ids, attention_mask=attention_mask)

    return {"the bare encoder": partial(run, encode), **{name: partial(run, model, **x) for name, x in calls.items()}}


def run_rounds(jobs: dict[str, Job], rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of every job in every round; round r starts with the r-th job."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    names = list(jobs)
    for turn in tqdm(range(rounds), desc="rounds"):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            jobs[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def compare(ratios: dict[str, tuple[str, str]], seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Returns each ratio whose two jobs have run, with its quartiles over the rounds."""
    rows = []
    for title, (above, below) in ratios.items():
        if above in seconds and below in seconds:
            values = [a / b for a, b in zip(seconds[above], seconds[below], strict=True)]
            low, middle, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
            rows.append({"ratio": title, "median": middle, "quartiles": [low, high]})
    return rows


def shares(pipe: Any, texts: list[str]) -> dict[str, float]:
    """Returns which share of the pipeline's processor time goes to the model's forward passes; the rest is around them."""
    annotator, times = copy.copy(pipe.annotator), []
    # ONNX Runtime computes batches side by side, each in a thread; PyTorch has the process for itself.
    clock = time.process_time if annotator.backend == "torch" else time.thread_time

    def forward(*given: Any) -> Any:
        start = clock()
        result = pipe.annotator.forward(*given)
        times.append(clock() - start)
        return result

    annotator.forward = forward
    start = time.process_time()
    list(annotator.stream(texts))
    return {"forward": sum(times) / (time.process_time() - start)}


def file_bytes(model: Path, backend: str) -> int:
    """Returns the size of the files of weights that a backend reads."""
    file = ONNX_FILES.get(backend)
    paths = [*model.glob("*.safetensors"), *model.glob("*/*.safetensors")]
    if file:
        paths = [model / file, *(model / onnx_part(file, part) for part in ONNX_PARTS)]
    return sum(path.stat().st_size for path in paths if path.exists())


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
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="of torch and ONNX Runtime")
    parser.add_argument("--output", type=Path, default=ROOT / output)
    return parser


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Writes a measurement, with what it depends on."""
    result = {**result, **environment_info()}
    result["libraries"] |= {name: version(name) for name in OPTIONAL_LIBRARIES if find_spec(name)}
    write_json(path, result)


def main() -> None:
    parser = make_parser(__doc__, 1000, "results/benchmarks.json")
    parser.add_argument("--short", type=positive, default=100, help="rounds of one short text")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    texts, pipes = read_texts(args.data, args.texts), load_pipes(args.model)
    encoder = SentenceTransformer(args.model, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        rivals = load_rivals(Path(args.model), Path(folder), args.threads)
        run_rounds(all_jobs(pipes, encoder, rivals, texts[:64]), 1)  # warm-up
        seconds = run_rounds(all_jobs(pipes, encoder, rivals, texts), args.rounds)
        short = run_rounds(all_jobs(pipes, encoder, rivals, [SHORT_TEXT]), args.short)
    passes = run_rounds(pass_jobs(pipes["torch"], texts), args.rounds)
    rows = [*compare(RATIOS, seconds), *compare(LATENCIES, short), *compare(PASSES, passes)]
    for row in rows:
        print(f"{row['ratio']:<68} {row['median']:.2f} ({row['quartiles'][0]:.2f} to {row['quartiles'][1]:.2f})")
    options = " ".join(f"--{name} {getattr(args, name)}" for name in ("texts", "rounds", "short", "threads"))
    result = {
        "command": f"python -m benchmarks.run --data DIR {options}",
        "texts": len(texts),
        "tokens": sum(len(window.input_ids) for window in pipes["torch"].annotator.windows(texts, [])),
        "ratios": rows,
        "texts_per_second": {name: len(texts) / statistics.median(values) for name, values in seconds.items()},
        "one_short_text_milliseconds": {
            name: dict(zip(("median", "p95"), np.quantile(1000 * np.array(times), [0.5, 0.95]).tolist(), strict=True))
            for name, times in short.items()
        },
        "shares": {backend: shares(pipe, texts) for backend, pipe in pipes.items()},
        "file_bytes": {backend: file_bytes(Path(args.model), backend) for backend in pipes},
        "seconds": seconds,
    }
    write_result(args.output, result)


if __name__ == "__main__":
    main()
