"""Serves the model on Hugging Face Inference Endpoints: their server makes one `EndpointHandler` and calls it per request.

    {"inputs": ["a text", "another"], "parameters": {"tasks": ["sentiment", "ner"], "embedding": false}}

`inputs` is a text or a list of texts; `parameters` may be left out. The answer is a list with a record per text, as
`MultiTaskPipeline` gives it, the embedding as a list of floats. An item that is not a text is answered by
`{"error": "inputs[3] is 5 (int), not a text."}`, and the others are answered. An invalid request raises a
ValueError: the server (huggingface-inference-toolkit) answers every exception with status 400 and `{"error": message}`.
A returned error would go out with status 200, which clients take for success.

The containers come with transformers 4, which does not know the weight index of a release, so `AutoModel` cannot load one
there. This file reads the weights itself, the same way everywhere. Tried with transformers 4.51.3, 4.57.6 and 5.23.0
(torch 2.13, Python 3.11).
"""

import json
import reprlib
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent))  # a server loads this file alone, by its path
from annotator_multitask import VECTORS, text_problem
from configuration_multitask import MultiTaskConfig
from modeling_multitask import MultiTaskModel
from pipeline_multitask import MultiTaskPipeline
from tasks_multitask import is_number
from weights_multitask import WeightsError, load_release

# One request must not keep the others waiting for long: on a single CPU core this many characters take some ten seconds,
# or a minute where each is a token. The number of texts bounds the answer, in which an embedding takes about 6 kB.
MAX_CHARACTERS = 100_000
MAX_TEXTS = 1000

FIELDS = ("inputs", "parameters")
PARAMETERS = ("tasks", "embedding", "min_score")


class EndpointHandler:
    """Answers requests with the model of one release folder; many threads may share it.

    Args:
        path: The folder; empty: the one that holds this file.

    Raises:
        WeightsError: The folder's weights and configuration do not make a whole model.
    """

    def __init__(self, path: str | Path = "") -> None:
        folder = Path(path) if path else Path(__file__).parent
        fields = json.loads((folder / "config.json").read_text("utf-8"))
        model = MultiTaskModel(MultiTaskConfig(**{**fields, "dtype": torch.float32}))
        try:
            model.load_state_dict(load_release(folder, model.base_model_prefix))
        except RuntimeError as error:
            raise WeightsError(f"{folder} is not a whole model: {error}") from error
        tokenizer, device = AutoTokenizer.from_pretrained(folder), "cuda" if torch.cuda.is_available() else "cpu"
        self.pipeline = MultiTaskPipeline(model=model, tokenizer=tokenizer, device=device)

    def __call__(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        """Returns one record per text, ready for JSON, or `{"error": message}` for an item that is not a text.

        Args:
            data: The request, see above. `tasks` names the heads to compute (default all), `embedding` says whether to
                give the embedding (default true; "encoder": the encoder's own), `min_score` from which score on to answer.

        Raises:
            ValueError: The request is invalid; the message names the field, its value and what is allowed.
        """
        return self.answer([self.read(data)])[0]

    def read(self, data: Any) -> tuple[list[Any], dict[str, Any]]:
        """Returns a request's items, of which some may be no texts, and the options that the pipeline is called with.

        Raises:
            ValueError: The request as a whole is not allowed; the message names the field and what is.
        """
        if not isinstance(data, dict):
            raise ValueError(f'The request is a {type(data).__name__}; allowed: an object such as {{"inputs": "a text"}}.')
        _refuse_unknown("The request", data, FIELDS)
        if "inputs" not in data:
            raise ValueError("The request lacks the field inputs, a text or a list of texts.")
        inputs = data["inputs"]
        if not isinstance(inputs, str | list):
            raise ValueError(f"inputs is {_short(inputs)}; allowed: a text or a list of texts.")
        texts = [inputs] if isinstance(inputs, str) else inputs
        characters = sum(len(text) for text in texts if isinstance(text, str))
        for count, limit, unit in ((len(texts), MAX_TEXTS, "texts"), (characters, MAX_CHARACTERS, "characters")):
            if count > limit:
                raise ValueError(f"inputs holds {count:,} {unit}; allowed: {limit:,} in one request. Send it in parts.")
        return texts, self._read_options(data.get("parameters"))

    def answer(self, requests: list[tuple[list[Any], dict[str, Any]]]) -> list[list[dict[str, Any]]]:
        """Returns the answer of each request that `read` gave; texts with the same options share the model's batches."""
        answers: list[list[dict[str, Any]]] = []
        groups: dict[str, list[tuple[int, int]]] = {}  # maps options to the places of their texts
        for number, (items, options) in enumerate(requests):
            problems = [text_problem(item) for item in items]
            answers.append([{"error": f"inputs[{index}] {problem}."} for index, problem in enumerate(problems)])
            places = groups.setdefault(json.dumps(options), [])
            places += [(number, index) for index, problem in enumerate(problems) if problem is None]
        for key, places in groups.items():
            texts = [requests[number][0][index] for number, index in places]
            for (number, index), record in zip(places, self.pipeline(texts, **json.loads(key)), strict=True):
                answers[number][index] = {x: y.tolist() if x in VECTORS.values() else y for x, y in record.items()}
        return answers

    def _read_options(self, parameters: Any) -> dict[str, Any]:
        """Returns what the pipeline is called with."""
        if parameters is None:
            return {}
        if not isinstance(parameters, dict):
            raise ValueError(f"parameters is {_short(parameters)}; allowed: an object with {' and '.join(PARAMETERS)}.")
        _refuse_unknown("parameters", parameters, PARAMETERS)
        tasks, embedding = parameters.get("tasks"), parameters.get("embedding", True)
        names, known = [tasks] if isinstance(tasks, str) else tasks, list(self.pipeline.model.config.tasks)
        if names is not None and not (isinstance(names, list) and all(name in known for name in names)):
            raise ValueError(f"parameters.tasks is {_short(tasks)}; allowed: a list of names from {known}.")
        if not (isinstance(embedding, bool) or embedding == "encoder"):
            raise ValueError(f'parameters.embedding is {_short(embedding)}; allowed: true, false or "encoder".')
        least = parameters.get("min_score", 0)
        if not (is_number(least) and 0 <= least <= 1):
            raise ValueError(f"parameters.min_score is {_short(least)}; allowed: a number in [0, 1].")
        return {"tasks": names, "embedding": embedding, "min_score": least}


def _refuse_unknown(where: str, fields: dict[str, Any], known: tuple[str, ...]) -> None:
    if unknown := [name for name in fields if name not in known]:
        raise ValueError(f"{where} has the unknown field {_short(unknown[0])}; known: {', '.join(known)}.")


def _short(value: Any) -> str:
    """Returns a value as it looks in Python, cut to a length fit for a message; nested ever so deep, it does no harm."""
    return f"{reprlib.repr(value):.80}"
