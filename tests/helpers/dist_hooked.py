"""Models in DDP with the hook, how they are trained, and what their states hold."""

import io
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from dist_models import batch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from gq_triton.dist import GradQueueState, register

LENGTH = 3
# MiB, about a hundred bytes: every layer has its own bucket once DDP has rebuilt the buckets.
TINY = 0.0001


def hooked(
    model: nn.Module, options: dict[str, Any] | None = None, **ddp_options: Any
) -> tuple[DDP, GradQueueState]:
    """Return the model in DDP with a tiny bucket size, and the state of its hook."""
    ddp = DDP(model, **{"bucket_cap_mb": TINY, **ddp_options})
    # Runs of two ranks take the engine that users get; the others save the time to compile Numba.
    backend = "auto" if dist.get_world_size() == 2 else "torch"
    every: dict[str, Any] = {"queue_length": LENGTH, "backend": backend, **(options or {})}
    return ddp, register(ddp, **every)


def agree(state: GradQueueState) -> None:
    """Assert that all ranks hold the same queue."""
    digests = [None] * dist.get_world_size()
    dist.all_gather_object(digests, state.digest())
    assert len(set(digests)) == 1, "the ranks' queues differ"


def same_parameters(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def queued(state: GradQueueState) -> dict[str, int]:
    return {name: int(count) for name, count in state.state_dict()["queued"].items()}


def saved(state: GradQueueState) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def train(
    ddp: DDP,
    state: GradQueueState | None,
    steps: range,
    data: Callable[[int, int], Tensor] = batch,
    **forward: Any,
) -> None:
    """Take plain SGD steps; after each, the queue must be the same on all ranks."""
    for step in steps:
        ddp.zero_grad()
        ddp(data(step, dist.get_rank()), **forward).square().mean().backward()
        descend(ddp)
        if state is not None:
            agree(state)


def descend(model: nn.Module, rate: float = 0.3) -> None:
    with torch.no_grad():
        for param in model.parameters():
            if param.grad is not None:
                param.sub_(param.grad, alpha=rate)
