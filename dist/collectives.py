"""Reduce-scatter and all-gather of a flat buffer in W equal slices, the last one padded.

With W ranks and a buffer of n elements, every rank sends ``(W - 1) / W * n`` elements in each of
the two operations. Together that is what a ring all-reduce sends, plus up to W - 1 elements of
padding.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

__all__ = ["all_gather", "completed", "reduce_scatter", "slice_size", "start_all_gather"]

# torch 2.13 renamed both functions, and warns of the old names.
_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def slice_size(numel: int, world: int) -> int:
    """Return how many elements of a buffer each of ``world`` ranks holds, padding included."""
    return -(-numel // world)


def reduce_scatter(buffer: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return this rank's slice of the sum of ``buffer`` over the ranks; every rank must call.

    On the CPU the slices are exchanged and added in the order of the ranks. Gloo's own
    reduce-scatter would send twice the bytes: the whole buffer goes to every rank, which drops most
    of it.

    Args:
        buffer: ``(n,)``, left as it is.
        group: the process group.

    Returns:
        ``(ceil(n / W),)`` of the type of ``buffer``, a new tensor; the elements beyond n are 0.
    """
    world = dist.get_world_size(group)
    size = slice_size(buffer.numel(), world)
    padded = buffer
    if size * world != buffer.numel():
        padded = buffer.new_zeros(size * world)
        padded[: buffer.numel()].copy_(buffer)
    if buffer.device.type != "cpu":
        part = buffer.new_empty(size)
        _scatter(part, padded, group=group)
        return part
    received = torch.empty_like(padded)
    dist.all_to_all_single(received, padded, group=group)
    rows = received.view(world, size)
    part = rows[0].clone()
    for row in rows[1:]:
        part.add_(row)
    return part


def start_all_gather(part: Tensor, whole: Tensor, group: dist.ProcessGroup | None) -> dist.Work:
    """Start to fill ``whole`` ``(W n,)`` with the ranks' parts ``(n,)``; return the work.

    Every rank must call.
    """
    return _gather(whole, part, group=group, async_op=True)


def all_gather(part: Tensor, buffer: Tensor, group: dist.ProcessGroup | None) -> Future:
    """Start to fill ``buffer`` with the slices of all ranks; every rank must call.

    Args:
        part: this rank's slice ``(ceil(n / W),)``.
        buffer: ``(n,)``, overwritten.
        group: the process group.

    Returns:
        A future of ``buffer``.
    """
    size = part.numel() * dist.get_world_size(group)
    whole = buffer if size == buffer.numel() else buffer.new_empty(size)
    work = start_all_gather(part, whole, group)

    @torch.no_grad()
    def finish(gathered: Future | None = None) -> Tensor:
        if gathered is not None:
            gathered.value()  # raises what the collective raised
        if whole is not buffer:
            buffer.copy_(whole[: buffer.numel()])
        return buffer

    if buffer.is_cuda:
        # A callback would run on a stream that the allocator does not connect with the temporary
        # tensors. So wait here: with NCCL the current stream waits, not the host.
        work.wait()
        return completed(finish())
    return work.get_future().then(finish)


def completed(buffer: Tensor) -> Future:
    """Return a completed future of ``buffer``; it waits for the current stream's work so far."""
    done = Future(devices=[buffer.device] if buffer.is_cuda else None)
    done.set_result(buffer)
    return done
