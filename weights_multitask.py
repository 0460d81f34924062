"""Stored weights: the checks that make sure a model is whole before anyone uses it.

The model, `handler.py` and the scripts in `release/` share them. A release is an index and the safetensors files that it names;
a checkpoint is a single `model.safetensors`.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import cached_file

try:
    if not TYPE_CHECKING:  # mypy checks these files outside a package
        from .configuration_multitask import WEIGHTS_INDEX, MultiTaskConfig, is_inside
        from .tasks_multitask import sha256
except ImportError:  # no package around this file: imported from the repository's root, by its own scripts
    from configuration_multitask import WEIGHTS_INDEX, MultiTaskConfig, is_inside
    from tasks_multitask import sha256

CHECKPOINT_FILE = "model.safetensors"
BRANCH = "task_branch."
MODEL_PARTS = ("linear.", BRANCH, "heads.")  # all other keys of a release are the encoder's, without its prefix
DIGESTED_AT_LOAD = 32 * 2**20  # bytes; larger files are left to `release.check`


class WeightsError(Exception):
    """The stored weights and the configuration do not make a whole model.

    Neither a ValueError nor an OSError: `transformers.pipeline` answers those by trying the plain encoder instead.
    """


def refuse(source: str | Path | None, problems: list[str]) -> None:
    """Raises a WeightsError that lists the problems, if there are any."""
    if problems:
        raise WeightsError("\n  ".join([f"{source} is not a whole model:", *problems]))


def read_index(path: str | Path) -> dict[str, Any]:
    """Returns the content of an index file.

    Raises:
        WeightsError: The file is missing or no index, or names a file outside its folder or one that is not safetensors.
    """
    name = Path(path).name
    try:
        fields = json.loads(Path(path).read_text("utf-8"))
    except (OSError, RecursionError, ValueError) as error:
        raise WeightsError(f"{name}, which config.json names in 'multitask_weights', is unreadable: {error}") from error
    found = fields if isinstance(fields, dict) else {}
    weight_map = found.get("weight_map")
    if not isinstance(found.get("metadata"), dict) or not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{name}: needs the objects 'metadata' and 'weight_map' at its root, the latter not empty.")
    for key, file in weight_map.items():
        if not is_inside(file, ".safetensors"):
            raise WeightsError(
                f"{name}: weight_map[{key!r}] is {file!r}; allowed: a *.safetensors file inside the model's folder."
            )
    return found


def file_problems(index: dict[str, Any] | None, locate: Callable[[str], str | Path | None]) -> list[str]:
    """Returns one line for each way in which the stored files differ from what the index says, from their headers alone.

    A checkpoint has no index. `locate` returns the local path of a file that the index names. Files of up to 32 MB are also
    compared with the digests in the index, if it has them.
    """
    weight_map = index["weight_map"] if index else {}
    digests = index["metadata"].get("sha256", {}) if index else {}
    problems = []
    for file in sorted(set(weight_map.values())) or [CHECKPOINT_FILE]:
        try:
            path = locate(file)
            with safe_open(path, framework="pt") as weights:
                stored = {key: weights.get_slice(key).get_dtype() for key in weights.keys()}  # noqa: SIM118 (no dict)
        except (OSError, SafetensorError, TypeError) as error:
            problems.append(f"{file} is missing or broken ({error}); fetch it again")
            continue
        named = {key for key, place in weight_map.items() if place == file}
        problems += _key_problems(file, stored, named or set(stored))
        if file in digests and Path(str(path)).stat().st_size <= DIGESTED_AT_LOAD and sha256(str(path)) != digests[file]:
            problems.append(
                f"{file} is not the file of this release: its sha256 is not the one in the index; fetch all again"
            )
    return problems


def _key_problems(file: str, stored: dict[str, str], named: set[str]) -> list[str]:
    weights = {key for key, dtype in stored.items() if dtype.startswith(("F", "BF"))}
    others = sorted(named & set(stored) - weights)
    problems = [f"{key}: missing in {file}" for key in sorted(named - set(stored))]
    problems += [f"{key}: {file} has dtype {stored[key]}; weights must be floating-point" for key in others]
    # Integers are buffers, such as the `position_ids` of older checkpoints, which the model computes itself.
    return problems + [f"{key}: stored in {file}, but the index does not name it there" for key in sorted(weights - named)]


def check_stored(source: str | Path | None, config: MultiTaskConfig, hub: dict[str, Any]) -> dict[str, str]:
    """Returns the weight map of a release, empty for a checkpoint, after checking the files without loading them.

    `source` is a folder, or with options such as `revision` a repository on the Hub.

    Raises:
        WeightsError: The index is malformed, or a file is missing, broken, of another release, or holds other keys.
    """
    if source is None or getattr(config, "quantization_config", None) is not None:  # quantized weights are integers
        return {}
    name = getattr(config, "transformers_weights", None)
    if name is None:
        has_checkpoint = cached_file(source, CHECKPOINT_FILE, _raise_exceptions_for_missing_entries=False, **hub)
        refuse(source, file_problems(None, lambda file: cached_file(source, file, **hub)) if has_checkpoint else [])
        return {}
    try:
        index = read_index(cached_file(source, name, **hub))
    except OSError as error:
        raise WeightsError(
            f"{source}: {name}, which config.json names in 'multitask_weights', is missing: {error}"
        ) from error
    refuse(source, file_problems(index, lambda file: cached_file(source, file, **hub)))
    return index["weight_map"]


def loading_problems(info: dict[str, Any], weight_map: dict[str, str], config: MultiTaskConfig) -> list[str]:
    """Returns one line for each weight that `from_pretrained` could not place, from its loading info."""

    def where(key: str) -> str:  # the index holds the encoder's keys without the model's prefix
        return weight_map.get(key) or weight_map.get(key.partition(".")[2]) or "the stored weights"

    problems = [(key, f"missing in {where(key)}") for key in sorted(info["missing_keys"])]
    problems += [(key, "stored, but config.json describes no such weight") for key in sorted(info["unexpected_keys"])]
    for key, stored, expected in sorted(info["mismatched_keys"]):
        problems.append((key, f"{where(key)} holds shape {list(stored)}, config.json asks for {list(expected)}"))
    return [f"{key}: {problem}{_hint(key, config)}" for key, problem in problems]


def _hint(key: str, config: MultiTaskConfig) -> str:
    """Returns which field of the configuration a weight follows from, in parentheses; empty for the encoder's."""
    if key.startswith(BRANCH):
        return f" (num_task_layers is {config.num_task_layers})"
    task = key.split(".")[1] if key.startswith("heads.") else None
    return f" (tasks.{task}.labels has {len(config.tasks[task]['labels'])} labels)" if task in config.tasks else ""


def not_finite(weights: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Returns one line for each tensor that holds a NaN or an infinity."""
    return [
        f"{name}: holds values that are not finite"
        for name, x in weights
        if x.device.type != "meta" and x.is_floating_point() and not torch.isfinite(x).all()
    ]


def load_release(folder: str | Path, prefix: str) -> dict[str, Tensor]:
    """Returns the state dict of a release folder, after the same checks that `from_pretrained` makes.

    For environments whose transformers cannot read an index, such as Inference Endpoints. `prefix` is the model's
    `base_model_prefix`.

    Raises:
        WeightsError: A file is missing, broken or of another release, or holds other keys than the index says.
    """
    index = read_index(Path(folder, WEIGHTS_INDEX))
    refuse(folder, file_problems(index, lambda file: Path(folder, file)))
    found = {}
    for file in sorted(set(index["weight_map"].values())):
        with safe_open(Path(folder, file), framework="pt") as weights:
            for key in [key for key, place in index["weight_map"].items() if place == file]:
                found[key if key.startswith(MODEL_PARTS) else f"{prefix}.{key}"] = weights.get_tensor(key)
    refuse(folder, not_finite(found.items()))
    return found
