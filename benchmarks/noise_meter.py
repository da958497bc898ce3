"""What the noise meter costs on the CPU: a step with ``NoiseScale(every=10)`` by the plain step.

python benchmarks/noise_meter.py

A step is forward pass, backward pass and AdamW. Blocks of ten steps with a meter alternate with
blocks of ten without; the ratio is that of the medians, in CPU time of this process, which other
processes disturb less than the time of day. One thread.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gq_triton.bench.hardware import where
from gq_triton.bench.harness import seconds
from gq_triton.tasks.text import CausalTransformer
from gq_triton.variance import NoiseScale

EVERY = 10


def mlp() -> tuple[nn.Module, Tensor]:
    """Return an MLP 1024 wide and a batch."""
    layers = [nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(1024, 10)), torch.randn(256, 1024)


def transformer() -> tuple[nn.Module, Tensor]:
    """Return the transformer of ``python-lm`` and a batch."""
    model = CausalTransformer(256, 32, width=64, heads=2, layers=2)
    return model, torch.randint(0, 256, (128, 32))


def convolutions() -> tuple[nn.Module, Tensor]:
    """Return three convolutions and a batch."""
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2), nn.ReLU(),
        nn.Conv2d(64, 64, 3, stride=2), nn.Flatten(), nn.LazyLinear(10),
    )  # fmt: skip
    batch = torch.randn(64, 3, 32, 32)
    model(batch)
    return model, batch


CASES: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "mlp": mlp,
    "transformer": transformer,
    "convolutions": convolutions,
}


def measure(case: str, clusters: int, blocks: int) -> tuple[float, float]:
    """Return the CPU seconds of ten steps without and with a meter, medians over blocks."""
    torch.manual_seed(0)
    model, batch = CASES[case]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()

    def block() -> float:
        return EVERY * seconds(step, calls=EVERY, clock=time.process_time)

    plain, metered = [], []
    for number in range(blocks + 1):
        without = block()
        meter = NoiseScale(model, EVERY, clusters=clusters)
        block()  # the meter's own memory, and what its clusters import, once
        found = block()
        meter.remove()
        if number:
            plain.append(without)
            metered.append(found)
    return statistics.median(plain), statistics.median(metered)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--clusters", type=int, default=4, help="groups per batch (default: 4)")
    parser.add_argument("--blocks", type=int, default=7, help="blocks of each kind (default: 7)")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(", ".join(where(torch.device("cpu")).values()))
    for case in CASES:
        plain, metered = measure(case, given.clusters, given.blocks)
        print(
            f"{case:14} plain {plain * 100:7.2f} ms  with the meter {metered * 100:7.2f} ms  ratio "
            f"{metered / plain:.3f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
