"""Stores the vectors that fastembed gives for `onnx/model.onnx`: `python encode_fastembed.py REPO TEXTS.json OUTPUT.npy`.

It runs in another virtual environment, and therefore imports nothing of this repository.
"""

import json
import sys
from pathlib import Path

import numpy as np
from fastembed import TextEmbedding
from fastembed.common.model_description import ModelSource, PoolingType

if __name__ == "__main__":
    repo, texts, output = sys.argv[1:]
    TextEmbedding.add_custom_model(
        model="user/name",
        sources=ModelSource(hf="user/name"),
        model_file="onnx/model.onnx",
        dim=json.loads(Path(repo, "2_Dense/config.json").read_text("utf-8"))["out_features"],
        output_name="sentence_embedding",  # the graph has pooled, projected and normalized it
        pooling=PoolingType.DISABLED,
        normalization=False,
    )
    model = TextEmbedding("user/name", specific_model_path=repo, threads=1)
    np.save(output, np.stack(list(model.embed(json.loads(Path(texts).read_text("utf-8"))))))
