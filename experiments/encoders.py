"""Starting encoders that stand for other shapes of the task branch, so that the model itself needs no options for them.

A branch that forks lower with fewer layers learns what a branch of the top layers of a shortened encoder learns, and one with
narrower feed-forward layers what one learns whose other units are zero: their gradients are zero too, so they stay so.
"""

from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer, BertModel


def shorten(encoder: BertModel, layers: int) -> None:
    """Drops the layers of an encoder above the first `layers`."""
    encoder.encoder.layer = encoder.encoder.layer[:layers]
    encoder.config.num_hidden_layers = layers


@torch.no_grad()
def narrow(encoder: BertModel, layers: int, share: float = 0.5) -> None:
    """Zeroes the `share` of feed-forward units, in each of the last `layers` layers, whose weights have the smallest norms."""
    for layer in encoder.encoder.layer[-layers:]:
        inner, outer = layer.intermediate.dense, layer.output.dense
        importance = inner.weight.norm(dim=1) * outer.weight.norm(dim=0)  # [units]
        least = importance.argsort()[: int(share * len(importance))]
        inner.weight[least], inner.bias[least], outer.weight[:, least] = 0.0, 0.0, 0.0


SHAPES = {"shorten": shorten, "narrow": narrow}


def shaped_encoder(source: str, shape: dict[str, int], folder: Path) -> str:
    """Returns a folder with the encoder `source` (Hub id or folder) after the changes of `shape`, by name of `SHAPES`."""
    encoder = AutoModel.from_pretrained(source)
    for name, layers in shape.items():
        SHAPES[name](encoder, layers)
    encoder.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return str(folder)
