"""Writes a release folder from a checkpoint: `python -m release.export runs/release/final OUTPUT`.

A release holds the weights once, split so that every reader finds its part under the name it knows:

    model.safetensors                  the encoder alone, unprefixed
    2_Dense/model.safetensors          the projection
    heads/model.safetensors            the heads (in a folder: some servers load every *.safetensors at the root)
    multitask.safetensors.index.json   which key is in which file

next to the configuration, the code, the tokenizer and the files that sentence-transformers reads, in the legacy forms
that all its versions and the embedding servers understand.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from configuration_multitask import POOLING_MODES, WEIGHTS_INDEX, MultiTaskConfig
from modeling_multitask import MultiTaskModel
from pipeline_multitask import ONNX_FILES

ROOT = Path(__file__).resolve().parent.parent
CODE_FILES = ("configuration_multitask.py", "weights_multitask.py", "modeling_multitask.py", "pipeline_multitask.py", "handler.py")
ENCODER_FILE = "model.safetensors"
DENSE_FILE = "2_Dense/model.safetensors"
HEADS_FILE = "heads/model.safetensors"
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
    if key.startswith(("heads.", "task_branch.")):
        return key, HEADS_FILE
    if key.startswith("linear."):
        return key, DENSE_FILE
    return key.removeprefix(prefix + "."), ENCODER_FILE


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


def release_config(config: MultiTaskConfig) -> dict[str, Any]:
    """Returns the content of `config.json`: stored weights may be float16, they load as float32."""
    fields = config.to_diff_dict()
    fields.pop("transformers_weights", None)
    return {**fields, "dtype": "float32", "multitask_weights": WEIGHTS_INDEX}


def export(checkpoint: str | Path, output: str | Path, dtype: torch.dtype = torch.float16) -> None:
    """Writes a release of the model and tokenizer in `checkpoint` to the folder `output`.

    Raises:
        WeightsError: The checkpoint is no whole model.
        OSError: The checkpoint has no tokenizer, or the output cannot be written.
    """
    model, output = MultiTaskModel.from_pretrained(checkpoint), Path(output)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    max_length = min(limit for limit in (tokenizer.model_max_length, model.max_length) if limit is not None)
    files: dict[str, dict[str, Tensor]] = {}
    for key, value in model.state_dict().items():
        name, file = release_key(key, model.base_model_prefix)
        files.setdefault(file, {})[name] = value.to(dtype if value.is_floating_point() else value.dtype).contiguous()
    for file in {DENSE_FILE, HEADS_FILE, "2_Dense/config.json", *ONNX_FILES.values()}:
        (output / file).unlink(missing_ok=True)  # left by an earlier release, of other weights or with more parts
    for file, tensors in files.items():
        (output / file).parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, output / file, metadata={"format": "pt"})
        (output / file).chmod(0o644)  # safetensors writes for the owner alone
    index = {
        "metadata": {
            "total_size": sum(x.numel() * x.element_size() for tensors in files.values() for x in tensors.values())
        },
        "weight_map": {name: file for file, tensors in sorted(files.items()) for name in sorted(tensors)},
    }
    documents = {WEIGHTS_INDEX: index, "config.json": release_config(model.config)}
    for path, content in {**documents, **sentence_transformers_files(model.config, max_length)}.items():
        (output / path).parent.mkdir(parents=True, exist_ok=True)
        (output / path).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
    _save_tokenizer(tokenizer, output, max_length)
    for name in CODE_FILES:
        if output.resolve() != ROOT:
            shutil.copyfile(ROOT / name, output / name)


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, output: Path, max_length: int) -> None:
    """Saves a tokenizer without truncation, padding and other traces of the calls and folders it has seen."""
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.model_max_length = max_length
    tokenizer.save_pretrained(output)
    path = output / "tokenizer_config.json"
    fields = {name: value for name, value in json.loads(path.read_text("utf-8")).items() if name not in _CALL_SETTINGS}
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder of a trained model with its tokenizer, or a Hub id")
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    export(args.checkpoint, args.output)
    print(f"Wrote a release to {args.output}; look it over with: python -m release.check {args.output}")


if __name__ == "__main__":
    main()
