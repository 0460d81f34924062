"""The HTTP service: every answer belongs to its request, bad requests harm no other, and a full queue says so."""

import base64
import json
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import TEXTS

pytest.importorskip("litserve")
from benchmarks.serving import Server, same

pytestmark = pytest.mark.integrations
PORT, QUEUE = 18765, 8


@pytest.fixture(scope="module")
def server(release: Path) -> Iterator[Server]:
    """The service over the tiny release."""
    with Server(str(release), PORT, QUEUE) as server:
        yield server


def ask(path: str, body: Any = None) -> tuple[int, Any, dict[str, str]]:
    """Returns status, answer and headers of a request: POST if there is a body, a str as it is."""
    connection = HTTPConnection("127.0.0.1", PORT, timeout=300)
    content = body if body is None or isinstance(body, str) else json.dumps(body)
    connection.request("GET" if body is None else "POST", path, content, {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer = response.read().decode()
    is_json = response.headers.get_content_type() == "application/json"
    connection.close()
    return response.status, json.loads(answer) if is_json else answer, dict(response.headers)


def test_each_answer_belongs_to_its_request_and_bad_ones_harm_no_other(server, pipe):
    texts = [f"{text} {number}" for number in range(QUEUE) for text in TEXTS]
    bodies: list[Any] = [{"inputs": text} for text in texts]
    bodies[::5] = [{"inputs": 5}] * len(bodies[::5])
    with ThreadPoolExecutor(QUEUE) as pool:
        answers = list(pool.map(lambda body: ask("/annotate", body), bodies))
    for body, text, (status, answer, _), expected in zip(bodies, texts, answers, pipe(texts), strict=True):
        if body["inputs"] == 5:
            assert status == 400 and answer["error"]["message"] == "inputs is 5; allowed: a text or a list of texts."
        else:
            assert status == 200 and len(answer) == 1 and same(answer[0], expected), text


def test_embeddings_have_the_form_that_openais_clients_read(server, pipe):
    expected = np.stack([record["sentence_embedding"] for record in pipe(TEXTS)])
    status, answer, _ = ask("/v1/embeddings", {"input": TEXTS, "model": "mine"})
    assert status == 200 and answer["object"] == "list" and answer["model"] == "mine"
    assert [item["index"] for item in answer["data"]] == list(range(len(TEXTS)))
    np.testing.assert_allclose([item["embedding"] for item in answer["data"]], expected, atol=1e-5)
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] > 0
    status, answer, _ = ask("/v1/embeddings", {"input": TEXTS[0], "encoding_format": "base64", "dimensions": 4})
    vector = np.frombuffer(base64.b64decode(answer["data"][0]["embedding"]), dtype="<f4")
    np.testing.assert_allclose(vector, expected[0, :4] / np.linalg.norm(expected[0, :4]), atol=1e-5)
    status, answer, _ = ask("/v1/embeddings", {"input": TEXTS[:1], "dimensions": 32})
    own = pipe(TEXTS[0], embedding="encoder")["encoder_embedding"]
    np.testing.assert_allclose(answer["data"][0]["embedding"], own / np.linalg.norm(own), atol=1e-5)


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/annotate", "{not json", 422, "JSON decode error"),
        ("/annotate", [], 422, "valid dictionary"),
        ("/annotate", {"inputs": "a", "parameters": {"tasks": ["x"]}}, 400, "parameters.tasks is ['x']; allowed"),
        ("/annotate", {"inputs": ["a"] * 1001}, 400, "inputs holds 1,001 texts; allowed: 1,000"),
        ("/annotate", {"inputs": "a" * 100_001}, 400, "inputs holds 100,001 characters; allowed: 100,000"),
        ("/annotate", {"inputs": "a" * 1_300_000}, 413, "too large"),
        ("/v1/embeddings", {}, 400, "input is None; allowed: a text or a list of texts"),
        ("/v1/embeddings", {"input": [[1, 2]]}, 400, "no token ids"),
        ("/v1/embeddings", {"input": ["a", "\ud800"]}, 400, "inputs[1] is no valid Unicode"),
        ("/v1/embeddings", {"input": "a", "dimensions": 9}, 400, "dimensions is 9; allowed: 1 to 8, or 32"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "hex"}, 400, "encoding_format is 'hex'"),
        ("/nowhere", {}, 404, "Not Found"),
    ],
)
def test_a_bad_request_is_answered_with_what_is_allowed(server, path, body, status, message):
    found, answer, _ = ask(path, body)
    assert found == status and message in json.dumps(answer, ensure_ascii=False)


def test_a_full_queue_is_answered_with_429_and_nothing_is_lost(server, pipe):
    texts = [f"{TEXTS[3]} {number}" * 20 for number in range(8 * QUEUE)]
    with ThreadPoolExecutor(len(texts)) as pool:
        answers = list(pool.map(lambda text: ask("/annotate", {"inputs": text}), texts))
    assert {status for status, _, _ in answers} == {200, 429}
    for (status, answer, headers), expected in zip(answers, pipe(texts), strict=True):
        assert same(answer[0], expected) if status == 200 else headers["retry-after"] == "1"
    assert ask("/health")[0] == 200
    assert 'http_requests_total{handler="/annotate",method="POST",status="2xx"}' in ask("/metrics")[1]


def test_running_requests_are_finished_before_the_server_stops(server):
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(ask, "/annotate", {"inputs": [f"{TEXTS[3]} {i}" * 20] * 50}) for i in range(4)]
        while 'http_requests_inprogress{handler="/annotate",method="POST"} 4.0' not in ask("/metrics")[1]:
            assert not any(future.done() for future in running), "they are long enough to be seen running"
        server.process.send_signal(signal.SIGTERM)
        assert [future.result()[0] for future in running] == [200] * 4
    assert server.process.wait(300) == 0
