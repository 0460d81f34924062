"""Compares ways of running the model in 8 bits: `python -m benchmarks.int8 --data DIR`.

Each way is made from the float32 graph that `python -m release.onnx .` wrote, and runs over the same 500 texts of ten data sets,
in alternating rounds; so does PyTorch in bfloat16. Beside its time it is compared with float32: the cosine of the sentence
embeddings, labels that differ, entities that differ; and with itself, each text alone against all in batches. Results go to
results/int8.json.
"""

import json
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import pipeline

from annotator_multitask import ONNX_FILES, Record, pad_windows
from benchmarks.run import make_parser, run_rounds, write_result
from evaluation.embedding import distinct_texts
from release.onnx import onnx_run, quantize

TEXTS = (
    "vader_sentiment", "emobank_sentiment", "newsmtsc", "goemotions", "wiki_toxicity",
    "uner_ewt", "crossner", "redocred", "wnut17", "tweet_sentiment",
)  # fmt: skip
CALIBRATION_TEXTS = 64
FLOAT, BFLOAT16 = "float32", "PyTorch in bfloat16"
SETTINGS = {"per_channel": True, "reduce_range": True}  # of ONNX Runtime's quantization of weights
Feeds = list[dict[str, np.ndarray]]


def read_texts(data: Path, count: int) -> list[str]:
    """Returns so many texts of test splits, of each data set as many."""
    texts = []
    for name in TEXTS:
        rows = np.random.default_rng(0).permutation(np.array(distinct_texts(data / name, "test"), dtype=object))
        texts += rows[: -(-count // len(TEXTS))].tolist()
    return texts[:count]


def per_batch(source: Path, target: Path, feeds: Feeds) -> None:
    """Writes a graph that quantizes activations by the range of a batch, ONNX Runtime's dynamic quantization."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(source, target, op_types_to_quantize=["MatMul", "Gather"], weight_type=QuantType.QInt8, **SETTINGS)


def calibrated(source: Path, target: Path, feeds: Feeds, method: str) -> None:
    """Writes a graph that quantizes activations by ranges found on other texts, ONNX Runtime's static quantization."""
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        rows = iter(feeds)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.rows, None)

    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "op_types_to_quantize": ["MatMul"]}
    only_weights = {"extra_options": {"MatMulConstBOnly": True}}
    quantize_static(
        source, target, Reader(), calibrate_method=CalibrationMethod[method], **types, **SETTINGS, **only_weights
    )


def blocks(source: Path, target: Path, feeds: Feeds) -> None:
    """Writes a graph of MatMulNBits: 8-bit weights, activations quantized by row and block."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load(source), bits=8, block_size=32, is_symmetric=True, accuracy_level=4)
    quantizer.process()
    onnx.save(quantizer.model.model, target)


def first_activation(source: Path) -> list[str]:
    """Returns the name of the product that reads the first layer's activation (GELU), whose values are the greatest."""
    import onnx

    nodes = onnx.load(source, load_external_data=False).graph.node
    activations = {output for node in nodes if node.op_type == "Gelu" for output in node.output}
    return [node.name for node in nodes if node.op_type == "MatMul" and node.input[0] in activations][:1]


WAYS: dict[str, Callable[[Path, Path, Feeds], None]] = {
    "by token (the release's)": lambda source, target, feeds: quantize(source, target),
    "by token, zero points everywhere": lambda source, target, feeds: quantize(source, target, widest=np.inf),
    "by token, no zero points": lambda source, target, feeds: quantize(source, target, widest=0),
    "by token, first activation product in float": lambda source, target, feeds: quantize(
        source, target, kept=first_activation(source)
    ),
    "by batch (dynamic)": per_batch,
    "calibrated, least and greatest": partial(calibrated, method="MinMax"),
    "calibrated, percentile": partial(calibrated, method="Percentile"),
    "by row and block (MatMulNBits)": blocks,
}


def graph_forward(path: Path, tasks: list[str]) -> Callable[..., Any]:
    """Returns a graph of all outputs as what runs an annotator's model."""
    run = onnx_run(path)

    def forward(inputs: dict[str, np.ndarray], *_: Any) -> Any:
        found = run(inputs)
        return found[1], dict(zip(tasks, found[3:], strict=True))

    return forward


def decisions(record: Record) -> tuple[dict[str, Any], set[tuple[str, int, int]]]:
    """Returns a record's label, or labels, of each task, and its entities."""
    labels = {name: answer.get("label", answer.get("labels")) for name, answer in record.get("labels", {}).items()}
    found = (entity for entities in record.get("entities", {}).values() for entity in entities)
    return labels, {(entity["entity_group"], entity["start"], entity["end"]) for entity in found}


def differences(expected: list[Record], found: list[Record]) -> dict[str, Any]:
    """Returns how far records are from others of the same texts."""
    rows = list(zip(expected, found, strict=True))
    cosines = [float(one["sentence_embedding"] @ other["sentence_embedding"]) for one, other in rows]
    pairs = [(decisions(one), decisions(other)) for one, other in rows]
    return {
        "cosine_mean": statistics.mean(cosines),
        "cosine_min": min(cosines),
        "labels": {task: sum(one[0][task] != other[0][task] for one, other in pairs) for task in pairs[0][0][0]},
        "entities": sum(len(one[1] ^ other[1]) for one, other in pairs),
        "entities_expected": sum(len(one[1]) for one, _ in pairs),
    }


def measure(model: str, texts: list[str], rounds: int) -> dict[str, Any]:
    """Returns each way's time as a share of float32's, and how its answers differ."""
    options = {"model": model, "trust_remote_code": True, "device": "cpu"}
    annotator, half = (pipeline("multitask", dtype=dtype, **options).annotator for dtype in ("float32", "bfloat16"))
    tasks, source = list(annotator.model.config.tasks), Path(model, ONNX_FILES["onnx"])
    windows = sorted(annotator.windows(texts[::-1][:CALIBRATION_TEXTS], tasks), key=lambda window: len(window.input_ids))
    middle = windows[len(windows) // 4 : -(-3 * len(windows) // 4)]  # of like length: calibrators take one shape
    feeds = [pad_windows(middle, 0)]
    with tempfile.TemporaryDirectory() as folder:
        paths = {FLOAT: source, **{name: Path(folder, f"{i}.onnx") for i, name in enumerate(WAYS)}}
        for name, make in WAYS.items():
            make(source, paths[name], feeds)
        graphs: dict[str, Callable[..., Any]] = {name: graph_forward(path, tasks) for name, path in paths.items()}
        graphs[BFLOAT16] = half.forward
        found: dict[int | None, dict[str, list[Record]]] = {None: {}, 1: {}}  # in batches as they come, and each text alone

        def run(name: str, batch_tokens: int | None = None) -> None:
            annotator.forward = graphs[name]
            found[batch_tokens][name] = list(annotator.stream(texts, batch_tokens=batch_tokens))

        seconds = run_rounds({name: partial(run, name) for name in graphs}, rounds)
        for name in graphs:
            run(name, 1)
    together, alone = found.values()
    return {
        name: {
            "time_to_float": statistics.median(a / b for a, b in zip(values, seconds[FLOAT], strict=True)),
            "beside_float": differences(together[FLOAT], together[name]),
            "alone_beside_batch": differences(together[name], alone[name]),
        }
        for name, values in seconds.items()
    }


def main() -> None:
    args = make_parser(__doc__, 500, "results/int8.json").parse_args()
    torch.set_num_threads(args.threads)
    texts = read_texts(args.data, args.texts)
    found = measure(args.model, texts, args.rounds)
    command = f"python -m benchmarks.int8 --data DIR --texts {args.texts} --rounds {args.rounds} --threads {args.threads}"
    print(json.dumps(found, indent=2))
    write_result(args.output, {"command": command, "texts": len(texts), "ways": found})


if __name__ == "__main__":
    main()
