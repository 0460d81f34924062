"""Pictures of what was measured, as PNG files: confusion matrices, reliability diagrams, learning curves.

Colours are those of one blue scale and of the palette of Okabe and Ito (2008), which colour-blind people can tell apart.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.metrics import confusion_matrix as count_confusions

from evaluation.metrics import BINS, calibration_error, confidence_bins

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")


def confusion_matrix(truth: np.ndarray, predicted: np.ndarray, labels: list[str], title: str, path: Path) -> None:
    """Draws which share of each true label's items is predicted as which label.

    Args:
        truth: int [N], label indices.
        predicted: int [N].
        labels: Their names.
        title: The picture's title.
        path: The PNG file to write.
    """
    shares = count_confusions(truth, predicted, labels=range(len(labels)), normalize="true")
    counts = np.bincount(truth, minlength=len(labels))
    size = max(4.0, 0.6 * len(labels) + 2.5)
    figure = _figure(figsize=(size, size), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), share in np.ndenumerate(shares):
        colour = "white" if share > 0.5 else "black"
        axes.text(column, row, f"{share:.2f}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(labels)), [f"{label} ({count:,})" for label, count in zip(labels, counts, strict=True)])
    axes.set(title=title, xlabel="predicted", ylabel="true (count)")
    _save(figure, path)


def reliability_diagram(confidence: np.ndarray, correct: np.ndarray, title: str, path: Path) -> None:
    """Draws how often predictions of each confidence are right, and how many there are.

    Args:
        confidence: float [N], the probability of each predicted label.
        correct: bool [N], whether that label is right.
        title: The picture's title; the calibration error follows it.
        path: The PNG file to write.
    """
    bins = confidence_bins(confidence)
    counts = np.bincount(bins, minlength=BINS)
    right = np.bincount(bins, weights=correct, minlength=BINS)
    accuracy = np.divide(right, counts, out=np.zeros(BINS), where=counts > 0)
    centres, width = (np.arange(BINS) + 0.5) / BINS, 1 / BINS
    figure = _figure(figsize=(5, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.bar(centres, accuracy, width, color=COLOURS[0], edgecolor="white")
    above.plot((0, 1), (0, 1), color="black", linestyle="--", label="confidence = accuracy")
    above.legend(loc="upper left")
    above.set(
        title=f"{title}: calibration error {calibration_error(confidence, correct):.3f}", ylabel="accuracy", ylim=(0, 1)
    )
    below.bar(centres, counts, width, color=COLOURS[7], edgecolor="white")
    for centre, count in zip(centres, counts, strict=True):
        if count:
            below.text(centre, count, f"{count:,}", ha="center", va="bottom", fontsize=6)
    below.margins(y=0.15)
    below.set(xlabel="confidence", ylabel="count", xlim=(0, 1))
    _save(figure, path)


def learning_curves(history: list[dict[str, Any]], path: Path) -> None:
    """Draws each task's loss, and what the validation splits gave, over the steps of a run.

    Args:
        history: The Trainer's log: dicts with "step" and, where reported, "loss", "loss_<task>", "eval_average" and so on.
        path: The PNG file to write.
    """
    figure = _figure(figsize=(10, 4), layout="constrained")
    losses, averages = figure.subplots(1, 2)
    _draw_curves(losses, history, [key for entry in history for key in entry if key.startswith("loss_")], "loss_")
    losses.set(title="training loss per task", xlabel="step", ylabel="loss", yscale="log")
    _draw_curves(averages, history, [key for entry in history for key in entry if key == "eval_average"], "eval_")
    averages.set(title="validation splits", xlabel="step", ylabel="mean of the tasks' main metrics")
    _save(figure, path)


def _figure(**options: Any) -> "Figure":
    from matplotlib.figure import Figure  # optional: only who wants pictures needs it

    return Figure(**options)


def _draw_curves(axes: "Axes", history: list[dict[str, Any]], keys: list[str], prefix: str) -> None:
    for index, key in enumerate(dict.fromkeys(keys)):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        name, colour = key.removeprefix(prefix), COLOURS[index % len(COLOURS)]
        axes.plot(*zip(*points, strict=True), marker=".", label=name, color=colour)
    if keys:
        axes.legend()


def _save(figure: "Figure", path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
