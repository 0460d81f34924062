"""Stores the vectors that whichever sentence-transformers is installed gives: `python encode.py REPO TEXTS.json OUTPUT.npy`.

It runs in other virtual environments, and therefore imports nothing of this repository.
"""

import json
import sys
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer

if __name__ == "__main__":
    repo, texts, output = sys.argv[1:]
    model = SentenceTransformer(repo, device="cpu")
    np.save(output, model.encode(json.loads(Path(texts).read_text("utf-8")), show_progress_bar=False))
