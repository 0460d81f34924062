"""The ONNX export: the numbers of PyTorch in any shape, for every encoder, with inputs that may be left out."""

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import pipeline

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")

from annotator_multitask import ONNX_FILES, ONNX_PARTS, Record, Window, onnx_part  # noqa: E402
from common.recipe import Recipe  # noqa: E402
from modeling_multitask import MultiTaskModel  # noqa: E402
from release import onnx as release_onnx  # noqa: E402
from tests.conftest import ROOT, TASKS, TEXTS, WINDOW, tiny_model, tiny_tokenizer, write_release  # noqa: E402

CASED = {"kind": "token_classification", "labels": ["O", "B-ORG", "I-ORG"], "casing_dim": 4}
# Its random logits would reach ten and be rounded in proportion; the temperature brings them to the size of the others.
WIDE = {**CASED, "casing_dim": None, "hidden_dim": 8, "temperature": 4.0}
BOTH = {**TASKS["sentiment"], "reads": "both"}
OUTPUTS = [*release_onnx.EMBEDDINGS, *(f"logits.{name}" for name in (*TASKS, "cased", "wide", "both"))]
# Where windows of ModernBERT's local attention are shorter than the texts, the mask depends on the length.
ENCODERS = {"bert": {}, "roberta": {}, "distilbert": {}, "modernbert": {"local_attention": 8}}
SHAPES = [(1, 1), (1, 2), (3, 7), (2, WINDOW)]


def write_forked(folder: Path, model_type: str, **fields: Any) -> Path:
    """Writes a checkpoint of a tiny model with a task branch that heeds casing, and returns its folder."""
    model = tiny_model(model_type, **fields)
    torch.nn.init.normal_(model.task_branch.casing.weight)
    model.save_pretrained(folder)
    tiny_tokenizer("bytes" if model_type in ("roberta", "modernbert") else "wordpiece").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Returns a function that gives the release of a tiny model with its export, made once for each encoder."""
    made: dict[tuple[str, int], tuple[Path, dict]] = {}

    def export(model_type: str = "bert", num_task_layers: int = 0) -> tuple[Path, dict]:
        key = model_type, num_task_layers
        if key not in made:
            fields = {**ENCODERS[model_type], "tasks": {**TASKS, "cased": CASED, "wide": WIDE, "both": BOTH}}
            parent = tmp_path_factory.mktemp(model_type)
            if num_task_layers:
                folder = write_forked(parent, model_type, num_task_layers=num_task_layers, **fields)
            else:
                folder = write_release(parent, model_type, num_task_layers=0, **fields)
            made[key] = folder, release_onnx.export(folder, folder)
        return made[key]

    return export


def session(folder: Path, backend: str = "onnx") -> Any:
    return onnxruntime.InferenceSession(folder / ONNX_FILES[backend], providers=["CPUExecutionProvider"])


def feed(batch: int, length: int, padding: str = "right") -> dict[str, np.ndarray]:
    """Returns random ids, of which each row after the first has one more token of padding."""
    random = np.random.default_rng(0)
    ids = random.integers(4, 300, (batch, length))
    mask = np.ones_like(ids)
    for row in range(1, batch):
        mask[row, slice(-row, None) if padding == "right" else slice(0, row)] = 0
    return {"input_ids": np.where(mask > 0, ids, 0), "attention_mask": mask}


def assert_same_as_torch(folder: Path, given: dict[str, np.ndarray]) -> None:
    with torch.inference_mode():
        out = MultiTaskModel.from_pretrained(folder)(**{name: torch.from_numpy(x) for name, x in given.items()})
    expected = dict(zip(OUTPUTS, [*(out[name] for name in release_onnx.EMBEDDINGS), *out.logits.values()], strict=True))
    found = dict(zip(OUTPUTS, session(folder).run(None, given), strict=True))
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        kept = given["attention_mask"] > 0 if value.ndim == 3 else slice(None)  # what stands at padding has no meaning
        np.testing.assert_allclose(found[name][kept], value.numpy()[kept], atol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("model_type", "num_task_layers"),
    [
        ("bert", 0),
        ("bert", 1),
        pytest.param("modernbert", 1, marks=pytest.mark.slow),
        pytest.param("roberta", 1, marks=pytest.mark.slow),
        pytest.param("distilbert", 1, marks=pytest.mark.slow),
    ],
)
def test_every_encoder_gives_pytorchs_numbers_in_every_shape(exported, model_type, num_task_layers):
    folder, _ = exported(model_type, num_task_layers)
    for shape in SHAPES:
        for padding in ("right", "left"):
            assert_same_as_torch(folder, feed(*shape, padding))


def test_a_row_without_any_token_has_a_zero_embedding(exported):
    given = feed(2, 5)
    given["attention_mask"][1] = 0
    _, embedding, raw, *logits = session(exported()[0]).run(None, given)
    assert (embedding[1] == 0).all() and (raw[1] == 0).all() and all(np.isfinite(x).all() for x in logits)


def test_ids_and_mask_are_enough_and_outputs_are_named_in_order(exported):
    run = session(exported()[0])
    assert [x.name for x in run.get_inputs()] == ["input_ids", "attention_mask"]
    assert [x.name for x in run.get_overridable_initializers()] == ["token_type_ids", "casing_ids"]
    assert [x.name for x in run.get_outputs()] == OUTPUTS
    shapes = [["batch", "length", 32], ["batch", 8], ["batch", 32], ["batch", 3]]
    assert [x.shape for x in run.get_outputs()[:4]] == shapes


@pytest.mark.parametrize("name", ["casing_ids", "token_type_ids"])
def test_an_optional_input_is_zero_if_left_out_and_heeded_if_given(exported, name):
    folder, _ = exported()
    given, run = feed(3, 7), session(folder)
    zeros, ones = ({**given, name: np.full((3, 7), value)} for value in (0, 1))
    for left_out, zero in zip(run.run(None, given), run.run(None, zeros), strict=True):
        np.testing.assert_array_equal(left_out, zero)
    assert not np.allclose(run.run(["logits.cased"], given), run.run(["logits.cased"], ones), atol=1e-2)
    assert_same_as_torch(folder, ones)


def test_inputs_that_the_model_does_not_read_are_not_there(tmp_path):
    folder = write_release(tmp_path, "distilbert", num_task_layers=0, tasks={"sentiment": TASKS["sentiment"]})
    release_onnx.export(folder, tmp_path / "elsewhere")
    assert not session(tmp_path / "elsewhere").get_overridable_initializers() and not (folder / "onnx").exists()


def test_one_file_holds_everything_in_standard_operators(exported):
    folder, _ = exported()
    assert sorted(x.name for x in (folder / "onnx").iterdir()) == ["model.onnx", "model_quantized.onnx"]
    graph = onnx.load(folder / ONNX_FILES["onnx"], load_external_data=False)
    assert [x.domain for x in graph.opset_import] == [""]
    assert not any(x.external_data for x in graph.graph.initializer)
    assert str(ROOT).encode() not in (folder / ONNX_FILES["onnx"]).read_bytes(), "traces of the machine that made it"


@pytest.mark.parametrize("backend", ONNX_FILES)
@pytest.mark.parametrize("model_type", ["bert", "modernbert"])
def test_parts_give_what_the_whole_graph_gives_and_hold_next_to_no_weights(exported, model_type, backend):
    folder, _ = exported(model_type, 1)
    whole, given = folder / ONNX_FILES[backend], {**feed(3, 7), "casing_ids": np.full((3, 7), 2)}
    expected = dict(zip(OUTPUTS, session(folder, backend).run(None, given), strict=True))
    for part, names in zip(ONNX_PARTS, (OUTPUTS[1:3], OUTPUTS[3:]), strict=True):
        path = whole.with_name(onnx_part(whole.name, part))
        run = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        assert [x.name for x in run.get_outputs()] == names
        needs_casing = part == "tasks"  # the embedding never reads casing
        required = ["input_ids", "attention_mask", *["casing_ids"] * needs_casing]
        assert [x.name for x in run.get_inputs()] == required
        kept = given if needs_casing else feed(3, 7)
        for name, value in zip(names, run.run(None, kept), strict=True):
            np.testing.assert_allclose(value, expected[name], atol=1e-6, err_msg=name)
        stored = onnx.load(path, load_external_data=False)
        large = [x for x in stored.graph.initializer if np.prod(x.dims) * 4 > 4 * release_onnx.SHARED_BYTES]
        assert large and all(x.external_data for x in large)


def test_the_pipeline_runs_the_smallest_graph_that_gives_what_is_asked(exported):
    folder, _ = exported("bert", 1)
    torch_pipe, pipe = (
        pipeline("multitask", model=str(folder), trust_remote_code=True, device="cpu", backend=backend)
        for backend in ("torch", "onnx")
    )
    for options, part in (
        ({"tasks": []}, "_embedding"),
        ({"tasks": [], "embedding": "encoder"}, "_embedding"),
        ({"embedding": False}, "_tasks"),
        ({}, ""),
    ):
        pipe.annotator.forward.sessions.clear()
        for record, expected in zip(pipe(TEXTS, **options), torch_pipe(TEXTS, **options), strict=True):
            assert record.keys() == expected.keys() and decisions(record) == decisions(expected)
            for name in {"sentence_embedding", "encoder_embedding"} & record.keys():
                np.testing.assert_allclose(record[name], expected[name], atol=1e-4)
        assert [Path(path).name for path in pipe.annotator.forward.sessions] == [f"model{part}.onnx"]
    assert pipe(TEXTS[0], tasks=[], embedding=False) == {}


def test_a_part_of_another_export_is_refused_and_a_missing_one_replaced_by_the_whole(exported, tmp_path):
    folder = shutil.copytree(exported("bert", 1)[0], tmp_path / "copy")
    whole = folder / ONNX_FILES["onnx"]
    whole.write_bytes(whole.read_bytes() + b"\x72\x00")  # an empty metadata entry: the same graph in another file
    pipe = pipeline("multitask", model=str(folder), trust_remote_code=True, device="cpu", backend="onnx")
    expected = pipe(TEXTS)
    with pytest.raises(ValueError, match=r"model_tasks\.onnx is of another export .* python -m release\.onnx"):
        pipe(TEXTS, embedding=False)
    whole.with_name("model_tasks.onnx").unlink()
    pipe = pipeline("multitask", model=str(folder), trust_remote_code=True, device="cpu", backend="onnx")
    assert [decisions(x) for x in pipe(TEXTS, embedding=False)] == [decisions(x) for x in expected]


def test_eight_bits_are_smaller_and_mostly_agree(exported):
    folder, result = exported()
    exact, quantized = (folder / file for file in ONNX_FILES.values())
    assert quantized.stat().st_size < 0.6 * exact.stat().st_size  # of a tiny model the graph itself is a good part
    assert result["int8_cosine"] > 0.99
    assert session(folder, "onnx-int8").run(["sentence_embedding"], feed(1, 2))[0].shape == (1, 8)


@pytest.mark.parametrize("backend", ["torch", *ONNX_FILES])
@pytest.mark.parametrize("num_task_layers", [0, 1])
def test_a_text_gets_the_same_answers_whatever_its_batch(exported, num_task_layers, backend):
    folder, _ = exported("bert", num_task_layers)
    pipe = pipeline("multitask", model=str(folder), trust_remote_code=True, device="cpu", backend=backend)
    texts = sample_texts()[:40]
    together = pipe(texts, batch_tokens=2048)
    for alone, beside in zip(pipe(texts, batch_tokens=1), together, strict=True):
        np.testing.assert_allclose(alone["sentence_embedding"], beside["sentence_embedding"], atol=1e-5)
        assert decisions(alone) == decisions(beside)


def test_every_way_to_eight_bits_is_compared_and_by_token_heeds_no_neighbours(exported):
    from benchmarks import int8

    folder, _ = exported("bert", 1)
    found = int8.measure(str(folder), sample_texts()[:12], 1)
    assert list(found) == [int8.FLOAT, *int8.WAYS, int8.BFLOAT16]
    assert found[int8.FLOAT]["time_to_float"] == 1 and found[int8.FLOAT]["beside_float"]["cosine_min"] > 0.9999
    for name in (int8.FLOAT, "by token (the release's)", "by token, no zero points"):
        beside = found[name]["alone_beside_batch"]
        assert beside["cosine_min"] > 0.9999 and not beside["entities"] and not any(beside["labels"].values())


def test_the_snippets_of_the_page_run(exported, monkeypatch):
    folder, _ = exported("bert", 1)
    page = (ROOT / "docs/onnx.md").read_text("utf-8")
    for snippet in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        found: dict[str, Any] = {}
        exec(snippet.replace("my-model", str(folder)), found)
        vectors = [found["vector"]] if "vector" in found else []
        assert all(abs(np.linalg.norm(x) - 1) < 1e-5 for x in vectors) and (vectors or "entities" in found["records"][0])


def test_labels_and_projection_stay_in_float_in_eight_bits(exported):
    graph = onnx.load(exported("bert", 1)[0] / ONNX_FILES["onnx-int8"]).graph
    products = [node for node in graph.node if node.op_type == "MatMulIntegerToFloat"]
    assert len(products) == 3 * 6, "query, key, value, output, up and down, of two layers and the branch"
    read = {x.name for x in graph.initializer if x.data_type == onnx.TensorProto.INT8}
    others = read - {node.input[1] for node in products}
    assert all(".embeddings." in name for name in others) and len(others) < len(read), "nothing else but embeddings"


def test_the_pipeline_gives_the_same_records_through_the_export(exported):
    folder, _ = exported()
    found = {}
    for backend in ("torch", *ONNX_FILES):
        pipe = pipeline("multitask", model=str(folder), trust_remote_code=True, device="cpu", backend=backend)
        found[backend] = pipe(TEXTS)
    for expected, record, rough in zip(*found.values(), strict=True):
        np.testing.assert_allclose(record["sentence_embedding"], expected["sentence_embedding"], atol=1e-4)
        assert record["labels"]["sentiment"]["label"] == expected["labels"]["sentiment"]["label"]
        for name in ("ner", "cased"):
            for one, other in zip(record["entities"][name], expected["entities"][name], strict=True):
                assert (one["start"], one["end"], one["entity_group"]) == (
                    other["start"],
                    other["end"],
                    other["entity_group"],
                )
        assert rough["sentence_embedding"] @ expected["sentence_embedding"] > 0.98


def sample_texts() -> list[str]:
    """Returns 500 of the texts of tests/samples: tweets, news and captions."""
    rows = [json.loads(line) for path in sorted((ROOT / "tests/samples").glob("*.jsonl")) for line in path.open()]
    texts = (text for row in rows for text in (row.get("text"), row.get("sentence1"), row.get("sentence2")) if text)
    distinct = list(dict.fromkeys([*texts, *(" ".join(row["tokens"]) for row in rows if "tokens" in row)]))
    return random.Random(0).sample(distinct, 500)


def answers(folder: Path, backend: str, texts: list[str]) -> tuple[list[Window], list[Record]]:
    """Returns what a backend says of each window of the texts, and the records."""
    pipe = pipeline("multitask", model=str(folder), trust_remote_code=True, device="cpu", backend=backend)
    tasks, vector = list(pipe.model.config.tasks), "sentence_embedding"
    by_text = pipe.annotator.read(texts, tasks, vector)
    return [window for windows in by_text for window in windows], pipe.annotator.records(texts, by_text, tasks, vector)


def decisions(record: Record) -> list[Any]:
    """Returns a record's labels and entities without numbers that may differ in their last bits."""
    labels = [answer.get("label", answer.get("labels")) for answer in record.get("labels", {}).values()]
    return labels + [
        (x["entity_group"], x["start"], x["end"]) for found in record.get("entities", {}).values() for x in found
    ]


def assert_backends_agree(folder: Path, texts: list[str]) -> None:
    """Checks that the float32 export gives PyTorch's logits and labels, and eight bits nearly always the same label."""
    (windows, records), (found, exact), (_, rough) = (answers(folder, backend, texts) for backend in ("torch", *ONNX_FILES))
    for one, other in zip(windows, found, strict=True):
        np.testing.assert_allclose(other.embedding, one.embedding, atol=1e-4)
        for name, logits in one.logits.items():
            np.testing.assert_allclose(other.logits[name], logits, atol=5e-4, rtol=1e-4, err_msg=name)
    assert [decisions(record) for record in exact] == [decisions(record) for record in records]
    for task, answer in records[0]["labels"].items():
        if "label" in answer:
            same = [x["labels"][task]["label"] == y["labels"][task]["label"] for x, y in zip(records, rough, strict=True)]
            assert np.mean(same) > 0.85, task


def test_every_backend_agrees_with_pytorch_on_real_texts(exported):
    assert_backends_agree(exported()[0], sample_texts())


@pytest.mark.skipif(not (ROOT / ONNX_FILES["onnx"]).exists(), reason="not exported; python -m release.onnx . does it")
def test_every_backend_of_this_repositorys_model_agrees_with_pytorch_on_real_texts():
    assert_backends_agree(ROOT, sample_texts())


def test_each_backend_is_measured_on_the_tasks_of_the_recipe(exported):
    recipe = Recipe.read(ROOT / "training/recipes/smoke.toml", ROOT / "tests/samples", only=["sentiment"])
    found = release_onnx.measure_backends(exported()[0], recipe, limit=20)["sentiment"]
    assert found["metric"] == "macro_recall" and found["rows"] == 20
    assert found["onnx"] == found["torch"] and found["points"]["onnx"] == 0
    assert found["points"]["onnx-int8"] == pytest.approx(100 * (found["onnx-int8"] - found["torch"]), abs=0.01)


# What goes wrong


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["release.onnx", *map(str, arguments)])
    release_onnx.main()


def test_other_numbers_than_pytorchs_leave_no_file(release, tmp_path, monkeypatch):
    stale = tmp_path / ONNX_FILES["onnx-int8"]
    stale.parent.mkdir()
    stale.write_bytes(b"of earlier weights")
    monkeypatch.setattr(release_onnx, "TOLERANCE", 0)
    with pytest.raises(release_onnx.ExportError, match=r"differs from PyTorch by .* allowed: 0"):
        release_onnx.export(release, tmp_path)
    assert not list((tmp_path / "onnx").iterdir())


def test_missing_packages_are_named_with_how_to_get_them(release, monkeypatch, capsys):
    monkeypatch.setattr(release_onnx, "find_spec", lambda name: None if name == "onnxscript" else True)
    with pytest.raises(SystemExit):
        run_main(monkeypatch, release)
    assert "onnxscript must be installed: pip install onnx onnxscript onnxruntime" in capsys.readouterr().err


def test_a_folder_without_a_model_is_refused_by_name(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(SystemExit, match=str(tmp_path)):
        run_main(monkeypatch, tmp_path)


def test_a_model_on_the_hub_needs_a_folder_to_write_to(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_main(monkeypatch, "someone/model")
    assert "--output" in capsys.readouterr().err
