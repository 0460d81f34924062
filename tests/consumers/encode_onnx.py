"""Stores vectors made with ONNX Runtime and tokenizers alone: `python encode_onnx.py REPO TEXTS.json OUTPUT.npy`."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

if __name__ == "__main__":
    repo, texts, output = sys.argv[1:]
    tokenizer = Tokenizer.from_file(f"{repo}/tokenizer.json")
    tokenizer.enable_truncation(json.loads(Path(repo, "sentence_bert_config.json").read_text("utf-8"))["max_seq_length"])
    tokenizer.enable_padding()
    encodings = tokenizer.encode_batch(json.loads(Path(texts).read_text("utf-8")))
    feed = {
        "input_ids": np.array([x.ids for x in encodings]),
        "attention_mask": np.array([x.attention_mask for x in encodings]),
    }
    session = onnxruntime.InferenceSession(f"{repo}/onnx/model.onnx", providers=["CPUExecutionProvider"])
    (vectors,) = session.run(["sentence_embedding"], feed)
    assert not {"torch", "transformers"} & set(sys.modules), "this way must work without them"
    np.save(output, vectors)
