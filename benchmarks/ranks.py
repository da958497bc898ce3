"""Time a whole training step under DDP or FSDP2 with Grad Queue against the plain one, in one run.

    python benchmarks/ranks.py
    python benchmarks/ranks.py --wrap fsdp --models resnet50 gpt
    python benchmarks/ranks.py --models small --steps 1
    python benchmarks/ranks.py --cases hook shard_queue
    python benchmarks/ranks.py --device cuda --world-size 1 --side 224

The ranks are gloo ranks on this machine's CPU, with one thread each, or NCCL ranks with a GPU each.
The plain step and the cases take their steps in turns on the same batch: forward, backward and SGD
with momentum; the queue is full. FSDP2 divides every block of the model. The ranks start each step
together, and the slowest rank's time counts.

The table also has the memory of the queue on rank 0, and the bytes that a rank sends in one step.
The bytes are counted from the payloads of all collectives that c10d gets, those of DDP and FSDP2
among them, as each would be sent on a ring.
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
from models import GPT, ResNet50
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from gq_triton import GradQueue
from gq_triton.dist import GradQueueState, register
from gq_triton.dist.routes.clustered_sliced import ClusteredSlices
from gq_triton.ring import local
from gq_triton.testing import spawn

MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet50": ResNet50,
    "small": lambda: ResNet50((1, 1, 1, 1), width=8, classes=10),
    "gpt": GPT,
}
PLAIN = {"ddp": "plain DDP", "fsdp": "plain FSDP2"}
CLUSTERS = {"n_clusters": 4, "features": "features"}
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "ddp": {
        "hook": {"n_clusters": None},
        "shard_queue": {"n_clusters": None, "shard_queue": True},
        "clusters": CLUSTERS,
        "clusters_shard_queue": {**CLUSTERS, "shard_queue": True},
    },
    "fsdp": {"plug_in": {"n_clusters": None}, "clusters": CLUSTERS},
}
FILL = 7  # steps that fill the queue: from the sixth on every weight is computed

# The bytes that a rank sends for a payload of n bytes on a ring of W, in units of (W - 1) / W * n.
# The last rank of a broadcast's chain sends nothing; its figure is the mean over the ranks.
TRIPS = {
    "allreduce_": 2,
    "alltoall_base_": 1,
    "_allgather_base_": 1,
    "_reduce_scatter_base_": 1,
    "broadcast_": 1,
}


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
            whole = args[1] if name == "_reduce_scatter_base_" else args[0]
            payload = whole if isinstance(whole, list) else [whole]
            world = dist.get_world_size()
            self.sent += TRIPS[name] * (world - 1) / world * sum(part.nbytes for part in payload)
        return func(*args, **(kwargs or {}))


def make_step(
    model: nn.Module,
    options: dict[str, Any] | None,
    batch: tuple[Tensor, Tensor],
    group: dist.ProcessGroup | None,
    wrap: str = "ddp",
) -> tuple[Callable[[], None], GradQueueState | GradQueue | None]:
    """Return a function that takes one training step, and what holds the queue.

    With ``options=None`` the step is the plain one and there is no queue.
    """
    queue: GradQueueState | GradQueue | None = None
    wrapped: nn.Module = model
    if wrap == "ddp":
        wrapped = DistributedDataParallel(model, process_group=group)
        queue = None if options is None else register(wrapped, **options)
    else:
        mesh = DeviceMesh.from_group(group or dist.group.WORLD, batch[0].device.type)  # pyright: ignore[reportArgumentType]
        blocks: Any = model.blocks
        for module in (*blocks, model):
            fully_shard(module, mesh=mesh)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=1e-3, momentum=0.9)
    if wrap == "fsdp" and options is not None:
        queue = GradQueue(model, **options)
        queue.attach(optimizer)

    def step() -> None:
        optimizer.zero_grad()
        output = wrapped(batch[0])
        nn.functional.cross_entropy(output.flatten(0, -2), batch[1].flatten()).backward()
        optimizer.step()
        if batch[0].is_cuda:
            torch.cuda.synchronize()

    return step, queue


def sent(step: Callable[[], None]) -> float:
    with Wire() as wire:
        step()
    return wire.sent


def queue_bytes(state: GradQueueState | GradQueue | None) -> int:
    """Return the bytes of the rings on this rank, and of the statistics of rings on other ranks."""
    if state is None:
        return 0
    queues = state._queues if isinstance(state, GradQueue) else state.queues
    held = [local(ring) for ring in queues._queue.values()]
    if isinstance(queues, ClusteredSlices):
        held += queues._buffers.held.values()
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
    if name == "gpt":
        tokens = torch.randint(256, (args.batch, 128), device=device)
        batch = tokens, torch.randint(256, (args.batch, 128), device=device)
        what = f"{args.batch} sequences of 128 bytes"
    else:
        images = torch.randn(args.batch, 3, args.side, args.side, device=device)
        batch = images, torch.randint(10, (args.batch,), device=device)
        what = f"{args.batch} images of {args.side} x {args.side}"
    known = CASES[args.wrap]
    every: dict[str, dict[str, Any] | None] = {PLAIN[args.wrap]: None}
    every |= {case: {"backend": args.backend, **known[case]} for case in args.cases or known}
    made = [
        make_step(copy.deepcopy(model), options, batch, group, args.wrap)
        for options in every.values()
    ]
    steps = [step for step, _ in made]
    for step in steps:
        for _ in range(FILL):
            step()
    wires = [sent(step) for step in steps]
    plain, *_ = times = in_turns(steps, args.steps).T.tolist()
    if rank != 0:
        return
    elements = sum(param.numel() for param in model.parameters())
    title = f"{name} ({elements / 1e6:.1f} M parameters), {what} "
    title += f"per rank, {_where(args)}, torch {torch.__version__}, "
    title += f"backend {args.backend}, turns: {args.steps}, {datetime.date.today()}"
    columns = ["case", "median ms", f"ratio to {PLAIN[args.wrap]}, median", "ratio, range"]
    columns += ["queue per rank, MiB", "sent per rank and step, as on a ring, MiB"]
    table = Table(*columns, title=title)
    for case, (_, state), taken, wire in zip(every, made, times, wires, strict=True):
        options = [f"{key}={value}" for key, value in known.get(case, {}).items()]
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
    parser.add_argument("--wrap", choices=CASES, default="ddp")
    names = sorted({case for cases in CASES.values() for case in cases})
    parser.add_argument("--cases", nargs="+", choices=names, help="default: all of the wrap")
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
    for case in args.cases or ():
        if case not in CASES[args.wrap]:
            parser.error(f"--wrap {args.wrap} has the cases {', '.join(CASES[args.wrap])}")
    if args.device == "cuda" and torch.cuda.device_count() < args.world_size:
        parser.error(
            f"--device cuda needs {args.world_size} GPUs, found {torch.cuda.device_count()}"
        )
    for name in args.models:
        spawn(args.world_size, compare, name, args, timeout=3600.0)


if __name__ == "__main__":
    main()
