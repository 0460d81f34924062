"""The learning curves of a run, as a PNG file.

Colours are those of the palette of Okabe and Ito (2008), which colour-blind people can tell apart.
"""

from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")


def learning_curves(history: list[dict[str, Any]], path: Path) -> None:
    """Draws each task's loss, and what the validation splits gave, over the steps of a run.

    Args:
        history: The Trainer's log: dicts with "step" and, where reported, "loss", "loss_<task>", "eval_average" and so on.
        path: The PNG file to write.
    """
    from matplotlib.figure import Figure  # optional: only who wants pictures needs it

    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, averages = figure.subplots(1, 2)
    _draw_curves(losses, history, "loss_")
    losses.set(title="training loss per task", xlabel="step", ylabel="loss", yscale="log")
    _draw_curves(averages, history, "eval_average")
    averages.set(title="validation splits", xlabel="step", ylabel="mean of the tasks' main metrics")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _draw_curves(axes: "Axes", history: list[dict[str, Any]], prefix: str) -> None:
    keys = dict.fromkeys(key for entry in history for key in entry if key.startswith(prefix))
    for key, colour in zip(keys, cycle(COLOURS), strict=False):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        axes.plot(*zip(*points, strict=True), marker=".", label=key.partition("_")[2], color=colour)
    if keys:
        axes.legend()
