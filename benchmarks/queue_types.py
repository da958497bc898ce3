"""Training on the digits with a queue in float32, bfloat16 and bytes, from the same seeds.

python benchmarks/queue_types.py --seeds 3

Prints the mean training loss of each quarter of the runs, how far single losses are from those with
the float32 queue, and the test accuracy. One thread; minutes.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from itertools import islice

import torch

from gq_triton import GQSGD
from gq_triton.tasks import load_digits
from gq_triton.tasks.task import Task, batch_stream

QUEUES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float8": "float8"}


def run(
    task: Task, queue_dtype: torch.dtype | str, *, batch: int, steps: int, lr: float, seed: int
) -> tuple[list[float], float]:
    """Return the training loss of every step, and the test accuracy at the end."""
    torch.manual_seed(seed)
    model = task.model()
    optimizer = GQSGD(model.parameters(), lr, momentum=0.9, queue_dtype=queue_dtype)
    x, y = task.train
    losses = []
    for chosen in islice(batch_stream(len(x), batch, seed), steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x[chosen]), y[chosen])
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    with torch.no_grad():
        right = model(task.test[0]).argmax(dim=1) == task.test[1]
    return losses, float(right.float().mean())


def rows(task: Task, args: argparse.Namespace, batch: int) -> list[str]:
    """Return the lines of the table for one batch size."""
    settings = {"batch": batch, "steps": args.steps, "lr": args.lr}
    runs = {
        name: [run(task, dtype, **settings, seed=seed) for seed in range(args.seeds)]
        for name, dtype in QUEUES.items()
    }
    lines = []
    quarter = args.steps // 4
    for name, ends in runs.items():
        quarters = [
            statistics.mean(loss for losses, _ in ends for loss in losses[at : at + quarter])
            for at in range(0, 4 * quarter, quarter)
        ]
        apart = [
            abs(one - other)
            for (losses, _), (wide, _) in zip(ends, runs["float32"], strict=True)
            for one, other in zip(losses, wide, strict=True)
        ]
        right = statistics.mean(accuracy for _, accuracy in ends)
        cells = [f"{value:.4f}" for value in (*quarters, statistics.mean(apart), right)]
        lines.append(f"| {batch} | {name} | {' | '.join(cells)} |")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 512])
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    task = load_digits()
    head = "| batch | queue | quarter 1 | 2 | 3 | 4 | apart | test accuracy |"
    sys.stdout.write(f"{head}\n|---|---|---|---|---|---|---|---|\n")
    for batch in args.batch_sizes:
        for line in rows(task, args, batch):
            sys.stdout.write(line + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
