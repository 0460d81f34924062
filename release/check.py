"""Lints a release folder: `python -m release.check FOLDER` lists what is wrong with it and fails if anything is."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from configuration_multitask import AUTO_MAP, CUSTOM_PIPELINES, WEIGHTS_INDEX, MultiTaskConfig
from modeling_multitask import MultiTaskModel, WeightsError, check_weight_map
from release.export import CODE_FILES, release_key, sentence_transformers_files

_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill", ".msgpack", ".h5"}
_REQUIRED = ("tokenizer.json", "tokenizer_config.json", *CODE_FILES)


def check(folder: str | Path) -> list[str]:
    """Returns one line for each thing that is wrong with a release folder; an empty list for a good one."""
    folder = Path(folder)
    if not folder.is_dir():
        return [f"{folder}: no such folder"]
    problems = [f"{name}: missing" for name in _REQUIRED if not (folder / name).is_file()]
    problems += [
        f"{path.relative_to(folder)}: may hold pickled code; releases carry safetensors only" for path in _pickles(folder)
    ]
    try:
        fields = _read(folder / "config.json")
        config = MultiTaskConfig(**fields)
    except (ValueError, TypeError) as error:
        return [*problems, f"config.json: {error}"]
    problems += _check_config(fields, config)
    problems += _check_sentence_transformers(folder, config)
    problems += _check_weights(folder, config)
    return problems


def _read(path: Path) -> Any:
    """Returns a parsed JSON file.

    Raises:
        ValueError: There is no such file, or it is no JSON.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot be read: {error}") from error


def _pickles(folder: Path) -> list[Path]:
    """Returns files that are pickles by their names, outside hidden folders and virtual environments."""
    found, folders = [], [folder]
    while folders:
        for path in sorted(folders.pop().iterdir()):
            if path.is_dir() and not path.name.startswith(".") and not (path / "pyvenv.cfg").exists():
                folders.append(path)
            elif path.suffix in _PICKLES:
                found.append(path)
    return found


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
    if "id2label" in fields or "label2id" in fields:
        problems.append("config.json: id2label and label2id belong to no release; labels stand in 'tasks' alone")
    return problems


def _check_sentence_transformers(folder: Path, config: MultiTaskConfig) -> list[str]:
    try:
        max_length = _read(folder / "sentence_bert_config.json")["max_seq_length"]
        limit = _read(folder / "tokenizer_config.json")["model_max_length"]
    except (ValueError, KeyError, TypeError) as error:
        return [
            f"sentence_bert_config.json, tokenizer_config.json: max_seq_length or model_max_length is missing ({error!r})"
        ]
    problems = []
    if max_length != limit:
        problems.append(
            f"sentence_bert_config.json: max_seq_length is {max_length}, the tokenizer's model_max_length {limit}"
        )
    for path, expected in sentence_transformers_files(config, max_length).items():
        try:
            content = _read(folder / path)
        except ValueError as error:
            problems.append(f"{path}: {error}")
            continue
        if content != expected:
            problems.append(f"{path}: holds {json.dumps(content)}, should be {json.dumps(expected)}")
    return problems


def _check_weights(folder: Path, config: MultiTaskConfig) -> list[str]:
    """Compares index, files and the model that the configuration describes: same keys, same places, same shapes."""
    try:
        weight_map = check_weight_map(_read(folder / WEIGHTS_INDEX), WEIGHTS_INDEX)
    except (WeightsError, ValueError) as error:
        return [str(error)]
    with torch.device("meta"):
        model = MultiTaskModel(config)
    expected = {}
    for key, value in model.state_dict().items():
        name, file = release_key(key, model.base_model_prefix)
        expected[name, file] = list(value.shape)
    stored, problems = {}, []
    for file in sorted({file for _, file in expected} | set(weight_map.values())):
        try:
            with safe_open(folder / file, framework="pt") as weights:
                stored.update({(name, file): weights.get_slice(name).get_shape() for name in weights.keys()})  # noqa: SIM118 (no dict)
        except (OSError, SafetensorError) as error:
            problems.append(f"{file}: cannot be read: {error}")
    indexed = set(weight_map.items())
    problems += [f"{WEIGHTS_INDEX}: {name} should be in {file}" for name, file in sorted(set(expected) - indexed)]
    problems += [
        f"{WEIGHTS_INDEX}: {name} in {file} belongs to no such model" for name, file in sorted(indexed - set(expected))
    ]
    problems += [f"{file}: {name} is missing" for name, file in sorted(set(expected) - set(stored))]
    problems += [f"{file}: {name} belongs to no such model" for name, file in sorted(set(stored) - set(expected))]
    problems += [
        f"{file}: {name} has shape {stored[name, file]}, config.json asks for {expected[name, file]}"
        for name, file in sorted(set(stored) & set(expected))
        if stored[name, file] != expected[name, file]
    ]
    return problems


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
