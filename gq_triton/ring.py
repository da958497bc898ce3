"""The memory of one parameter's ring: allocation, flat views in memory order, shards.

A ring holds the last L gradients of a parameter; each new gradient replaces the oldest row.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gq_triton.divided import dtensor
from gq_triton.float8 import convert, ring_rows, stored_type

__all__ = [
    "capturing",
    "fill_ring",
    "flat",
    "flat_gradient",
    "in_use",
    "least_over",
    "local",
    "mean_over_ranks",
    "new_counter",
    "new_queue",
    "place_gradients",
    "refuse_capture",
    "rows",
    "shaped",
    "shard_groups",
    "shard_number",
    "write_back_",
]


def new_queue(like: Tensor, length: int, queue_dtype: torch.dtype | str | None = None) -> Tensor:
    """Return an empty ring for one parameter: zeros ``(length, *like.shape)``.

    The rows lie in the parameter's own memory order, so that one flat view of parameter, gradient
    and queue walks all of them in step. A DTensor gets a DTensor, sharded along the same dimension
    of the parameter. The zeros are never read: every weight is 1 until ``length`` gradients are
    queued. A ring in bytes has a row more; see `float8`.

    Args:
        like: the parameter.
        length: how many gradients the ring holds.
        queue_dtype: the option, or the type of a ring's tensor.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    dtype = stored_type(queue_dtype, like.dtype)
    if isinstance(like, dtensor()):
        from torch.distributed.tensor import DTensor, Shard

        shard = new_queue(like.to_local(), length, dtype)
        length = len(shard)
        placements = [Shard(p.dim + 1) if isinstance(p, Shard) else p for p in like.placements]
        shape = torch.Size((length, *like.shape))
        stride = (like.numel(), *like.stride())
        return DTensor.from_local(
            shard, like.device_mesh, placements, run_check=False, shape=shape, stride=stride
        )
    refuse_capture("a queue", like.device)
    row = torch.empty_like(like, dtype=dtype, memory_format=torch.preserve_format)
    size = ring_rows(length, dtype), *row.shape
    stride = row.numel(), *row.stride()
    return torch.empty_strided(size, stride, dtype=dtype, device=row.device).zero_()


def capturing(device: torch.device) -> bool:
    """Return whether a CUDA graph is being captured on a device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def refuse_capture(what: str, device: torch.device) -> None:
    """Raise a RuntimeError if a CUDA graph is being captured where state is about to be made."""
    if capturing(device):
        raise RuntimeError(
            f"{what} cannot be made while a CUDA graph is captured, because every replay would "
            "empty it again: take two steps before the capture"
        )


def new_counter(like: Tensor) -> Tensor:
    """Return a new counter of queued gradients: 0, 0-d int64 on the device of ``like``."""
    return torch.zeros((), dtype=torch.int64, device=local(like).device)


def fill_ring(fresh: Tensor, ring: Tensor) -> Tensor:
    """Copy a ring into ``fresh``, made for the same parameter, in the type of it; return it."""
    local(fresh).copy_(convert(local(ring.detach()), fresh.dtype))
    return fresh


def local(tensor: Tensor) -> Tensor:
    """Return the shard of a DTensor that this rank holds; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, dtensor()) else tensor


def place_gradients(params: Iterable[Tensor]) -> None:
    """Give the gradients of DTensors the placements of their parameters.

    Under sequence parallelism the gradient of a replicated parameter may be a sum whose terms the
    ranks still hold apart. A weight is no linear function of the gradient: it needs the whole sum.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    for param in params:
        grad = param.grad
        if not isinstance(param, dtensor()) or not isinstance(grad, dtensor()):
            continue
        if grad.placements != param.placements:
            param.grad = grad.redistribute(param.device_mesh, param.placements)


def mean_over_ranks(loss: Tensor | float, param: Tensor) -> Tensor | float:
    """Return the mean of a loss over the ranks that share a parameter; all of them must call.

    Args:
        loss: this rank's loss, one number.
        param: the parameter; the loss is returned as it is unless this is a DTensor.
    """
    if not isinstance(param, dtensor()):
        return loss
    value = torch.as_tensor(loss).detach()
    total = value.to(param.to_local().device, torch.float64, copy=True)
    for dimension in range(param.device_mesh.ndim):
        dist.all_reduce(total, group=param.device_mesh.get_group(dimension))
    return total / param.device_mesh.size()


def rows(queue: Tensor) -> Tensor:
    """Return a ring ``(L, *shape)`` as a view ``(L, P)``, each row in memory order."""
    if queue.is_contiguous():
        if queue.dim() == 2:
            return queue
        return queue.view(queue.shape[0], -1) if queue.numel() else queue.reshape(len(queue), 0)
    size = (queue.shape[0], queue[0].numel())
    return queue.as_strided(size, (queue.stride(0), 1), queue.storage_offset())


def shard_groups(tensor: Tensor) -> list[dist.ProcessGroup]:
    """Return the process groups over which a tensor is sharded; none for an ordinary one."""
    if not isinstance(tensor, dtensor()):
        return []
    from torch.distributed.tensor import Shard

    sharded = [d for d, p in enumerate(tensor.placements) if isinstance(p, Shard)]
    return [tensor.device_mesh.get_group(dimension) for dimension in sharded]


def shard_number(tensor: Tensor) -> int:
    """Return the number of this rank's part among the parts of a tensor; ranks may hold one part.

    An ordinary tensor is part 0.
    """
    number = 0
    if isinstance(tensor, dtensor()):
        from torch.distributed.tensor import Shard

        mesh = tensor.device_mesh
        for dimension, placement in enumerate(tensor.placements):
            if isinstance(placement, Shard):
                number = number * mesh.size(dimension) + mesh.get_local_rank(dimension)
    return number


def least_over(groups: Sequence[dist.ProcessGroup]) -> Callable[[Tensor], Tensor] | None:
    """Return the function that reduces votes ``(N,)`` to the least of all ranks (`law.accepted`).

    Args:
        groups: the groups over which the parameters are sharded. Without any, None is returned.
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

    The result is a view where the memory allows it. It is a copy of a tensor with holes, or of one
    whose order differs from that of ``like``.
    """
    like = tensor if like is None else like
    if tensor.is_contiguous() and like.is_contiguous():
        return tensor.view(-1)
    permuted = tensor.permute(_memory_order(like))
    return permuted.contiguous().view(-1)  # reshape may return a strided view


def flat_gradient(grad: Tensor, param: Tensor) -> Tensor:
    """Return ``flat(grad, like=param)``; a gradient that is flat itself."""
    already = grad.dim() == 1 and grad.is_contiguous() and not grad.requires_grad
    return grad if already else flat(grad, like=param)


def shaped(rows: Tensor, like: Tensor) -> Tensor:
    """Return rows ``(K, P)`` in the memory order of ``like`` as a view ``(K, *like.shape)``."""
    if like.is_contiguous():
        return rows.view(len(rows), *like.shape)
    order = _memory_order(like)
    permuted = rows.view(len(rows), *(like.shape[d] for d in order))
    return permuted.permute(0, *(1 + order.index(d) for d in range(like.dim())))


def write_back_(tensor: Tensor, values: Tensor, like: Tensor | None = None) -> None:
    """Copy what ``flat(tensor, like)`` returned back into ``tensor``, unless it was a view."""
    if tensor.numel() and tensor.data_ptr() != values.data_ptr():
        permuted = tensor.permute(_memory_order(tensor if like is None else like))
        permuted.copy_(values.view(permuted.shape))


def _memory_order(like: Tensor) -> list[int]:
    """Return the dimensions of a tensor from the one that strides farthest to the nearest."""
    return sorted(range(like.dim()), key=lambda d: (-like.stride(d), -like.shape[d]))


def in_use(*tensors: Tensor) -> None:
    """Keep the memory of tensors from reuse until the current stream's work on them has run.

    Memory belongs to the stream that allocated it. Once freed, it may be overwritten by that stream
    at once, even while another stream still reads it. On the CPU this function does nothing.
    """
    for tensor in map(local, tensors):
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
