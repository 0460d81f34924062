"""Serves the model over HTTP: `python -m serving.server [MODEL] --port 8000`; needs requirements-serving.txt.

    POST /annotate        {"inputs": ["a text", "another"], "parameters": {"tasks": ["ner"]}} as handler.py takes it
    POST /v1/embeddings   {"input": ["a text"], "dimensions": 128} as OpenAI's clients send it
    GET  /health /metrics /docs

LitServe runs it: one process takes requests, and each of the two endpoints has a worker process with the model. A worker
takes the requests that wait and computes their texts together (dynamic batching).
"""

import argparse
import base64
import signal
from typing import Any

import litserve
import numpy as np
from fastapi.responses import JSONResponse, Response
from prometheus_fastapi_instrumentator import Instrumentator

from common.files import ROOT
from handler import MAX_CHARACTERS, EndpointHandler

BATCH_REQUESTS = 32
BATCH_SECONDS = 0.002  # how long a request may wait for others to share its batch
QUEUED_REQUESTS = 128  # waiting or running; more are answered with 429
QUEUE_SECONDS = 30  # a request that has waited longer is answered with 504
BODY_BYTES = 12 * MAX_CHARACTERS + 2**16  # JSON may write a character as two escapes of six bytes


class Annotate(litserve.LitAPI):
    """Records, as `handler.EndpointHandler` gives them: requests are read one by one, so that a bad one harms no other.

    A bad one goes on as the ValueError that says what is allowed.

    Args:
        model: The model's folder.
        path: Where the endpoint is.
    """

    def __init__(self, model: str, path: str) -> None:
        super().__init__(max_batch_size=BATCH_REQUESTS, batch_timeout=BATCH_SECONDS, api_path=path)
        self.model = model

    def setup(self, device: str) -> None:
        self.handler = EndpointHandler(self.model)

    def decode_request(self, request: dict) -> Any:
        try:
            return self.read(request)
        except ValueError as error:
            return error

    def predict(self, requests: list[Any]) -> list[Any]:
        answers = iter(self.answer([request for request in requests if not isinstance(request, ValueError)]))
        return [request if isinstance(request, ValueError) else next(answers) for request in requests]

    def encode_response(self, output: Any) -> Response:
        if isinstance(output, ValueError):
            return JSONResponse({"error": {"message": str(output), "type": "invalid_request_error"}}, status_code=400)
        return JSONResponse(output)

    def read(self, request: dict[str, Any]) -> Any:
        """Returns what `answer` takes; a ValueError says what of the request is not allowed."""
        return self.handler.read(request)

    def answer(self, requests: list[Any]) -> list[Any]:
        """Returns the answer of each request, ready for JSON."""
        return self.handler.answer(requests)


class Embeddings(Annotate):
    """Embeddings in the form of OpenAI's API; with `dimensions` at the encoder's width, the encoder's own."""

    def setup(self, device: str) -> None:
        super().setup(device)
        config = self.handler.pipeline.model.config
        self.full, self.encoder = config.embedding_dim or config.hidden_size, config.hidden_size

    def read(self, request: dict[str, Any]) -> Any:
        size, form = request.get("dimensions") or self.full, request.get("encoding_format") or "float"
        if type(size) is not int or not (1 <= size <= self.full or size == self.encoder):
            raise ValueError(
                f"dimensions is {size!r:.50}; allowed: 1 to {self.full}, or {self.encoder} for the encoder's own."
            )
        if form not in ("float", "base64"):
            raise ValueError(f'encoding_format is {form!r:.50}; allowed: "float" or "base64".')
        texts = request.get("input")
        items = texts if isinstance(texts, list) else [texts]
        if not items or not all(isinstance(item, str) for item in items):
            raise ValueError(f"input is {texts!r:.50}; allowed: a text or a list of texts (no token ids).")
        vector = "encoder" if size > self.full else True
        return *self.handler.read({"inputs": items, "parameters": {"tasks": [], "embedding": vector}}), size, form, request

    def answer(self, requests: list[Any]) -> list[Any]:
        records = self.handler.answer([(texts, options) for texts, options, *_ in requests])
        return [self._response(*request, answer) for request, answer in zip(requests, records, strict=True)]

    def _response(self, texts: list[str], _: Any, size: int, form: str, request: dict, records: list[dict]) -> Any:
        if errors := [record["error"] for record in records if "error" in record]:
            return ValueError(errors[0])
        vectors = np.array([next(iter(record.values())) for record in records], dtype="<f4")[:, :size]
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        shown = [base64.b64encode(x.tobytes()).decode() for x in vectors] if form == "base64" else vectors.tolist()
        tokens = sum(map(len, self.handler.pipeline.tokenizer(texts, truncation=False)["input_ids"]))
        return {
            "object": "list",
            "data": [{"object": "embedding", "index": index, "embedding": x} for index, x in enumerate(shown)],
            "model": request.get("model", "multitask-minilm"),
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }


class Capacity:
    """Middleware that answers 429 while `limit` requests wait or run, so that a queue never grows without bound."""

    def __init__(self, app: Any, limit: int) -> None:
        self.app, self.limit, self.running = app, limit, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        if self.running >= self.limit:
            message = f"{self.limit} requests are waiting; send this one again later."
            refusal = JSONResponse({"error": {"message": message}}, status_code=429, headers={"Retry-After": "1"})
            return await refusal(scope, receive, send)
        self.running += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.running -= 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(ROOT), help="the model's folder; default: this repository")
    parser.add_argument("--host", default="127.0.0.1", choices=["127.0.0.1", "0.0.0.0", "::"])
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--queued-requests", type=int, default=QUEUED_REQUESTS, help="more are answered with 429")
    args = parser.parse_args()
    server = litserve.LitServer(
        [Annotate(args.model, "/annotate"), Embeddings(args.model, "/v1/embeddings")],
        timeout=QUEUE_SECONDS,
        max_payload_size=BODY_BYTES,
        middlewares=[(Capacity, {"limit": args.queued_requests})],
    )
    metrics = Instrumentator(should_instrument_requests_inprogress=True, inprogress_labels=True)
    metrics.instrument(server.app).expose(server.app)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # LitServe finishes running requests on an interrupt alone
    # One API process: queue and metrics are that process's own.
    server.run(host=args.host, port=args.port, num_api_servers=1, generate_client_file=False)


if __name__ == "__main__":
    main()
