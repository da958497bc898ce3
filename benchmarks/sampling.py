"""What the samplers cost on the CPU, each over what it is compared with, in one run.

python benchmarks/sampling.py
python benchmarks/sampling.py --threads 2

The two of a ratio alternate. Times are CPU times of this process, which other processes disturb
less than the time of day; a ratio is the median of those of the turns, with their 20 % and 80 %
quantiles.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, TensorDataset

from gq_triton.bench import harness
from gq_triton.bench.hardware import where
from gq_triton.sampling import GradientClustering, ImportanceLoader, StratifiedBatchSampler

MILLION = 1_000_000


def mlp() -> nn.Module:
    """Return an MLP 1024 wide."""
    layers = [nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(1024, 10))


def seconds(call: Callable[[], Any]) -> float:
    """Return the CPU seconds of a call."""
    return harness.seconds(call, clock=time.process_time)


def turns(ours: Callable[[], float], rival: Callable[[], float], count: int) -> list[float]:
    """Return the ratios of alternating turns, without the first."""
    mine, others = harness.rounds([ours, rival], count + 1)
    return [a / b for a, b in zip(mine, others, strict=True)][1:]


def a_step(count: int) -> list[float]:
    """Assign 512 samples to 10 centres, over the backward pass of the same samples."""
    model, x, y = mlp(), torch.randn(512, 1024), torch.randint(10, (512,))
    clustering = GradientClustering(model, n_clusters=10)
    clustering.partial_fit((x, y))
    passes = clustering._passes
    found = passes.factors((x, y))

    def backward() -> float:
        loss = cross_entropy(model(x), y)
        return seconds(loss.backward)

    return turns(lambda: seconds(lambda: passes.distances(found)), backward, count)


def scoring(count: int) -> list[float]:
    """Score 768 samples, over a forward pass without a graph."""
    model, x, y = mlp(), torch.randn(768, 1024), torch.randint(10, (768,))
    data = TensorDataset(x, y)
    # It scores in every step, since tau is above the threshold from the second step on.
    loader = ImportanceLoader(data, model, cross_entropy, 256, tau_th=0.0)
    next(iter(loader))

    def forward() -> None:
        with torch.no_grad():
            model(x)

    return turns(
        lambda: seconds(lambda: loader._gate.run(x, y, 768)), lambda: seconds(forward), count
    )


def drawing(count: int) -> list[float]:
    """Return the milliseconds in which a batch of 128 is drawn from a million samples."""
    labels = torch.randint(128, (MILLION,))
    batches = iter(StratifiedBatchSampler(labels, 128))
    next(batches)  # the first shuffles all members

    def draw() -> None:
        for _ in range(200):
            next(batches)

    return [seconds(draw) / 200 * 1e3 for _ in range(count)]


class _Rows(Dataset[tuple[Tensor, Tensor]]):
    """A million samples that are read a batch at a time."""

    def __init__(self) -> None:
        self.x = torch.randn(MILLION, 16)
        self.y = (self.x[:, 0] > 0).long()

    def __len__(self) -> int:
        return MILLION

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.tensor(indices)
        return self.x[chosen], self.y[chosen]


def fitting() -> tuple[float, float]:
    """Return a fit's CPU seconds per pass over a million samples, and the MiB that it added."""
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2))
    loader = DataLoader(_Rows(), batch_size=4096, collate_fn=lambda batch: batch)
    clustering = GradientClustering(model, n_clusters=10, max_iter=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    took = seconds(lambda: clustering.fit(loader))
    added = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return took / (5 if clustering.fell_back_ else 3), added


def row(what: str, values: Sequence[float], unit: str, bound: float) -> str:
    """Return a row of the table."""
    middle, low, high = harness.spread(values)
    return f"{what:52} {middle:8.3f} {unit:5} {low:.3f} to {high:.3f}  at most {bound:g}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=15)
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    print(", ".join(where(torch.device("cpu")).values()))
    print(row("A step, K = 10, / backward pass (MLP 1024 wide)", a_step(given.turns), "", 1.0))
    print(row("scoring / forward pass (MLP 1024 wide)", scoring(given.turns), "", 1.1))
    print(row("drawing 128 of a million samples", drawing(given.turns), "ms", 0.1))
    per_pass, added = fitting()
    print(f"fit of a million samples (16-32-2 net, K = 10): {per_pass:.1f} s per pass, "
          f"{added:.0f} MiB more at the peak")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
