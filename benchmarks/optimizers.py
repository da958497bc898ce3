"""Time GQSGD and GQAdamW against torch's fused SGD and AdamW, in one run.

    python benchmarks/optimizers.py
    python benchmarks/optimizers.py --models resnet50 --threads 2 --backend torch

Each line compares our step with torch's fused step over the same shapes. The two are timed in
turns; times are medians of ``--repeats``. The queue is full and every weight is computed.

On a GPU there are more columns: the time of a step among many that are launched without waiting, as
in training; its throughput in GB/s, from the bytes that the update must move; the share of the
throughput of a copy in the same run; and the time of the host, after which a step returns while the
device goes on.
"""

import argparse
import datetime
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from shapes import MODELS
from torch import nn

from gq_triton import GQSGD, GQAdamW

PAIRS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "AdamW": (GQAdamW, lambda params: torch.optim.AdamW(params, fused=True)),
    "SGD momentum": (
        lambda params, **options: GQSGD(params, lr=0.1, momentum=0.9, **options),
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, fused=True),
    ),
}
# Bytes per float32 element beside the queue: what torch reads and writes.
OWN_BYTES = {"AdamW": 28, "SGD momentum": 20}


def parameters(shapes: list[tuple[int, ...]], device: torch.device) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def seconds(step: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def host_seconds(step: Callable[[], Any], repeats: int) -> float:
    """Return the median seconds until ``step`` returns, from an idle device on."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def device_seconds(step: Callable[[], Any], steps: int) -> float:
    """Return the seconds of one of many steps that are launched without waiting."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def in_turns(
    steps: list[Callable[[], Any]], repeats: int, device: torch.device
) -> list[list[float]]:
    """Return the seconds of each step, timed in turns so that drift affects all steps alike."""
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(repeats):
        for step, taken in zip(steps, times, strict=True):
            taken.append(seconds(step, device))
    return times


def new_gradients(params: list[nn.Parameter]) -> None:
    for param in params:
        assert param.grad is not None
        param.grad.copy_(torch.randn_like(param))


def copy_rate(device: torch.device, repeats: int) -> float:
    """Return the bytes per second that a large copy reads and writes."""
    source = torch.empty(1 << 28, device=device)
    target = torch.empty_like(source)
    times = in_turns([lambda: target.copy_(source)], repeats + 2, device)[0][2:]
    return 2 * source.numel() * 4 / statistics.median(times)


def compare(name: str, model: str, args: argparse.Namespace, device: torch.device) -> list[str]:
    ours, theirs = PAIRS[name]
    params = parameters(MODELS[model](), device)
    rivals = parameters(MODELS[model](), device)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[args.queue_dtype]
    options = {"queue_length": args.queue_length, "queue_dtype": dtype, "backend": args.backend}
    optimizer, rival = ours(params, **options), theirs(rivals)
    # Every step gets new gradients, so that the queue is not constant. From the next step on it is
    # full and every weight is computed.
    for _ in range(args.queue_length + 1):
        new_gradients(params)
        optimizer.step()
        rival.step()
    mine, torchs = in_turns([optimizer.step, rival.step], args.repeats, device)
    mine_ms, torch_ms = (1000 * statistics.median(times) for times in (mine, torchs))
    ratios = [a / b for a, b in zip(mine, torchs, strict=True)]
    elements = sum(param.numel() for param in params)
    row = [model, name, f"{elements / 1e6:.1f} M", str(torch.get_num_threads())]
    row += [f"{mine_ms:.1f}", f"{torch_ms:.1f}", f"{mine_ms / torch_ms:.2f}"]
    row += [f"{min(ratios):.2f} to {max(ratios):.2f}"]
    if device.type == "cuda":
        size = dtype.itemsize
        moved = elements * (OWN_BYTES[name] + (args.queue_length + 1) * size)
        both = optimizer.step, rival.step
        flowing = [device_seconds(step, 10 * args.repeats) for step in both]
        rate = moved / flowing[0]
        row += [f"{1000 * flowing[0]:.2f}", f"{flowing[0] / flowing[1]:.2f}"]
        row += [f"{rate / 1e9:.0f}", f"{rate / args.copy_rate:.0%}"]
        row += ["{:.2f} / {:.2f}".format(*(1000 * host_seconds(s, args.repeats) for s in both))]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--optimizers", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="on the CPU")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--queue-length", type=int, default=5)
    parser.add_argument("--queue-dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--backend", choices=["auto", "triton", "numba", "torch"], default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    args.copy_rate = copy_rate(device, args.repeats) if on_gpu else 0.0

    where = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU"
    title = f"{where}, torch {torch.__version__}, backend {args.backend}, {datetime.date.today()}"
    columns = ["model", "optimizer", "parameters", "threads", "GQ ms", "torch fused ms"]
    columns += ["ratio", "ratio, range"] + (
        ["back to back ms", "ratio", "GB/s", "of a copy", "host ms, GQ / torch"] if on_gpu else []
    )
    table = Table(*columns, title=title)
    console = Console()
    for model in args.models:
        for threads in [1] if on_gpu else args.threads:
            torch.set_num_threads(threads)
            for name in args.optimizers:
                with console.status(f"{model}, {name}, threads {threads}"):
                    table.add_row(*compare(name, model, args, device))
    console.print(table)


if __name__ == "__main__":
    main()
