"""The repository itself, and what a result depends on besides its recipe."""

import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("torch", "transformers", "sentence-transformers", "datasets", "seqeval", "scikit-learn")


def environment_info() -> dict[str, Any]:
    """Returns what a result depends on besides its recipe: revision, libraries, machine."""
    revision = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False)
    return {
        "revision": revision.stdout.strip(),
        "libraries": {name: version(name) for name in LIBRARIES},
        "hardware": {"machine": platform.machine(), "threads": torch.get_num_threads(), "cuda": torch.cuda.is_available()},
    }


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file; its folder is created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
