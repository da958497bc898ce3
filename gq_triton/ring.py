"""The ring buffer of past gradients of one parameter, and the effective length."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from gq_triton.options import LawOptions

__all__ = [
    "effective_length",
    "flat",
    "least_over",
    "length_of",
    "local",
    "new_counter",
    "new_losses",
    "new_queue",
    "record_loss",
    "rows",
    "shard_groups",
    "write_back_",
]


def new_queue(like: Tensor, length: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return an empty ring for one parameter: zeros ``(length, *like.shape)``.

    The rows lie in the parameter's own memory order, so that one flat view of parameter, gradient
    and queue walks all of them in step. A DTensor gets a DTensor, sharded along the same dimension
    of the parameter. The zeros are never read: every weight is 1 until ``length`` gradients are
    queued.
    """
    dtype = dtype or like.dtype
    if isinstance(like, DTensor):
        shard = new_queue(like.to_local(), length, dtype)
        placements = [Shard(p.dim + 1) if isinstance(p, Shard) else p for p in like.placements]
        shape = torch.Size((length, *like.shape))
        stride = (like.numel(), *like.stride())
        return DTensor.from_local(
            shard, like.device_mesh, placements, run_check=False, shape=shape, stride=stride
        )
    row = torch.empty_like(like, dtype=dtype, memory_format=torch.preserve_format)
    size, stride = (length, *row.shape), (row.numel(), *row.stride())
    return torch.empty_strided(size, stride, dtype=dtype, device=row.device).zero_()


def new_counter(like: Tensor) -> Tensor:
    """Return the number of gradients queued so far, 0-d int64 on the device of ``like``."""
    return torch.zeros((), dtype=torch.int64, device=local(like).device)


def local(tensor: Tensor) -> Tensor:
    """Return the shard of a DTensor that this rank holds; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rows(queue: Tensor) -> Tensor:
    """Return a ring ``(L, *shape)`` as a view ``(L, P)``, each row in memory order."""
    if queue.is_contiguous():
        return queue.view(queue.shape[0], -1) if queue.numel() else queue.reshape(len(queue), 0)
    size = (queue.shape[0], queue[0].numel())
    return queue.as_strided(size, (queue.stride(0), 1), queue.storage_offset())


def shard_groups(tensor: Tensor) -> list[dist.ProcessGroup]:
    """Return the process groups over which a tensor is sharded; none for an ordinary one."""
    if not isinstance(tensor, DTensor):
        return []
    sharded = [d for d, p in enumerate(tensor.placements) if isinstance(p, Shard)]
    return [tensor.device_mesh.get_group(dimension) for dimension in sharded]


def least_over(groups: Sequence[dist.ProcessGroup]) -> Callable[[Tensor], Tensor] | None:
    """Return what takes votes ``(N,)`` to the least of all ranks, for `law.accepted`.

    Args:
        groups: those over which the parameters are sharded; None is returned where there are none.
    """
    if not groups:
        return None

    def least(votes: Tensor) -> Tensor:
        for group in groups:
            dist.all_reduce(votes, dist.ReduceOp.MIN, group=group)
        return votes

    return least


def flat(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """Return ``tensor`` as one dimension in the memory order of ``like`` (default: itself).

    It is a view where the memory allows it and a copy where not: a tensor with holes, or one whose
    order differs from that of ``like``.
    """
    like = tensor if like is None else like
    if tensor.is_contiguous() and like.is_contiguous():
        return tensor.view(-1)
    permuted = tensor.permute(_memory_order(like))
    return permuted.contiguous().view(-1)  # reshape may return a strided view


def write_back_(tensor: Tensor, values: Tensor, like: Tensor | None = None) -> None:
    """Copy what ``flat(tensor, like)`` returned back into ``tensor``, unless it was a view."""
    if tensor.numel() and tensor.data_ptr() != values.data_ptr():
        permuted = tensor.permute(_memory_order(tensor if like is None else like))
        permuted.copy_(values.view(permuted.shape))


def _memory_order(like: Tensor) -> list[int]:
    """Return the dimensions of a tensor from the one that strides farthest to the nearest."""
    return sorted(range(like.dim()), key=lambda d: (-like.stride(d), -like.shape[d]))


def new_losses(window: int, longest: int, device: torch.device) -> Tensor:
    """Return an empty history of losses: ``(longest + window - 1,)`` NaN, newest first."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.full((longest + window - 1,), math.nan, dtype=dtype, device=device)


def record_loss(losses: Tensor, loss: Tensor | float) -> Tensor:
    """Return the history with ``loss`` as its newest entry, without waiting for the device."""
    value = torch.as_tensor(loss).detach()
    if value.numel() != 1:
        raise ValueError(f"loss must be one number, got a tensor of shape {tuple(value.shape)}")
    value = value.to(losses, non_blocking=True)
    return torch.cat([value.reshape(1), losses[:-1]])


def effective_length(losses: Tensor, window: int, shortest: int, longest: int) -> Tensor:
    """Return how many of the newest gradients the statistics use, 0-d int64 on the device.

    Section 3.1 of the paper: a window slides back over the losses as far as its sum grows, that is,
    as long as the loss has been falling; ``docs/method.md`` has the exact reading. A loss that is
    not finite, or was never recorded, ends the scan.
    """
    sums = losses.unfold(0, window, 1).sum(dim=1)
    known = torch.isfinite(sums)
    falling = (sums[:-1] < sums[1:]) & known[:-1] & known[1:]
    steps = falling.long().cumprod(0).sum()
    return (steps + 1).clamp(shortest, longest)


def length_of(losses: Tensor | None, options: LawOptions, device: torch.device) -> Tensor | None:
    """Return the effective length that the options ask for, 0-d int64; None stands for L.

    Args:
        losses: the history, or None where no loss was recorded yet.
        options: of the law.
        device: of the result where there are no losses yet.
    """
    if options.loss_window is None:
        return None
    if losses is None:
        losses = new_losses(options.loss_window, options.queue_length, device)
    return effective_length(losses, options.loss_window, options.shortest, options.queue_length)
