"""Training steps on several ranks: how they are made, timed, and counted in bytes."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from gq_triton import GradQueue
from gq_triton.dist import GradQueueState, register
from gq_triton.dist.routes.clustered_sliced import ClusteredSlices
from gq_triton.ring import local
from gq_triton.testing import Ranks

__all__ = [
    "FILL",
    "Wire",
    "end_ranks",
    "held",
    "in_turns",
    "make_step",
    "on_ranks",
    "sent",
    "wrapped",
]

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
        """Count a collective, and run it."""
        if func.namespace == "c10d":
            name = func.__name__.split(".")[0]
            if name not in TRIPS:
                raise RuntimeError(f"what c10d.{name} sends is not known: add it to TRIPS")
            whole = args[1] if name == "_reduce_scatter_base_" else args[0]
            payload = whole if isinstance(whole, list) else [whole]
            world = dist.get_world_size()
            self.sent += TRIPS[name] * (world - 1) / world * sum(part.nbytes for part in payload)
        return func(*args, **(kwargs or {}))


_WHOLE = 1 << 20  # MiB of a bucket that takes every gradient


def narrow(model: DistributedDataParallel) -> None:
    """Register torch's hook that sends bfloat16; float16 on the CPU, where torch refuses the other.

    Both send the same bytes.
    """
    on_gpu = next(model.parameters()).is_cuda
    name = "bf16_compress_hook" if on_gpu else "fp16_compress_hook"
    model.register_comm_hook(model.process_group, getattr(default_hooks, name))


def power_sgd(model: DistributedDataParallel) -> powerSGD_hook.PowerSGDState:
    """Register torch's PowerSGD of rank 1, from the second step on; return its state."""
    state = powerSGD_hook.PowerSGDState(model.process_group, start_powerSGD_iter=2)
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    return state


Options = dict[str, Any] | Callable[[DistributedDataParallel], Any] | None


def wrapped(
    model: nn.Module,
    options: Options,
    group: dist.ProcessGroup | None,
    wrap: str,
    kind: str,
) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    """Return a model under DDP or FSDP2, its optimizer, and what holds memory for it.

    Args:
        model: it has ``blocks`` where it is divided.
        options: those of Grad Queue; None for the plain step; a function registers another hook.
        group: the ranks.
        wrap: ``"ddp"``, or ``"fsdp"`` for FSDP2, which divides every block.
        kind: the type of the device.
    """
    holder: Any = None
    module: nn.Module = model
    if wrap == "ddp":
        # torch's PowerSGD starts a bucket's later collectives when its first one ends. With two
        # buckets gloo's ranks may start them in different orders, which ends the process.
        cap = _WHOLE if options is power_sgd else None
        module = DistributedDataParallel(model, process_group=group, bucket_cap_mb=cap)
        if callable(options):
            holder = options(module)
        elif options is not None:
            holder = register(module, **options)
    else:
        mesh = DeviceMesh.from_group(group or dist.group.WORLD, kind)  # pyright: ignore[reportArgumentType]
        blocks: Any = model.blocks
        for part in (*blocks, model):
            fully_shard(part, mesh=mesh)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9)
    if wrap == "fsdp" and isinstance(options, dict):
        holder = GradQueue(model, **options)
        holder.attach(optimizer)
    return module, optimizer, holder


def make_step(
    model: nn.Module,
    options: Options,
    batch: tuple[Tensor, Tensor],
    group: dist.ProcessGroup | None,
    wrap: str = "ddp",
) -> tuple[Callable[..., None], Any]:
    """Return a function that takes one training step, and what holds memory for it.

    The function takes the number of samples, by default all. ``batch`` has the inputs and the
    classes; the other arguments are those of ``wrapped``.
    """
    module, optimizer, holder = wrapped(model, options, group, wrap, batch[0].device.type)

    def step(count: int | None = None) -> None:
        optimizer.zero_grad()
        output = module(batch[0][:count])
        nn.functional.cross_entropy(output.flatten(0, -2), batch[1][:count].flatten()).backward()
        optimizer.step()
        if batch[0].is_cuda:
            torch.cuda.synchronize()

    return step, holder


_running: dict[int, Ranks] = {}


def on_ranks(world: int, function: Callable[..., None], *args: Any, timeout: float = 300.0) -> None:
    """Run ``function(rank, *args)`` on ranks that stay for the next call; to start them takes long.

    Args:
        world: number of ranks.
        function: of a module.
        args: its further arguments.
        timeout: seconds.
    """
    if world not in _running or not _running[world].alive:
        _running[world] = Ranks(world)
    _running[world].run(function, *args, timeout=timeout)


def end_ranks() -> None:
    """End the ranks of ``on_ranks``."""
    while _running:
        _running.popitem()[1].close()


def sent(step: Callable[[], None]) -> float:
    """Return the bytes that this rank sends in one step."""
    with Wire() as wire:
        step()
    return wire.sent


def held(holder: Any) -> int:
    """Return the bytes that a hook holds on this rank between steps.

    Those of Grad Queue are its rings, and the statistics of rings on other ranks; those of PowerSGD
    are its errors and factors.
    """
    tensors: list[Tensor] = []
    if isinstance(holder, GradQueue | GradQueueState):
        queues: Any = holder._queues if isinstance(holder, GradQueue) else holder.queues
        tensors = [local(ring) for ring in queues._queue.values()]
        if isinstance(queues, ClusteredSlices):
            tensors += queues._buffers.held.values()
    elif holder is not None:
        for kept in (holder.error_dict, holder.p_memory_dict, holder.q_memory_dict):
            tensors += kept.values()
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def in_turns(steps: Sequence[Callable[[], None]], turns: int) -> Tensor:
    """Return the slowest rank's seconds ``(turns, steps)``; every rank must call this.

    The ranks start each step together.
    """
    taken = torch.zeros(turns, len(steps), dtype=torch.float64)
    for turn in range(turns):
        for case, step in enumerate(steps):
            dist.barrier()
            start = time.perf_counter()
            step()
            taken[turn, case] = time.perf_counter() - start
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return taken
