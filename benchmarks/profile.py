"""Says where the pipeline's time goes, operator by operator: `python -m benchmarks.profile --data DIR`.

Results go to results/profile.json: of the time that the texts take, the share of each of PyTorch's operators without those
that it calls, largest first, and the rest, which is tokenization, batches and decoding. Watching costs time too, most
of it between small operators.
"""

import time
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from benchmarks.run import load_pipes, make_parser, read_texts, write_result

SHOWN = 12  # operators


def profile(pipe: Any, texts: list[str]) -> dict[str, Any]:
    """Returns the largest shares of a pipeline's time; those of all operators and `rest` add up to 1."""
    pipe(texts[:64])  # warm-up
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as recorded:
        start = time.perf_counter()
        pipe(texts)
        total = time.perf_counter() - start
    events = sorted(recorded.key_averages(), key=lambda event: event.self_cpu_time_total, reverse=True)
    rows = [(event.key, event.count, event.self_cpu_time_total / 1e6 / total) for event in events]  # it is microseconds
    return {
        "seconds": total,
        "operators": [{"operator": name, "calls": calls, "share": share} for name, calls, share in rows[:SHOWN]],
        "other_operators": sum(share for _, _, share in rows[SHOWN:]),
        "rest": 1 - sum(share for _, _, share in rows),
    }


def main() -> None:
    args = make_parser(__doc__, 2000, "results/profile.json").parse_args()
    torch.set_num_threads(args.threads)
    found = profile(load_pipes(args.model)["torch"], read_texts(args.data, args.texts))
    for row in found["operators"]:
        print(f"{row['operator']:<50} {row['calls']:>8,} {row['share']:6.1%}")
    print(f"{'other operators':<59} {found['other_operators']:6.1%}\n{'rest':<59} {found['rest']:6.1%}")
    command = f"python -m benchmarks.profile --data DIR --texts {args.texts} --threads {args.threads}"
    write_result(args.output, {"command": command, "texts": args.texts, **found})


if __name__ == "__main__":
    main()
