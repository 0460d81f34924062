"""Writes a release folder from a checkpoint: `python -m release.export runs/release/final OUTPUT --encoder ENCODER`.

A release holds the weights once, split so that every reader finds its part under the name it knows:

    model.safetensors                  the encoder alone, unprefixed: the starting encoder's own file, byte for byte
    2_Dense/model.safetensors          the projection
    heads/model.safetensors            task branch and heads (in a folder: some servers load every *.safetensors at the root)
    multitask.safetensors.index.json   which key is in which file, and the sha256 of each

next to the configuration, the code, the tokenizer and the files that sentence-transformers reads, in the legacy forms
that all its versions and the embedding servers understand. A checkpoint without a task branch has trained its encoder;
its encoder is then written from the checkpoint.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file

from annotator_multitask import ONNX_FILES, ONNX_PARTS, onnx_part
from common.files import ROOT, write_json
from configuration_multitask import WEIGHTS_INDEX, MultiTaskConfig
from modeling_multitask import MultiTaskModel
from tasks_multitask import POOLING_MODES
from weights_multitask import MODEL_PARTS, WeightsError, sha256

CODE_FILES = (*sorted(path.name for path in ROOT.glob("*_multitask.py")), "handler.py")
ENCODER_FILE = "model.safetensors"
DENSE_FILE = "2_Dense/model.safetensors"
HEADS_FILE = "heads/model.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt")  # the encoder's own, as they are
EXPORTS = [name for file in ONNX_FILES.values() for name in (file, *(onnx_part(file, part) for part in ONNX_PARTS))]
# Encoders that are known by the sha256 of their weights, wherever the copy at hand came from.
KNOWN_ENCODERS = {
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db": "sentence-transformers/all-MiniLM-L6-v2",
}
_POOLING_FLAGS = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens", "weightedmean": "weightedmean_tokens"}

_CALL_SETTINGS = {
    "is_local", "local_files_only", "max_length", "stride", "truncation_side", "truncation_strategy",
    "pad_to_multiple_of", "pad_token_type_id", "name_or_path",
}  # fmt: skip


def release_key(key: str, prefix: str) -> tuple[str, str]:
    """Returns under which key and in which file of a release the model's weight `key` is stored.

    Args:
        key: A key of `MultiTaskModel.state_dict()`.
        prefix: The model's `base_model_prefix`.
    """
    if not key.startswith(MODEL_PARTS):
        return key.removeprefix(prefix + "."), ENCODER_FILE
    return key, DENSE_FILE if key.startswith("linear.") else HEADS_FILE


def sentence_transformers_files(config: MultiTaskConfig, max_length: int) -> dict[str, Any]:
    """Returns the content of each file that sentence-transformers reads, by its path, in the legacy forms."""
    modules = ["Transformer", "Pooling", *(["Dense"] if config.embedding_dim else []), "Normalize"]
    paths = ["", *(f"{index}_{name}" for index, name in enumerate(modules) if index)]
    files: dict[str, Any] = {
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
            for i, (name, path) in enumerate(zip(modules, paths, strict=True))
        ],
        "sentence_bert_config.json": {"max_seq_length": max_length, "do_lower_case": False},
        "config_sentence_transformers.json": {"similarity_fn_name": "cosine"},
        "1_Pooling/config.json": {
            "word_embedding_dimension": config.hidden_size,
            **{f"pooling_mode_{_POOLING_FLAGS.get(mode, mode)}": mode == config.pooling_mode for mode in POOLING_MODES},
        },
    }
    if config.embedding_dim:
        files["2_Dense/config.json"] = {
            "in_features": config.hidden_size,
            "out_features": config.embedding_dim,
            "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity",
        }
    return files


def export(
    checkpoint: str | Path, output: str | Path, encoder: str | Path | None = None, dtype: torch.dtype = torch.float16
) -> None:
    """Writes a release of the model and tokenizer in `checkpoint` to the folder `output`.

    Everything is written beside and then moved into place, the index first away and `config.json` last: a folder in which
    an export was interrupted does not load.

    Args:
        checkpoint: Folder or Hub id of a trained model with its tokenizer.
        output: The release; what an earlier one left there is replaced.
        encoder: Folder or Hub id of the starting encoder, whose files a model with a task branch ships as they are.
        dtype: Of the weights in the files that are not the starting encoder's.

    Raises:
        WeightsError: The checkpoint is no whole model, its encoder is not the starting encoder to the bit, or a weight is too
            great for `dtype`.
        OSError: The checkpoint has no tokenizer, or the output cannot be written.
    """
    model, output = MultiTaskModel.from_pretrained(checkpoint), Path(output)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    if model.config.num_task_layers and encoder is None:
        raise WeightsError(
            f"{checkpoint} has a task branch (num_task_layers is {model.config.num_task_layers}): its release ships the starting "
            "encoder's own files. Name the folder or Hub id with --encoder."
        )
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=output) as folder:
        _write(model, tokenizer, Path(folder), encoder, dtype)
        _replace(Path(folder), output)


def _write(
    model: MultiTaskModel, tokenizer: PreTrainedTokenizerBase, folder: Path, encoder: str | Path | None, dtype: torch.dtype
) -> None:
    """Writes all files of a release to an empty folder."""
    max_length = min(limit for limit in (tokenizer.model_max_length, model.max_length) if limit is not None)
    _save_tokenizer(tokenizer, folder, max_length)
    source = None if encoder is None else _copy_encoder(model, folder, encoder)
    files: dict[str, dict[str, Tensor]] = {}
    for key, value in model.state_dict().items():
        name, file = release_key(key, model.base_model_prefix)
        files.setdefault(file, {})[name] = value
    for file, tensors in files.items():
        if source is None or file != ENCODER_FILE:
            # The projection stays as exact as it was fitted: an index moves over by it.
            _save(tensors, folder / file, torch.float32 if source and file == DENSE_FILE else dtype)
    index = {
        "metadata": {
            "total_size": sum((folder / file).stat().st_size for file in files),
            **({"encoder": source} if source else {}),
            "sha256": {file: sha256(folder / file) for file in (*files, *TOKENIZER_FILES) if (folder / file).exists()},
        },
        "weight_map": {name: file for file, tensors in sorted(files.items()) for name in sorted(tensors)},
    }
    fields = model.config.to_diff_dict()
    fields.pop("transformers_weights", None)
    fields |= {"dtype": "float32", "multitask_weights": WEIGHTS_INDEX}  # float16 weights load as float32
    documents = {WEIGHTS_INDEX: index, "config.json": fields}
    for path, content in {**documents, **sentence_transformers_files(model.config, max_length)}.items():
        write_json(folder / path, content)
    for name in CODE_FILES:
        shutil.copyfile(ROOT / name, folder / name)


def _save(tensors: dict[str, Tensor], path: Path, dtype: torch.dtype) -> None:
    stored = {name: x.to(dtype if x.is_floating_point() else x.dtype).contiguous() for name, x in tensors.items()}
    if broken := [name for name, x in stored.items() if not torch.isfinite(x).all()]:
        raise WeightsError(
            f"{', '.join(broken)}: not finite in {dtype}, whose greatest number is {torch.finfo(dtype).max:g}."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(stored, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes for the owner alone


def _copy_encoder(model: MultiTaskModel, folder: Path, encoder: str | Path) -> str:
    """Copies the starting encoder's files and returns what it is called; raises WeightsError if the model's differs from it."""
    weights = load_file(cached_file(encoder, ENCODER_FILE))
    own = model.encoder.state_dict()
    if changed := [key for key, value in own.items() if key not in weights or not torch.equal(weights[key], value)]:
        raise WeightsError(
            f"{len(changed)} weights of the encoder, {changed[0]} first, are not those of {encoder}. A release with a task branch "
            "ships the starting encoder as it is: name the one that the training started from."
        )
    for file in (ENCODER_FILE, *TOKENIZER_FILES):
        path = cached_file(encoder, file, _raise_exceptions_for_missing_entries=False)
        if path is not None:
            shutil.copyfile(path, folder / file)
    return KNOWN_ENCODERS.get(sha256(folder / ENCODER_FILE), Path(encoder).name if Path(encoder).exists() else str(encoder))


def _replace(folder: Path, output: Path) -> None:
    """Moves the files of a release into a folder, over those of an earlier one."""
    (output / WEIGHTS_INDEX).unlink(missing_ok=True)  # from here on, and until the end, nothing loads
    (output / "config.json").unlink(missing_ok=True)
    for file in (DENSE_FILE, HEADS_FILE, "2_Dense/config.json", *EXPORTS):
        (output / file).unlink(missing_ok=True)  # of other weights, or of a release with more parts
    last = {folder / "config.json": 1, folder / WEIGHTS_INDEX: 2}
    for path in sorted((x for x in folder.rglob("*") if x.is_file()), key=lambda x: last.get(x, 0)):
        target = output / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, output: Path, max_length: int) -> None:
    """Saves a tokenizer without truncation, padding and other traces of the calls and folders it has seen."""
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.model_max_length = max_length
    tokenizer.save_pretrained(output)
    path = output / "tokenizer_config.json"
    write_json(path, {k: v for k, v in json.loads(path.read_text("utf-8")).items() if k not in _CALL_SETTINGS})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder of a trained model with its tokenizer, or a Hub id")
    parser.add_argument("output", type=Path)
    parser.add_argument("--encoder", help="folder or Hub id of the starting encoder; needed for a model with a task branch")
    args = parser.parse_args()
    try:
        export(args.checkpoint, args.output, args.encoder)
    except (OSError, ValueError, WeightsError) as error:
        sys.exit(str(error))
    print(f"Wrote a release to {args.output}; check it with: python -m release.check {args.output}")


if __name__ == "__main__":
    main()
