"""Time a whole training step under DDP with the Grad Queue hook against plain DDP's, in one run.

    python benchmarks/distributed.py
    python benchmarks/distributed.py --models small --steps 1
    python benchmarks/distributed.py --cases hook shard_queue
    python benchmarks/distributed.py --device cuda --world-size 1 --side 224

The ranks are gloo ranks on this machine's CPU, with one thread each, or NCCL ranks with a GPU each.
Plain DDP and the cases take their steps in turns on the same batch: forward, backward and SGD with
momentum; the queue is full. The ranks start each step together, and the slowest rank's time counts.

The table also has the memory of the queue on rank 0, and the bytes that a rank sends in one step.
The bytes are counted from the payloads of all collectives that c10d gets, DDP's own among them, as
each would be sent on a ring.
"""

import argparse
import copy
import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from models import ResNet50
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from gq_triton.dist import GradQueueState, register
from gq_triton.dist.routes.clustered_sliced import ClusteredSlices
from gq_triton.testing import spawn

MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet50": ResNet50,
    "small": lambda: ResNet50((1, 1, 1, 1), width=8, classes=10),
}
PLAIN = "plain DDP"
CASES: dict[str, dict[str, Any]] = {
    "hook": {"n_clusters": None},
    "shard_queue": {"n_clusters": None, "shard_queue": True},
    "clusters": {"n_clusters": 4, "features": "features"},
    "clusters_shard_queue": {"n_clusters": 4, "features": "features", "shard_queue": True},
}
FILL = 7  # steps that fill the queue: from the sixth on every weight is computed

# The bytes that a rank sends for a payload of n bytes on a ring of W, in units of (W - 1) / W * n.
# The last rank of a broadcast's chain sends nothing; its figure is the mean over the ranks.
TRIPS = {"allreduce_": 2, "alltoall_base_": 1, "_allgather_base_": 1, "broadcast_": 1}


class Wire(TorchDispatchMode):
    """A dispatch mode that adds up the bytes that a rank sends in the collectives it starts."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.__name__.split(".")[0]
            if name not in TRIPS:
                raise RuntimeError(f"what c10d.{name} sends is not known: add it to TRIPS")
            payload = args[0] if isinstance(args[0], list) else [args[0]]
            world = dist.get_world_size()
            self.sent += TRIPS[name] * (world - 1) / world * sum(part.nbytes for part in payload)
        return func(*args, **(kwargs or {}))


def make_step(
    model: nn.Module,
    options: dict[str, Any] | None,
    batch: tuple[Tensor, Tensor],
    group: dist.ProcessGroup | None,
) -> tuple[Callable[[], None], GradQueueState | None]:
    """Return a function that takes one training step, and the state of its hook.

    With ``options=None`` the step is that of plain DDP and the state is None.
    """
    ddp = DistributedDataParallel(model, process_group=group)
    state = None if options is None else register(ddp, **options)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(ddp(batch[0]), batch[1]).backward()
        optimizer.step()
        if batch[0].is_cuda:
            torch.cuda.synchronize()

    return step, state


def sent(step: Callable[[], None]) -> float:
    with Wire() as wire:
        step()
    return wire.sent


def queue_bytes(state: GradQueueState | None) -> int:
    """Return the bytes of the rings on this rank, and of the statistics of rings on other ranks."""
    held = [] if state is None else [*state.queues._queue.values()]
    if state is not None and isinstance(state.queues, ClusteredSlices):
        held += state.queues._rooms.held.values()
    return sum(tensor.untyped_storage().nbytes() for tensor in held)


def in_turns(steps: list[Callable[[], None]], turns: int) -> Tensor:
    """Return the slowest rank's seconds ``(turns, steps)``; every rank must call this."""
    taken = torch.zeros(turns, len(steps), dtype=torch.float64)
    for turn in range(turns):
        for case, step in enumerate(steps):
            dist.barrier()
            start = time.perf_counter()
            step()
            taken[turn, case] = time.perf_counter() - start
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return taken


def row(case: str, taken: list[float], plain: list[float], queue: int, wire: float) -> list[str]:
    ratios = [a / b for a, b in zip(taken, plain, strict=True)]
    cells = [case, f"{1000 * statistics.median(taken):.1f}", f"{statistics.median(ratios):.2f}"]
    cells += [f"{min(ratios):.2f} to {max(ratios):.2f}"]
    return [*cells, f"{queue / 2**20:.3f}", f"{wire / 2**20:.3f}"]


def compare(rank: int, name: str, args: argparse.Namespace) -> None:
    """Run the comparison on one rank; rank 0 prints the table."""
    device, group = torch.device(args.device), None
    if args.device == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        group = dist.new_group(backend="nccl")
        assert isinstance(group, dist.ProcessGroup)
    torch.manual_seed(0)
    model = MODELS[name]().to(device)
    torch.manual_seed(1 + rank)
    images = torch.randn(args.batch, 3, args.side, args.side, device=device)
    batch = images, torch.randint(10, (args.batch,), device=device)
    every: dict[str, dict[str, Any] | None] = {PLAIN: None}
    every |= {case: {"backend": args.backend, **CASES[case]} for case in args.cases}
    made = [make_step(copy.deepcopy(model), options, batch, group) for options in every.values()]
    steps = [step for step, _ in made]
    for step in steps:
        for _ in range(FILL):
            step()
    wires = [sent(step) for step in steps]
    plain, *_ = times = in_turns(steps, args.steps).T.tolist()
    if rank != 0:
        return
    elements = sum(param.numel() for param in model.parameters())
    title = f"{name} ({elements / 1e6:.1f} M parameters), {args.batch} images of {args.side} x "
    title += f"{args.side} per rank, {_where(args)}, torch {torch.__version__}, "
    title += f"backend {args.backend}, turns: {args.steps}, {datetime.date.today()}"
    columns = ["case", "median ms", "ratio to plain DDP, median", "ratio, range"]
    columns += ["queue per rank, MiB", "sent per rank and step, as on a ring, MiB"]
    table = Table(*columns, title=title)
    for case, (_, state), taken, wire in zip(every, made, times, wires, strict=True):
        options = [f"{key}={value}" for key, value in CASES.get(case, {}).items()]
        table.add_row(*row(", ".join(options) or case, taken, plain, queue_bytes(state), wire))
    Console().print(table)


def _where(args: argparse.Namespace) -> str:
    if args.device == "cuda":
        return f"{args.world_size} NCCL ranks, {torch.cuda.get_device_name()}"
    cpu = f"{platform.machine()} CPU with {os.cpu_count()} cores"
    return f"{args.world_size} gloo ranks with {torch.get_num_threads()} thread each, {cpu}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["resnet50"])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, default=15, help="timed steps of each case")
    parser.add_argument("--batch", type=int, default=32, help="images per rank")
    parser.add_argument("--side", type=int, default=64, help="side of an image, in pixels")
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--backend", choices=["auto", "triton", "numba", "torch"], default="auto")
    args = parser.parse_args()
    for name in ("steps", "batch", "side", "world_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.device == "cuda" and torch.cuda.device_count() < args.world_size:
        parser.error(
            f"--device cuda needs {args.world_size} GPUs, found {torch.cuda.device_count()}"
        )
    for name in args.models:
        spawn(args.world_size, compare, name, args, timeout=3600.0)


if __name__ == "__main__":
    main()
