"""Time a whole training step with cluster gradients against the plain step, in one run.

    python benchmarks/clusters.py
    python benchmarks/clusters.py --models mlp --clusters 16
    python benchmarks/clusters.py --models GRU LSTM GRUCell LSTMCell

Three steps have the same batch and model: the plain step, the step with K clusters in one backward
pass, and the step with K backward passes (``mode="microbatch"``). The first two are timed in turns,
the third after them. A step is forward, clustering, backward and optimizer; the queue is full.

A second table has the peak memory of a step above the plain step's, without the queue. Beside it
stands what the method may take: a mean and 1/sigma for every parameter, and K times the largest
layer. Each peak is measured in a fresh process.
"""

import argparse
import copy
import datetime
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from models import GPT, MLP, Recurrent, ResNet18
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from gq_triton import GradQueue


def classes(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def next_byte(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    logits = model(batch[0]).transpose(1, 2)
    return nn.functional.cross_entropy(logits, batch[1], reduction="none").mean(dim=1)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor], Callable[[], tuple]]] = {
    "mlp": (MLP, classes, lambda: (torch.randn(2048, 1024), torch.randint(10, (2048,)))),
    "resnet18": (ResNet18, classes, lambda: (torch.randn(64, 3, 32, 32), torch.randint(10, (64,)))),
    "gpt": (GPT, next_byte, lambda: (torch.randint(256, (64, 128)), torch.randint(256, (64, 128)))),
}
USUAL = list(CASES)
for kind in (nn.GRU, nn.LSTM, nn.GRUCell, nn.LSTMCell):
    batch = lambda: (torch.randn(512, 16, 32), torch.randint(10, (512,)))  # noqa: E731
    CASES[kind.__name__] = partial(Recurrent, kind), classes, batch


def make_step(
    case: str, model: nn.Module, mode: str | None, args: argparse.Namespace
) -> Callable[[], None]:
    """Return a function that takes one training step; ``mode=None`` is the plain step."""
    _, losses_of, batch_of = CASES[case]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    queue = None
    if mode is not None:
        queue = GradQueue(
            model, n_clusters=args.clusters, features="features", mode=mode, backend=args.backend
        )
        queue.attach(optimizer)
    batch = tuple(tensor.to(args.device) for tensor in batch_of())

    def step() -> None:
        optimizer.zero_grad()
        losses = losses_of(model, batch)
        if mode == "microbatch":
            assert queue is not None
            queue.backward(losses)
        else:
            losses.mean().backward()
        optimizer.step()
        if args.device == "cuda":
            torch.cuda.synchronize()

    return step


def seconds(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def compare(case: str, args: argparse.Namespace) -> list[str]:
    torch.manual_seed(0)
    model = CASES[case][0]().to(args.device)
    modes = [None, "one_backward", "microbatch"]
    steps = [make_step(case, copy.deepcopy(model), mode, args) for mode in modes]
    for step in steps[:2]:
        for _ in range(7):  # fills the queue: from the sixth step on every weight is computed
            step()
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(args.repeats):
        for step, taken in zip(steps[:2], times, strict=False):
            taken.append(seconds(step))
    # K backward passes come last: their K copies of the gradients would push the others' out of
    # the cache.
    steps[2]()
    times[2] = [seconds(steps[2]) for _ in range(3)]
    plain, ours, passes = (1000 * statistics.median(taken) for taken in times)
    ratios = [b / a for a, b in zip(times[0], times[1], strict=True)]
    row = [case, str(args.clusters), f"{plain:.1f}", f"{ours:.1f}", f"{ours / plain:.2f}"]
    return [*row, f"{min(ratios):.2f} to {max(ratios):.2f}", f"{passes:.1f}",
            f"{passes / ours:.1f}"]  # fmt: skip


def peak(case: str, mode: str | None, args: argparse.Namespace) -> int:
    """Return the peak memory of one step in this process, in bytes."""
    torch.manual_seed(0)
    # The plain step too loads the engine's libraries, so that their memory makes no difference.
    tiny = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).to(args.device)
    queue = GradQueue(tiny, n_clusters=2, features="0", backend=args.backend)
    optimizer = torch.optim.SGD(tiny.parameters())
    handle = queue.attach(optimizer)
    for _ in range(7):
        tiny(torch.randn(8, 4, device=args.device)).sum().backward()
        optimizer.step()
    handle.remove()
    step = make_step(case, CASES[case][0]().to(args.device), mode, args)
    for _ in range(7):
        step()
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")  # from here on VmHWM is the peak
    step()
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def measure(case: str, args: argparse.Namespace) -> list[str]:
    """Return the row of the peaks of the plain and the clustered step, from fresh processes."""
    peaks = []
    for mode in ("plain", "one_backward"):
        command = [sys.executable, __file__, "--models", case, "--clusters", str(args.clusters)]
        command += ["--device", args.device, "--backend", args.backend, "--peak", mode]
        # A freed tensor then returns its pages at once, so that resident memory is held memory.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
        peaks.append(int(output.stdout))
    model = CASES[case][0]()
    total = sum(4 * p.numel() for p in model.parameters())
    largest = max(4 * sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules())
    above = peaks[1] - peaks[0] - 5 * total
    allowed = 2 * total + args.clusters * largest
    sizes = (peaks[0], peaks[1], 5 * total, above, allowed)
    return [case, str(args.clusters), *[f"{size / 2**20:.0f}" for size in sizes]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=CASES, default=USUAL)
    parser.add_argument("--clusters", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2, help="on the CPU")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--backend", choices=["auto", "triton", "numba", "torch"], default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--peak", choices=["plain", "one_backward"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        print(peak(args.models[0], None if args.peak == "plain" else args.peak, args))
        return
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU"
    where += f", {args.threads} threads, torch {torch.__version__}, {datetime.date.today()}"
    columns = ["model", "K", "plain ms", "clusters ms", "ratio", "ratio, range", "K passes ms"]
    table = Table(*columns, "faster than K passes", title=where)
    console = Console()
    for case in args.models:
        with console.status(case):
            table.add_row(*compare(case, args))
    console.print(table)
    columns = ["model", "K", "plain MiB", "clusters MiB", "queue MiB", "peak above plain MiB"]
    table = Table(*columns, "allowed MiB", title=f"Peak memory of one step, {where}")
    for case in args.models:
        with console.status(f"{case}: memory"):
            table.add_row(*measure(case, args))
    console.print(table)


if __name__ == "__main__":
    main()
