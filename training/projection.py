"""Fits the projection: `python -m training.projection --encoder ENCODER --data DATA --output projection.safetensors`.

The encoder is frozen: its vectors of varied texts are computed once, and only the matrix is fitted. All its dimensions
together span the principal axes. Within them, a rotation is fitted that no similarity of the whole embedding notices, so that
each prefix keeps the neighbours of the full vector: the cross-entropy between the softmax over full similarities and
the one over the prefix's similarities, within random batches. Each prefix learns a temperature of its own. The similarities of
a prefix spread more than full ones; under a fixed temperature the fit makes up for that, and ends below the principal axes.

The result file compares both on validation texts, none of which was fitted; `evaluation.embedding` reports the test sets.
Axes: N texts, H the encoder's dimensions, E the embedding's, P the longest prefix's, D any prefix's, B a batch.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from common.files import environment_info, write_json
from evaluation.embedding import EncoderVectors, View, distinct_texts, neighbour_measure, pair_measure, prefix_views

# Train splits to fit on: sets that are open for any use, of several domains, none of which a test set comes from, but
# WNUT-17: its train split is one of many.
FIT_SETS = (
    "clinc150", "crossner", "emobank_sentiment", "goemotions", "gum_open", "hwu64", "newsmtsc",
    "redocred", "sms_spam", "uner_ewt", "vader_sentiment", "wnut17", "xed_emotion",
)  # fmt: skip
TEXTS_PER_SET = 2000
# Validation splits to choose on; of the last three nothing is fitted.
VALIDATION_SETS = ("wnut17", "goemotions", "newsmtsc", "vader_sentiment", "conll2003", "tweet_emotion", "tweet_sentiment")
VALIDATION_TEXTS = 1000
VALIDATION_PAIRS = "stsb"
SCALE_RATE = 0.02  # the learning rate of the temperatures


@dataclass(frozen=True)
class FitSettings:
    """How the prefixes are fitted.

    Attributes:
        dims: The embedding's dimensions, then those of its prefixes, each smaller than the one before.
        steps: Of Adam, on one random batch each.
        learning_rate: At the start; it falls to zero along a cosine.
        temperature: Of the softmax over full similarities; how far down the list neighbours count.
        batch_size: Texts among which neighbours are ranked.
    """

    dims: tuple[int, ...] = (256, 128, 64)
    steps: int = 150
    learning_rate: float = 3e-3
    temperature: float = 0.05
    batch_size: int = 700


SETTINGS = FitSettings()


def principal_axes(vectors: Tensor, count: int) -> Tensor:
    """Returns the first principal axes of vectors that are not centred, float32 [count, H], rows orthonormal.

    Args:
        vectors: float [N, H]; each is scaled to unit length first.
        count: At most H.
    """
    unit = F.normalize(vectors.double(), dim=-1)
    _, axes = torch.linalg.eigh(unit.T @ unit)  # by growing variance
    return axes.flip(1)[:, :count].T.float().contiguous()


def fit_projection(vectors: Tensor, settings: FitSettings = SETTINGS, seed: int = 0) -> Tensor:
    """Returns the projection, float32 [E, H], rows orthonormal; the same for the same seed.

    All E dimensions give the similarities of the principal components. Each prefix is an embedding of its own: multiply by
    its rows and normalize.

    Args:
        vectors: float [N, H], a frozen encoder's pooled vectors of distinct texts; their length does not matter.
        settings: How to fit.
        seed: Of the batches.

    Raises:
        ValueError: There are fewer texts than dimensions, or more dimensions than the encoder has.
    """
    (texts, width), count = vectors.shape, settings.dims[0]
    if count > width:
        raise ValueError(f"dims starts with {count}; the encoder's vectors have {width} dimensions. Choose at most that.")
    if count > texts:
        raise ValueError(f"{texts} texts are too few to fit {count} dimensions; give at least as many, better 20,000.")
    unit = F.normalize(vectors.float(), dim=-1)
    axes = principal_axes(unit, count)
    coordinates = unit @ axes.T  # [N, E]
    rows = fit_prefixes(unit, coordinates, settings, torch.Generator().manual_seed(seed))
    return torch.cat([rows, remaining_axes(rows, coordinates.double().square().mean(dim=0))]) @ axes


def fit_prefixes(unit: Tensor, coordinates: Tensor, settings: FitSettings, generator: torch.Generator) -> Tensor:
    """Returns the directions that the prefixes hold, float32 [P, E], orthonormal, where P is the longest prefix.

    Args:
        unit: float32 [N, H], the full vectors, unit length.
        coordinates: float32 [N, E], the same vectors along the principal axes.
        settings: How to fit.
        generator: Draws the batches.
    """
    _, *prefixes = settings.dims
    directions = nn.Parameter(torch.eye(prefixes[0], coordinates.shape[1]))
    log_scales = nn.Parameter(torch.zeros(len(prefixes)))
    groups = [{"params": [directions], "lr": settings.learning_rate}, {"params": [log_scales], "lr": SCALE_RATE}]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    for _ in tqdm(range(settings.steps), desc="fitting prefixes"):
        batch = torch.randperm(len(unit), generator=generator)[: settings.batch_size]
        projected = coordinates[batch] @ orthonormal(directions).T  # [B, P]
        losses = [
            neighbour_loss(unit[batch], F.normalize(projected[:, :dim], dim=-1), settings.temperature, log_scale.exp())
            for dim, log_scale in zip(prefixes, log_scales, strict=True)
        ]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
        schedule.step()
    return orthonormal(directions).detach()


def orthonormal(rows: Tensor) -> Tensor:
    """Returns rows, float [P, E], made orthonormal one after another: the first k span what the given first k span."""
    basis, triangle = torch.linalg.qr(rows.T)
    return (basis * triangle.diagonal().sign()).T


def remaining_axes(rows: Tensor, variances: Tensor) -> Tensor:
    """Returns what completes orthonormal rows, float [P, E], to a rotation, float32 [E - P, E], by falling variance.

    Args:
        rows: Directions among principal axes.
        variances: float64 [E], along the principal axes.
    """
    inside = rows.double().T @ rows.double()
    outside = torch.eye(len(variances), dtype=torch.float64) - inside
    _, axes = torch.linalg.eigh(outside * variances @ outside - inside)  # below zero inside, at least zero outside
    return axes.flip(1)[:, : len(variances) - len(rows)].T.float()


def neighbour_loss(full: Tensor, projected: Tensor, temperature: float, scale: Tensor) -> Tensor:
    """Returns how far projected vectors are from saying the same neighbours: a cross-entropy in nats per text, a scalar.

    The two distributions are over the other texts of the batch, the softmax of their similarities.

    Args:
        full: float [B, H], unit length.
        projected: float [B, D], unit length.
        temperature: Above 0.
        scale: Above 0, a scalar; projected similarities are multiplied by it, full ones are not.
    """
    itself = torch.eye(len(full), dtype=torch.bool)
    target = (full @ full.T / temperature).masked_fill(itself, -torch.inf).softmax(dim=1)  # [B, B]
    found = (projected @ projected.T * scale / temperature).masked_fill(itself, -torch.inf).log_softmax(dim=1)
    return -(target * found.masked_fill(itself, 0.0)).sum(dim=1).mean()


# The command


def sample(texts: Sequence[str], count: int, seed: int) -> list[str]:
    """Returns at most `count` random texts, in their order."""
    chosen = np.random.default_rng(seed).permutation(len(texts))[:count]
    return [texts[i] for i in sorted(chosen)]


def validation_figures(encode: EncoderVectors, data: Path, seed: int, views: dict[str, View]) -> dict[str, dict[str, float]]:
    """Returns, for each view, overlap@10 on each validation set and Spearman's correlation on STS-B's validation pairs."""
    measures = {
        name: neighbour_measure(lambda texts: encode(sample(texts, VALIDATION_TEXTS, seed)), data / name, "validation")
        for name in VALIDATION_SETS
    }
    measures["stsb_spearman"] = pair_measure(encode, data / VALIDATION_PAIRS, "validation")
    return {view: {name: next(iter(measure(f).values())) for name, measure in measures.items()} for view, f in views.items()}


def check_data(data: Path) -> None:
    """Raises a FileNotFoundError that names every data set that is missing, before hours are spent on the others."""
    needed = {*FIT_SETS, *VALIDATION_SETS, VALIDATION_PAIRS}
    if missing := sorted(name for name in needed if not (data / name).is_dir()):
        raise FileNotFoundError(f"{data} lacks the data sets {', '.join(missing)}; give --data the folder that holds them.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, help="folder or Hub id of the frozen encoder")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--output", type=Path, required=True, help="safetensors file for linear.weight")
    parser.add_argument("--results", type=Path, default=Path("results/projection.json"), help="file for the figures")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    check_data(args.data)
    encode = EncoderVectors(args.encoder)
    texts = [sample(distinct_texts(args.data / name, "train"), TEXTS_PER_SET, args.seed) for name in FIT_SETS]
    vectors = torch.from_numpy(encode(list(dict.fromkeys(chain(*texts)))))
    matrix = fit_projection(vectors, SETTINGS, args.seed)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    save_file({"linear.weight": matrix}, args.output)
    candidates = {"principal components": principal_axes(vectors, SETTINGS.dims[0]), "fitted": matrix}
    content = {
        "command": "python -m training.projection --encoder ENCODER --data DATA --output projection.safetensors",
        "seed": args.seed,
        "encoder_sha256": encode.digest,
        "texts": len(vectors),
        "settings": dataclasses.asdict(SETTINGS),
        "validation": {
            name: validation_figures(encode, args.data, args.seed, prefix_views(x.numpy(), SETTINGS.dims))
            for name, x in candidates.items()
        },
        **environment_info(),
    }
    write_json(args.results, content)
    print(f"{args.output} holds the projection, {args.results} its figures.", file=sys.stderr)


if __name__ == "__main__":
    main()
