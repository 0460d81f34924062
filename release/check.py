"""Lints a release folder: `python -m release.check FOLDER` lists what is wrong with it and fails if anything is."""

import argparse
import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from common.files import ROOT
from configuration_multitask import AUTO_MAP, CUSTOM_PIPELINES, WEIGHTS_INDEX, MultiTaskConfig
from modeling_multitask import MultiTaskModel
from pipeline_multitask import MultiTaskPipeline
from release import golden
from release.export import CODE_FILES, ENCODER_FILE, TOKENIZER_FILES, release_key, sentence_transformers_files
from weights_multitask import WeightsError, file_problems, read_index, sha256

_PICKLES = {
    ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill", ".msgpack", ".h5", ".keras", ".npy", ".npz"
}  # fmt: skip
# How a pickle of protocol 2 or later begins, or a zip archive, in which PyTorch keeps its pickles.
_PICKLED = re.compile(rb"\x80[\x02-\x05]|PK\x03\x04")
_REQUIRED = ("tokenizer.json", "tokenizer_config.json", *CODE_FILES)


def check(folder: str | Path) -> list[str]:
    """Returns one line for each thing that is wrong with a release folder; an empty list for a good one."""
    folder = Path(folder)
    if not folder.is_dir():
        return [f"{folder}: no such folder"]
    problems = [f"{name}: missing" for name in _REQUIRED if not (folder / name).is_file()]
    problems += _check_pickles(folder)
    try:
        fields = _read(folder / "config.json")
        config = MultiTaskConfig(**fields)
    except (ValueError, TypeError) as error:
        return [*problems, f"config.json: {error}"]
    problems += _check_config(fields, config)
    problems += _check_sentence_transformers(folder, config)
    problems += _check_weights(folder, config)
    problems += _check_root(folder)
    return problems or _check_loading(folder)


def _read(path: Path) -> Any:
    """Returns a parsed JSON file; raises ValueError if there is no such file, or it is not JSON."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, RecursionError, ValueError) as error:
        raise ValueError(f"cannot be read: {error}") from error


def git_files(checkout: Path, *options: str) -> list[str]:
    """Returns what `git ls-files` lists of a checkout: with no options, the files that git tracks.

    Raises:
        ValueError: git is not installed, or refuses; the message says why.
    """
    command = ["git", "-C", str(checkout), "ls-files", "-z", *options]
    try:
        done = subprocess.run(command, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", b"").decode(errors="replace").strip().splitlines() or [str(error)]
        raise ValueError(f"{checkout}: git cannot list its files: {reason[0]}") from error
    return done.stdout.decode("utf-8", "surrogateescape").split("\0")[:-1]


def _check_pickles(folder: Path) -> list[str]:
    """Returns which files outside hidden folders may be pickles; in a checkout, without those that git ignores."""
    try:
        if (folder / ".git").exists():
            names = [Path(name) for name in git_files(folder, "--cached", "--others", "--exclude-standard")]
        else:
            names = [path.relative_to(folder) for path in folder.rglob("*")]
        shown = (x for x in sorted(names) if not any(part.startswith(".") for part in x.parts[:-1]))
        found = [x.as_posix() for x in shown if _may_be_pickle(folder / x)]
    except (OSError, ValueError) as error:
        return [str(error)]
    return [f"{name}: may hold pickled code; releases carry safetensors only, so delete it" for name in found]


def _may_be_pickle(path: Path) -> bool:
    """Returns whether a file is a pickle by its name or its first bytes; the Hub scans deeper."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return path.suffix.lower() in _PICKLES or bool(_PICKLED.match(file.read(4)))


def _check_config(fields: dict[str, Any], config: MultiTaskConfig) -> list[str]:
    expected = {
        "auto_map": AUTO_MAP,
        "custom_pipelines": CUSTOM_PIPELINES,
        "architectures": config.to_dict()["architectures"],
        "multitask_weights": WEIGHTS_INDEX,
        "dtype": "float32",
    }
    problems = [
        f"config.json: {name} is {fields.get(name)!r}, should be {value!r}"
        for name, value in expected.items()
        if fields.get(name) != value
    ]
    if "attn_implementation" in fields or "_attn_implementation" in fields:
        problems.append("config.json: attn_implementation belongs to no release; it is the user's choice while loading")
    if "id2label" in fields or "label2id" in fields:
        problems.append("config.json: remove id2label and label2id; the labels of a release are in 'tasks' alone")
    return problems


def _check_sentence_transformers(folder: Path, config: MultiTaskConfig) -> list[str]:
    try:
        limit = _read(folder / "tokenizer_config.json")["model_max_length"]
    except (ValueError, KeyError, TypeError) as error:
        return [f"tokenizer_config.json: model_max_length is missing ({error!r})"]
    problems = []
    for path, expected in sentence_transformers_files(config, limit).items():
        try:
            if (content := _read(folder / path)) != expected:
                problems.append(f"{path}: holds {json.dumps(content)}, should be {json.dumps(expected)}")
        except ValueError as error:
            problems.append(f"{path}: {error}")
    return problems


def _check_weights(folder: Path, config: MultiTaskConfig) -> list[str]:
    """Compares index, files and the model that the configuration describes: same keys and places, same digests."""
    try:
        index = read_index(folder / WEIGHTS_INDEX)
        with torch.device("meta"):
            model = MultiTaskModel(copy.deepcopy(config))
    except Exception as error:  # of as many types as there are encoders that cannot be built
        return [f"config.json or {WEIGHTS_INDEX}: {error}"]
    expected = {release_key(key, model.base_model_prefix) for key in model.state_dict()}
    indexed = set(index["weight_map"].items())
    problems = [f"{WEIGHTS_INDEX}: {name} should be in {file}" for name, file in sorted(expected - indexed)]
    problems += [f"{WEIGHTS_INDEX}: {name} in {file} belongs to no such model" for name, file in sorted(indexed - expected)]
    problems += file_problems(index, lambda file: folder / file)
    return problems + _check_digests(folder, index)


def _check_digests(folder: Path, index: dict[str, Any]) -> list[str]:
    """Returns what is wrong with the digests that an index holds, of files of any size."""
    digests = index["metadata"].get("sha256", {})
    stored = {*index["weight_map"].values(), *(name for name in TOKENIZER_FILES if (folder / name).exists())}
    problems = [f"{WEIGHTS_INDEX}: metadata.sha256 lacks {file}" for file in sorted(stored - set(digests))]
    for file, digest in digests.items():
        if not (folder / file).is_file():
            problems.append(f"{file}: missing, but {WEIGHTS_INDEX} has its sha256")
        elif sha256(folder / file) != digest:
            problems.append(f"{file}: its sha256 is not the one in {WEIGHTS_INDEX}; fetch or export all again")
    return problems


def _check_root(folder: Path) -> list[str]:
    """Returns what servers would load beside the encoder: they read every *.safetensors, or that index, in the root."""
    patterns = ("*.safetensors", "model.safetensors.index.json")
    names = {path.name for pattern in patterns for path in folder.glob(pattern)} - {ENCODER_FILE}
    return [f"{name}: servers load the weights of the root into the encoder; move or delete it" for name in sorted(names)]


def _check_loading(folder: Path) -> list[str]:
    """Returns why a folder does not load in which nothing else was found, or in what its answers differ from golden.json."""
    try:
        model = MultiTaskModel.from_pretrained(folder)
        pipe = MultiTaskPipeline(model=model, tokenizer=AutoTokenizer.from_pretrained(folder), device="cpu")
    except (ImportError, OSError, ValueError, WeightsError) as error:
        return [f"does not load: {error}"]
    path = folder / golden.GOLDEN.relative_to(ROOT)
    return golden.differences(golden.answers(pipe), _read(path)) if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("."))
    folder = parser.parse_args().folder
    problems = check(folder)
    for problem in problems:
        print(problem)
    print(f"{folder}: {len(problems)} problems" if problems else f"{folder}: a good release")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
