"""Measures the HTTP service on loopback: `python -m benchmarks.serving` starts `serving.server`, and writes results/serving.json.

At 1, 8 and 64 clients, each of which sends its next text when it has the answer to the last, it gives the median and the 99th
percentile of the time to an answer, and texts per second; beside them the pipeline called in Python, text by text. Every answer is
compared with the pipeline's own for that text. Then more clients than the server's queue takes send at once: each request must
be answered, or refused with 429.
"""

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import pipeline

from benchmarks.run import write_result
from common.files import ROOT

CLIENTS = (1, 8, 64)
BURST_CLIENTS = 96
BURST_QUEUE = 32
PATIENCE = 600  # seconds


def read_texts(count: int) -> list[str]:
    """Returns so many texts of the samples, different ones as far as they go."""
    rows = [
        json.loads(line)
        for name in ("sentiment", "emotion", "ner")
        for line in (ROOT / f"tests/samples/{name}.jsonl").read_text("utf-8").splitlines()
    ]
    texts = list(dict.fromkeys(" ".join(row["tokens"]) if "tokens" in row else row["text"] for row in rows))
    return list(islice(cycle(texts[:: max(1, len(texts) // count)]), count))


def post(port: int, text: str) -> tuple[int, Any]:
    """Returns the status and the decoded answer to a request for one text's record."""
    connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    connection.request("POST", "/annotate", json.dumps({"inputs": text}), {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer = response.status, json.loads(response.read())
    connection.close()
    return answer


def same(record: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Returns whether two records are of the same text: batches of another size change the last bits alone."""
    found = [(entity["word"], entity["start"]) for entity in record["entities"]["ner"]]
    return found == [(entity["word"], entity["start"]) for entity in expected["entities"]["ner"]] and np.allclose(
        record["sentence_embedding"], expected["sentence_embedding"], atol=1e-4
    )


def measure(call: Callable[[str], bool], texts: list[str], clients: int) -> dict[str, Any]:
    """Returns latency and throughput of calls by so many clients, and how many gave the right answer."""

    def timed(text: str) -> tuple[bool, float]:
        start = time.perf_counter()
        right = call(text)
        return right, time.perf_counter() - start

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(timed, texts))
    seconds = time.perf_counter() - start
    p50, p99 = np.percentile([1000 * taken for _, taken in answers], [50, 99])
    figures = {"p50_ms": round(p50, 1), "p99_ms": round(p99, 1), "texts_per_second": round(len(texts) / seconds, 1)}
    return {"clients": clients, "requests": len(texts), "right": sum(right for right, _ in answers), **figures}


class Server:
    """The service in a process of its own, ready when entered, and stopped by SIGTERM on leaving."""

    def __init__(self, model: str, port: int, queued_requests: int) -> None:
        self.port, options = port, ["--port", str(port), "--queued-requests", str(queued_requests)]
        self.command = [sys.executable, "-m", "serving.server", model, *options]

    def __enter__(self) -> "Server":
        self.process = subprocess.Popen(self.command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(PATIENCE):
            if self.process.poll() is not None:
                raise RuntimeError(f"{' '.join(self.command)} exited with {self.process.returncode}; run it to see why.")
            with suppress(OSError, HTTPException):
                connection = HTTPConnection("127.0.0.1", self.port, timeout=10)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return self
            time.sleep(1)
        raise RuntimeError(f"the server was not ready after {PATIENCE} seconds")

    def __exit__(self, *_: Any) -> None:
        self.process.terminate()
        self.process.wait(PATIENCE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(ROOT), help="the model's folder; default: this repository")
    parser.add_argument("--requests", type=int, default=256, help="of each number of clients")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--output", type=Path, default=ROOT / "results/serving.json")
    args = parser.parse_args()
    texts = read_texts(args.requests)
    pipe = pipeline("multitask", model=args.model, trust_remote_code=True)
    expected = dict(zip(texts, pipe(texts), strict=True))
    one_by_one = measure(lambda text: same(pipe(text), expected[text]), texts, 1)

    def call(text: str) -> bool:
        status, answer = post(args.port, text)
        return status == 200 and same(answer[0], expected[text])

    with Server(args.model, args.port, max(CLIENTS)):
        measure(call, texts[:16], 8)  # the first batches of each size are slower
        served = [measure(call, texts, clients) for clients in CLIENTS]
    with Server(args.model, args.port, BURST_QUEUE), ThreadPoolExecutor(BURST_CLIENTS) as pool:
        answers = list(pool.map(lambda text: (text, *post(args.port, text)), texts))
    right = sum(status == 200 and same(answer[0], expected[text]) for text, status, answer in answers)
    statuses = {str(status): count for status, count in sorted(Counter(status for _, status, _ in answers).items())}
    burst = {"clients": BURST_CLIENTS, "queued_requests": BURST_QUEUE, "statuses": statuses, "right": right}
    result = {"command": "python -m benchmarks.serving", "threads": torch.get_num_threads(), "one_by_one": one_by_one}
    write_result(args.output, {**result, "served": served, "burst": burst})
    print(args.output.read_text("utf-8"))


if __name__ == "__main__":
    main()
