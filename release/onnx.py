"""Writes a model as ONNX, for ONNX Runtime and all that is built on it: `python -m release.onnx REPO` writes

    onnx/model.onnx             float32, the numbers of PyTorch within 1e-4
    onnx/model_quantized.onnx   8 bits: a quarter of the size, faster on a CPU, a little less exact

Both give `last_hidden_state`, `sentence_embedding`, `encoder_embedding` and `logits.<task>` of every task. They need
`input_ids` and `attention_mask`; `token_type_ids` and `casing_ids`, where the model reads them, may be left out and are zero
then. ONNX Runtime computes a whole graph whatever is asked of it, so a model with a task branch gets two more files beside
each, `*_embedding.onnx` and `*_tasks.onnx`: graphs of the embeddings alone and of the logits alone, which read their weights
from the file of the whole graph. The latter requires `casing_ids`, so that no consumer forgets it. With --data, both are
measured on the data sets of release.toml, into results/onnx.json. Axes: B batch, T tokens, N texts or tokens.
"""

import argparse
import inspect
import json
import logging
import sys
import warnings
from collections.abc import Callable, Container
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, pipeline

from annotator_multitask import (
    BACKENDS,
    CPU_BATCH_TOKENS,
    ONNX_FILES,
    ONNX_PARTS,
    SLOW_FUSIONS,
    Annotator,
    label_order,
    length_batches,
    onnx_part,
    pad_windows,
)
from common.files import ROOT, environment_info, write_json
from modeling_multitask import MultiTaskModel, WeightsError
from pipeline_multitask import make_annotator
from release.export import EXPORTS
from release.golden import SENTENCES
from weights_multitask import sha256

if TYPE_CHECKING:  # training and evaluation need more packages than the export
    from common.recipe import Recipe

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
RECIPE = ROOT / "training/recipes/release.toml"
EMBEDDINGS = ("last_hidden_state", "sentence_embedding", "encoder_embedding")
SHARED_BYTES = 1024  # smaller weights are stored with each graph
NARROWEST = 32  # matrices with fewer rows or columns, such as those of the labels, stay in float
ONNX_FLOAT, ONNX_UINT8 = 1, 2  # `onnx.TensorProto` types
OPSET = 20  # the first in which Gelu is one operator, which is faster than its parts
TOLERANCE = 1e-4


class ExportError(Exception):
    """The graph does not give what the model gives; the message says what to try."""


class Graph(nn.Module):
    """A model with positional inputs, all but the first of which may be [1, 1], and its outputs in a fixed order."""

    def __init__(self, model: MultiTaskModel) -> None:
        super().__init__()
        reads_types = "token_type_ids" in inspect.signature(model.encoder.forward).parameters
        reads_casing = model.task_branch is not None or any(head.casing is not None for head in model.heads.values())
        self.model = model
        self.required = ["input_ids", "attention_mask"]
        self.optional = ["token_type_ids"] * reads_types + ["casing_ids"] * reads_casing
        self.outputs = [*EMBEDDINGS, *(f"logits.{name}" for name in model.heads)]
        self.part_outputs = (self.outputs[1 : len(EMBEDDINGS)], self.outputs[len(EMBEDDINGS) :])  # of each of `ONNX_PARTS`
        self.eval()

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        names = self.required + self.optional
        out = self.model(**{name: value.expand_as(values[0]) for name, value in zip(names, values, strict=True)})
        return *(out[name] for name in EMBEDDINGS), *out.logits.values()

    @torch.inference_mode()
    def run(self, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Returns the outputs, as a session of ONNX Runtime does."""
        zero = np.zeros((1, 1), dtype=np.int64)
        return [x.numpy() for x in self(*(torch.from_numpy(feed.get(n, zero)) for n in self.required + self.optional))]


def write_graph(graph: Graph, path: Path) -> None:
    """Writes a float32 graph with its weights in one file, of standard operators alone."""
    import onnx_ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    # Each its own tensor: the exporter takes one that is given twice for a single input.
    values = [*(torch.ones(2, 7).long() for _ in graph.required), *(torch.zeros(1, 1).long() for _ in graph.optional)]
    shapes = [*({0: "batch", 1: "length"} for _ in graph.required), *(None for _ in graph.optional)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is inside PyTorch
        program = torch.onnx.export(
            graph,
            tuple(values),
            input_names=graph.required + graph.optional,
            output_names=graph.outputs,
            dynamic_shapes={"values": tuple(shapes)},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    for value in program.model.graph.inputs[len(graph.required) :]:
        # An input with an initializer may be left out. Its dimensions have names of their own: taken for [batch, length],
        # an optimizer could drop the expansion.
        value.shape = onnx_ir.Shape([f"{value.name}_batch", f"{value.name}_length"])
        value.const_value = onnx_ir.tensor(np.zeros((1, 1), dtype=np.int64), name=value.name)
        program.model.graph.register_initializer(value)
    ClearMetadataAndDocStringPass()(program.model)  # it names this machine's folders
    program.model.metadata_props["labels"] = json.dumps(label_order(graph.model.config.tasks))
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx_ir.save(program.model, path)


def is_matrix(value: Any) -> bool:
    """Returns whether a value of a graph is a constant float matrix large enough to matter."""
    constant = value.const_value
    is_float = constant is not None and constant.dtype == ONNX_FLOAT
    return is_float and len(constant.shape) == 2 and min(constant.shape) >= NARROWEST


def stored(op: Any, matrix: Any, suffix: str, value: np.ndarray, dtype: Any = np.float32) -> Any:
    """Returns a constant that is stored with the graph, once for all that read the same matrix."""
    import onnx_ir

    name = f"{matrix.name}_{suffix}"
    known = matrix.graph.initializers
    return known[name] if name in known else op.initializer(onnx_ir.tensor(value.astype(dtype), name=name))


def int8_product(op: Any, values: Any, matrix: Any, widest: float, **_: Any) -> Any:
    """Returns what stands for a float product of [B, T, K] by [K, N]: the same in 8 bits, of tokens [M, K]."""
    weights = matrix.const_value.numpy()
    height, width = weights.shape
    symmetric = width > widest * height
    axis, middle = op.Constant(value_ints=[1]), op.Constant(value_float=128.0)
    rows = op.Reshape(values, op.Constant(value_ints=[-1, height]))
    highest, below = op.ReduceMax(rows, axis, keepdims=0), op.Neg(op.ReduceMin(rows, axis, keepdims=0))
    spread = op.Max(highest, below) if symmetric else op.Add(highest, below)
    steps = op.Constant(value_float=127.0 if symmetric else 255.0)
    scale = op.Div(op.Max(spread, op.Constant(value_float=1e-9)), steps)  # [M]
    zero = op.Expand(middle, op.Shape(scale)) if symmetric else op.Round(op.Div(below, scale))  # [M]
    tokens = op.QuantizeLinear(rows, scale, op.Cast(zero, to=ONNX_UINT8), axis=0)
    scales = np.maximum(abs(weights).max(axis=0), 1e-9) / 63
    integers = np.round(weights / scales)
    one, zero_point = op.Constant(value_float=1.0), op.Cast(middle, to=ONNX_UINT8)
    constants = stored(op, matrix, "int8", integers, np.int8), one, stored(op, matrix, "scale", scales), zero_point
    sums = op.MatMulIntegerToFloat(tokens, *constants, _domain="com.microsoft")
    if not symmetric:
        totals = stored(op, matrix, "sum", (scales * integers.sum(axis=0))[None])
        sums = op.Add(sums, op.Mul(op.Unsqueeze(op.Sub(middle, zero), axis), totals))
    shape = op.Concat(op.Shape(values, end=-1), op.Constant(value_ints=[width]), axis=0)
    return op.Reshape(op.Mul(sums, op.Unsqueeze(scale, axis)), shape)


def int8_lookup(op: Any, table: Any, ids: Any, **_: Any) -> Any:
    """Returns what stands for a look-up in a float table: the same in 8 bits, with a scale for each row."""
    rows = table.const_value.numpy()
    scales = np.maximum(abs(rows).max(axis=1, keepdims=True), 1e-9) / 127
    integers = stored(op, table, "int8", np.round(rows / scales), np.int8)
    found = op.Cast(op.Gather(integers, ids), to=ONNX_FLOAT)
    return op.Mul(found, op.Gather(stored(op, table, "scale", scales), ids))


def quantize(source: Path, target: Path, widest: float = 1.0, kept: Container[str] = ()) -> None:
    """Writes a graph with its matrices and its word embeddings in 8 bits, with a scale for each token.

    A token's values are quantized by their own range, in unsigned 8 bits, so that a text's numbers never depend on the texts
    beside it; each column of a matrix has its own scale, in signed 7 bits, since without VNNI the sums of two full products
    overflow. ONNX Runtime adds up integers; scales and zero points are applied to the sums.

    Args:
        source: The float graph.
        target: The file to write.
        widest: Tokens have a zero point where a matrix [K, N] has N ≤ `widest` · K. A zero point keeps more of a range that
            is not centred, and takes two passes more over what comes out.
        kept: Names of products that stay in float.
    """
    import onnx_ir
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass
    from onnxscript.rewriter import rewrite
    from onnxscript.rewriter.pattern import RewriteRule

    def of_tokens(context: Any, values: Any, matrix: Any, found: Any) -> bool:
        # What is done once per text, or per label, stays in float.
        per_text = values.shape is not None and len(values.shape) == 2
        return is_matrix(matrix) and not per_text and found.producer().name not in kept

    def matmul(op: Any, values: Any, matrix: Any) -> Any:
        return op.MatMul(values, matrix, _outputs=["found"])

    lookups = RewriteRule(
        lambda op, table, ids: op.Gather(table, ids), int8_lookup, lambda context, table, ids: is_matrix(table)
    )
    model = rewrite(onnx_ir.load(source), [RewriteRule(matmul, partial(int8_product, widest=widest), of_tokens), lookups])
    CommonSubexpressionEliminationPass()(model)  # what is read by several matrices is quantized once
    onnx_ir.save(model, target)


def write_part(whole: Path, part: str, outputs: list[str]) -> None:
    """Writes the part of a graph that gives some of its outputs; its weights stay in the file of the whole graph."""
    import onnx

    model = onnx.load(whole)
    extracted = onnx.utils.Extractor(model).extract_model([x.name for x in model.graph.input], outputs)
    read = {name for node in extracted.graph.node for name in node.input}
    unread = [x for x in extracted.graph.input if x.name not in read]
    # JavaScript's runtimes feed only inputs that have no initializer: they could never tell the branch how words are written.
    defaults = [x for x in extracted.graph.initializer if x.name == "casing_ids"]
    for field, values in ((extracted.graph.input, unread), (extracted.graph.initializer, defaults)):
        for value in values:
            field.remove(value)
    content, place = whole.read_bytes(), 0
    for tensor in extracted.graph.initializer:
        values = tensor.raw_data
        if len(values) < SHARED_BYTES:
            continue
        found = content.find(values, place)  # most weights are stored in the order in which they are listed
        place = found if found >= 0 else content.index(values)
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", whole.name), ("offset", place), ("length", len(values))):
            tensor.external_data.add(key=key, value=str(value))
    extracted.metadata_props.extend(model.metadata_props)
    extracted.metadata_props.add(key="weights_sha256", value=sha256(whole))
    onnx.save(extracted, whole.with_name(onnx_part(whole.name, part)))


def onnx_run(path: Path) -> Callable[[dict[str, np.ndarray]], list[np.ndarray]]:
    """Returns a function that runs a graph on one feed, with as many threads as PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # it warns of every input that may be left out
    providers = ["CPUExecutionProvider"]
    return partial(onnxruntime.InferenceSession(path, options, providers, disabled_optimizers=SLOW_FUSIONS).run, None)


def make_feeds(annotator: Annotator, graph: Graph, texts: list[str]) -> list[dict[str, np.ndarray]]:
    """Returns a graph's inputs for texts, int64 [B, T] each, in the pipeline's batches."""
    names = graph.required + graph.optional
    batches = length_batches(annotator.windows(texts, list(annotator.model.heads)), CPU_BATCH_TOKENS)
    inputs = (pad_windows(windows, annotator.pad_token_id) for windows in batches)
    return [{name: value for name, value in batch.items() if name in names} for batch in inputs]


def collect(names: list[str], run: Callable, feeds: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Returns each output over all feeds, float [N, ...]: of the texts, or of their tokens without the padding."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for feed in feeds:
        for name, value in zip(names, run(feed), strict=True):
            found[name].append(value[feed["attention_mask"] > 0] if value.ndim == 3 else value)
    return {name: np.concatenate(values) for name, values in found.items()}


def export(repo: str | Path, output: Path) -> dict[str, Any]:
    """Writes `ONNX_FILES` to the folder `output`, and returns how near they are to PyTorch on `SENTENCES`.

    Raises:
        ExportError: The float32 graph gives other numbers; no file is left.
        WeightsError, OSError, ValueError: `repo` holds no whole model with its tokenizer.
    """
    model, tokenizer = MultiTaskModel.from_pretrained(repo), AutoTokenizer.from_pretrained(repo)
    graph = Graph(model)
    feeds = make_feeds(make_annotator(model, tokenizer, torch.device("cpu")), graph, SENTENCES)
    expected = collect(graph.outputs, graph.run, feeds)
    exact, quantized = (output / file for file in ONNX_FILES.values())
    for file in EXPORTS:  # rather none than those of earlier weights
        (output / file).unlink(missing_ok=True)
    model.set_attn_implementation("eager")  # it becomes fewer and faster operators than SDPA
    write_graph(graph, exact)
    found = collect(graph.outputs, onnx_run(exact), feeds)
    differences = {name: float(abs(found[name] - x).max() / max(1.0, abs(x).max())) for name, x in expected.items()}
    if not all(x < TOLERANCE for x in differences.values()):
        exact.unlink()
        raise ExportError(
            f"{exact} differs from PyTorch by {differences}; allowed: {TOLERANCE}. It is deleted. Try the versions of torch, "
            f"transformers, {', '.join(PACKAGES)} that constraints.txt names."
        )
    quantize(exact, quantized)
    if model.task_branch is not None:
        for file, (part, outputs) in product((exact, quantized), zip(ONNX_PARTS, graph.part_outputs, strict=True)):
            write_part(file, part, outputs)
    found = collect(graph.outputs, onnx_run(quantized), feeds)
    return {
        "max_difference": max(differences.values()),
        "int8_cosine": float((expected["sentence_embedding"] * found["sentence_embedding"]).sum(axis=1).mean()),
    }


def measure_backends(repo: Path, recipe: "Recipe", limit: int | None = None) -> dict[str, Any]:
    """Returns, with each backend, the main metric of each of the recipe's parts on the first `limit` rows of its validation split.

    `points` are how many hundredths a backend's metric is from PyTorch's.
    """
    from evaluation.evaluate import main_metric, measure

    tasks: dict[str, dict[str, Any]] = {}
    for backend in BACKENDS:
        pipe = pipeline("multitask", model=str(repo), trust_remote_code=True, device="cpu", backend=backend)
        for name, found in measure(pipe, recipe, "validation", limit=limit).items():
            metric = main_metric(recipe.parts[name])
            facts = {"metric": metric, **{key: found[key] for key in ("split", "rows", "sha256")}}
            tasks.setdefault(name, facts)[backend] = found["metrics"][metric]
    for task in tasks.values():
        task["points"] = {backend: round(100 * (task[backend] - task["torch"]), 2) for backend in ONNX_FILES}
    return tasks


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repo", help="folder of a release, or its Hub id")
    parser.add_argument("--output", type=Path, help="folder to write to in place of REPO")
    parser.add_argument("--data", type=Path, help="folder with local copies of the data sets, to measure both files on them")
    args = parser.parse_args()
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        parser.error(f"{' and '.join(missing)} must be installed: pip install {' '.join(PACKAGES)}")
    if args.output is None and not Path(args.repo).is_dir():
        parser.error(f"{args.repo} is not a folder; for a model on the Hub, give --output FOLDER")
    if args.output and args.data:
        parser.error("--data measures the files of REPO: omit --output, or make REPO a copy of the repository")
    return args


def main() -> None:
    args = parse_arguments()
    logging.disable(logging.WARNING)  # of what is not needed: torchvision, optimizations that the exporter has made itself
    output = args.output or Path(args.repo)
    try:
        result = export(args.repo, output)
        result["bytes"] = {file: (output / file).stat().st_size for file in ONNX_FILES.values()}
        if args.data:
            from common.recipe import Recipe

            result["tasks"] = measure_backends(output, Recipe.read(RECIPE, args.data))
    except (ExportError, WeightsError, OSError, ValueError) as error:
        sys.exit(str(error))
    print(json.dumps(result, indent=2))
    if args.data:
        result = {"command": "python -m release.onnx MODEL --data DATA", **result, **environment_info()}
        result["libraries"] |= {name: version(name) for name in PACKAGES}
        write_json(output / "results/onnx.json", result)


if __name__ == "__main__":
    main()
