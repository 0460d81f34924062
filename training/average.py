"""Averages two runs: `python -m training.average EARLIER LATER --share 0.6 --output FOLDER`.

Branch and heads of the later run count by `--share`, those of the run that it continued from (`model.start`) by the rest, as
in Wortsman et al. 2022 (Robust fine-tuning of zero-shot models). Out-of-domain texts gain most. The runs must share
one encoder, tasks, labels and shapes; fit temperatures and thresholds again afterwards, with `evaluation.calibrate`.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

from modeling_multitask import MultiTaskModel


def average(earlier: MultiTaskModel, later: MultiTaskModel, share: float, apart: tuple[str, ...] = ()) -> None:
    """Moves branch and heads of `later` to `share` · later + (1 - share) · earlier, `share` in [0, 1].

    Raises:
        ValueError: The models differ in encoder, labels, shapes or projection (but for weights whose names start with one of
            `apart`), or `share` is out of range.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"--share is {share}; it must lie in [0, 1], the later run's part.")
    labels = [{name: spec.labels for name, spec in x.config.task_specs.items()} for x in (earlier, later)]
    first, second = ({k: x for k, x in m.state_dict().items() if not k.startswith(apart)} for m in (earlier, later))
    if labels[0] != labels[1] or {k: x.shape for k, x in first.items()} != {k: x.shape for k, x in second.items()}:
        raise ValueError(f"The runs differ in tasks and labels or in shapes: {labels[0]} and {labels[1]}. Use one recipe.")
    trained = ("task_branch.", "heads.")
    if moved := [name for name, x in first.items() if not name.startswith(trained) and not torch.equal(x, second[name])]:
        raise ValueError(f"The runs differ in what no task trains, for instance {moved[0]}. Use runs of one encoder.")
    for name, weight in second.items():
        if name.startswith(trained):
            weight.lerp_(first[name], 1 - share)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("earlier", type=Path, help="model folder of the run that was continued")
    parser.add_argument("later", type=Path, help="model folder of the run that continued it")
    parser.add_argument("--share", type=float, required=True, help="of the later run, in [0, 1]")
    parser.add_argument("--output", type=Path, required=True, help="where to write the averaged model")
    args = parser.parse_args()
    earlier, later = (MultiTaskModel.from_pretrained(path) for path in (args.earlier, args.later))
    try:
        average(earlier, later, args.share)
    except ValueError as error:
        sys.exit(str(error))
    later.save_pretrained(args.output)
    AutoTokenizer.from_pretrained(args.later).save_pretrained(args.output)
    print(f"{args.output} holds the average; next: python -m evaluation.calibrate {args.output}")


if __name__ == "__main__":
    main()
