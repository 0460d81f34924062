"""What a client of Inference Endpoints gets: answers, clear errors, and both under load; and one pipeline in many threads."""

import gc
import json
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import pipeline

import handler
from configuration_multitask import WEIGHTS_INDEX
from handler import EndpointHandler
from modeling_multitask import WeightsError
from tests.conftest import ENCODERS, ROOT, TASKS, TEXTS, write_release

THREADS = 8
# What the server of Inference Endpoints does when it starts, in a process that finds nothing but the folder's own code.
SERVE = """
import importlib.util, json, sys
folder, request = sys.argv[1:]
spec = importlib.util.spec_from_file_location("handler", folder + "/handler.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(json.dumps(module.EndpointHandler(folder)(json.loads(request))))
"""
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
PARAMETERS = st.fixed_dictionaries(
    {},
    optional={
        "tasks": JSON | st.lists(st.sampled_from(list(TASKS)) | JSON, max_size=3),
        "embedding": st.booleans() | JSON,
        "truncate": JSON,
    },
)
REQUESTS = JSON | st.fixed_dictionaries(
    {"inputs": JSON | st.lists(st.text(max_size=60) | JSON, max_size=5)}, optional={"parameters": JSON | PARAMETERS}
)


@pytest.fixture(scope="module")
def endpoint(release: Path) -> EndpointHandler:
    """The handler over the tiny release."""
    return EndpointHandler(str(release))


def plain(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns a pipeline's records as JSON holds them."""
    return [{**record, "sentence_embedding": record["sentence_embedding"].tolist()} for record in records]


def alike(found: Any, expected: Any) -> bool:
    """Returns whether two JSON values are equal but for the last bits of their floats."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(alike(found[name], x) for name, x in expected.items())
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(alike, found, expected))
    return found == (pytest.approx(expected, abs=1e-5) if isinstance(expected, float) else expected)


def serve(python: str | Path, folder: Path, body: Any) -> Any:
    """Returns the answer to a request in a new process of some Python, which knows this folder only."""
    command = [str(python), "-I", "-c", SERVE, str(folder), json.dumps(body)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_a_client_reads_what_the_pipeline_says(endpoint: EndpointHandler, pipe: Any) -> None:
    assert alike(json.loads(json.dumps(endpoint({"inputs": TEXTS}))), plain(pipe(TEXTS)))
    assert alike(endpoint({"inputs": TEXTS[0], "parameters": None}), plain([pipe(TEXTS[0])]))
    assert endpoint({"inputs": []}) == []


@pytest.mark.parametrize(
    ("model_type", "fields"), [*((name, {}) for name in ENCODERS[1:]), ("bert", {"embedding_dim": None, "tasks": {}})]
)
def test_any_release_loads(tmp_path: Path, model_type: str, fields: dict[str, Any]) -> None:
    folder = write_release(tmp_path, model_type, **fields)
    expected = pipeline("multitask", model=str(folder), trust_remote_code=True, device="cpu")(TEXTS)
    assert alike(EndpointHandler(folder)({"inputs": TEXTS}), plain(expected))


def test_a_fresh_server_needs_only_the_folder(release: Path, endpoint: EndpointHandler, tmp_path: Path) -> None:
    folder = shutil.copytree(release, tmp_path / "repository")
    shutil.copy(ROOT / "handler.py", folder)
    assert alike(serve(sys.executable, folder, {"inputs": TEXTS}), endpoint({"inputs": TEXTS}))


def test_parameters_pick_what_is_computed(endpoint: EndpointHandler) -> None:
    record = endpoint({"inputs": TEXTS[0], "parameters": {"tasks": ["ner", "rating"], "embedding": False}})[0]
    assert (list(record), list(record["entities"]), list(record["labels"])) == (["entities", "labels"], ["ner"], ["rating"])
    assert list(endpoint({"inputs": TEXTS[0], "parameters": {"tasks": []}})[0]) == ["sentence_embedding"]
    assert list(endpoint({"inputs": TEXTS[0], "parameters": {"tasks": "ner"}})[0]["entities"]) == ["ner"]


def test_a_task_asked_for_many_times_is_computed_once(endpoint: EndpointHandler) -> None:
    calls: list[int] = []
    hook = endpoint.pipeline.model.heads["ner"].register_forward_hook(lambda *_: calls.append(1))
    endpoint({"inputs": "a text", "parameters": {"tasks": ["ner"] * 100}})
    hook.remove()
    assert len(calls) == 1


def test_a_bad_item_spoils_no_other(endpoint: EndpointHandler) -> None:
    answer = endpoint({"inputs": ["so sad", 5, "a\ud800b", None, ["so sad"], "so sad"]})
    assert alike([answer[0], answer[5]], endpoint({"inputs": ["so sad", "so sad"]}))
    assert answer[1:5] == [
        {"error": "inputs[1] is 5 (int), not a text."},
        {"error": "inputs[2] is no valid Unicode: a lone surrogate at character 1."},
        {"error": "inputs[3] is None (NoneType), not a text."},
        {"error": "inputs[4] is ['so sad'] (list), not a text."},
    ]


@pytest.mark.parametrize(
    ("request_body", "message"),
    [
        (["a text"], "The request is a list; allowed: an object"),
        ({"parameters": {}}, "lacks the field inputs"),
        ({"inputs": {"text": "so sad"}}, "inputs is {'text': 'so sad'}; allowed: a text or a list of texts"),
        ({"inputs": "so sad", "options": {}}, "unknown field 'options'; known: inputs, parameters"),
        ({"inputs": "so sad", "parameters": ["ner"]}, r"parameters is \['ner'\]; allowed: an object"),
        ({"inputs": "so sad", "parameters": {"truncate": True}}, "unknown field 'truncate'; known: tasks, embedding"),
        ({"inputs": "so sad", "parameters": {"tasks": ["ner", "nerr"]}}, r"tasks is \['ner', 'nerr'\]; allowed: .*'topics'"),
        ({"inputs": "so sad", "parameters": {"tasks": {"ner": 1}}}, "parameters.tasks is {'ner': 1}"),
        ({"inputs": "so sad", "parameters": {"embedding": "no"}}, "parameters.embedding is 'no'; allowed: true, false or"),
        ({"inputs": [""] * (handler.MAX_TEXTS + 1)}, "holds 1,001 texts; allowed: 1,000 in one request"),
        ({"inputs": "a" * (handler.MAX_CHARACTERS + 1)}, "holds 100,001 characters; allowed: 100,000"),
    ],
)
def test_a_bad_request_is_refused_whole(endpoint: EndpointHandler, request_body: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        endpoint(request_body)


def test_a_request_may_be_as_large_as_the_limits(endpoint: EndpointHandler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handler, "MAX_CHARACTERS", 10)
    monkeypatch.setattr(handler, "MAX_TEXTS", 2)
    assert len(endpoint({"inputs": ["12345", "67890"]})) == 2


def test_values_nested_ever_so_deep_are_refused_cleanly(endpoint: EndpointHandler) -> None:
    deep = json.loads("[" * 900 + "]" * 900)
    assert "not a text" in endpoint({"inputs": [deep, "so sad"]})[0]["error"]
    for body in (
        {"inputs": {"a": deep}},
        {"inputs": "a", "parameters": deep},
        {"inputs": "a", "parameters": {"tasks": deep}},
    ):
        with pytest.raises(ValueError, match="allowed"):
            endpoint(body)


@settings(max_examples=60)
@given(body=REQUESTS)
def test_any_request_gets_an_answer_for_each_item_or_a_clean_error(endpoint: EndpointHandler, body: Any) -> None:
    try:
        answer = endpoint(body)
    except ValueError as error:
        message = str(error)
        assert 10 < len(message.encode()) < 500 and "\n" not in message
        return
    inputs = [body["inputs"]] if isinstance(body["inputs"], str) else body["inputs"]
    assert len(answer) == len(inputs)
    json.dumps(answer, allow_nan=False).encode()
    for index, (text, record) in enumerate(zip(inputs, answer, strict=True)):
        is_text = isinstance(text, str) and not any("\ud800" <= character <= "\udfff" for character in text)
        assert ("error" not in record) if is_text else record["error"].startswith(f"inputs[{index}] is ")


def _drop(weights: dict[str, torch.Tensor]) -> None:
    del weights["heads.ner.classifier.bias"]


def _add(weights: dict[str, torch.Tensor]) -> None:
    weights["heads.other.classifier.bias"] = torch.zeros(2)


def _cut(weights: dict[str, torch.Tensor]) -> None:
    weights["heads.ner.classifier.bias"] = torch.zeros(2)


@pytest.mark.parametrize(
    ("change", "message"),
    [(_drop, "missing in"), (_add, "the index does not name it"), (_cut, "is not the file of this release")],
)
def test_weights_that_are_not_the_models_are_refused(
    release: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    folder = shutil.copytree(release, tmp_path / "release")
    weights = load_file(folder / "heads/model.safetensors")
    change(weights)
    save_file(weights, folder / "heads/model.safetensors")
    with pytest.raises(WeightsError, match=rf"not a whole model:[\s\S]*{message}"):
        EndpointHandler(folder)


@pytest.mark.parametrize("length", [0, 5, 900])
def test_a_file_cut_short_is_named(release: Path, tmp_path: Path, length: int) -> None:
    folder = shutil.copytree(release, tmp_path / "release")
    path = folder / "heads/model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(WeightsError, match=r"heads/model.safetensors is missing or broken .* fetch it again"):
        EndpointHandler(folder)


def test_weights_outside_the_folder_are_refused(release: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(release, tmp_path / "release")
    index = json.loads((folder / WEIGHTS_INDEX).read_text("utf-8"))
    index["weight_map"]["linear.weight"] = "../model.safetensors"
    (folder / WEIGHTS_INDEX).write_text(json.dumps(index), "utf-8")
    with pytest.raises(WeightsError, match="inside the model's folder"):
        EndpointHandler(folder)


def test_a_pipeline_in_eight_threads_gives_the_answers_of_one(release: Path) -> None:
    texts = [[*TEXTS[: 1 + i % 4], f"{i} {TEXTS[i % 4]} " * (1 + i % 3)] for i in range(5 * THREADS)]
    fresh = pipeline("multitask", model=str(release), trust_remote_code=True, device="cpu")
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(fresh, texts))
    assert alike([plain(records) for records in found], [plain(fresh(batch)) for batch in texts])


class _Server(ThreadingHTTPServer):
    """Answers as huggingface-inference-toolkit does, but in a thread per request."""

    daemon_threads = True

    def __init__(self, endpoint: EndpointHandler) -> None:
        self.endpoint = endpoint
        super().__init__(("127.0.0.1", 0), _Answer)


class _Answer(BaseHTTPRequestHandler):
    server: _Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        try:
            status, answer = 200, self.server.endpoint(json.loads(body))
        except Exception as error:
            status, answer = 400, {"error": str(error)}
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Keeps the test's output clean."""


@pytest.fixture
def server(endpoint: EndpointHandler) -> Iterator[_Server]:
    with _Server(endpoint) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server: _Server, body: Any) -> tuple[int, Any]:
    """Returns status and answer of one request."""
    connection = HTTPConnection(*server.server_address, timeout=60)
    connection.request("POST", "/", json.dumps(body))
    response = connection.getresponse()
    found = response.status, json.loads(response.read())
    connection.close()
    return found


def test_under_load_every_client_gets_its_own_answer_and_memory_stays_flat(server: _Server) -> None:
    bodies = [{"inputs": [f"{i} {text}" for text in TEXTS[: 1 + i % 4]]} for i in range(2 * THREADS)]
    bodies += [{"inputs": [f"{i} so sad", i, "so sad"], "parameters": {"tasks": ["ner"]}} for i in range(THREADS)]
    bodies += [{"inputs": i} for i in range(THREADS)]
    expected = [ask(server, body) for body in bodies]
    assert [status for status, _ in expected] == [200] * (3 * THREADS) + [400] * THREADS
    assert len({json.dumps(answer) for _, answer in expected}) == len(bodies)  # mixed-up answers would show

    def one_round() -> int:
        """Returns the bytes that Python and NumPy hold after all requests were answered."""
        with ThreadPoolExecutor(THREADS) as pool:
            found = list(pool.map(lambda body: ask(server, body), bodies))
        assert all(
            status == known and alike(answer, answers)
            for (status, answer), (known, answers) in zip(found, expected, strict=True)
        )
        del found
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        first, *_, last = [one_round() for _ in range(3)]
    finally:
        tracemalloc.stop()
    assert last - first < 100_000  # a server that kept its answers would hold a megabyte more
