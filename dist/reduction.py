"""How a bucket goes through the hook: scaled, added up over the ranks, weighted, queued."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from gq_triton.dist.clustered_slices import ClusteredSlices
from gq_triton.dist.clusters import LocalClusters
from gq_triton.dist.collectives import all_gather, completed, reduce_scatter
from gq_triton.dist.placement import SlicedQueues
from gq_triton.dist.shares import Shares
from gq_triton.law import all_zero
from gq_triton.queues import in_use

if TYPE_CHECKING:
    from gq_triton.dist.state import GradQueueState

__all__ = ["average"]


def average(state: "GradQueueState", names: tuple[str, ...], buffer: Tensor) -> Future:
    """Start to do with a bucket what the state is for; return a future of its buffer."""
    state.buckets.note(names, _static_graph(state))
    if state.local is not None:
        return _average_clustered(state, state.local, names, buffer)
    # DDP multiplies by the reciprocal too: dividing rounds otherwise for 3 ranks.
    buffer.mul_(1.0 / dist.get_world_size(state.process_group))
    if state.shard_queue:
        return _reduce(state, names, buffer, partial(_by_slices, state))
    reduced = _reduce(state, names, buffer, partial(_all_reduce, state))
    return reduced.then(partial(_weigh, state, names, buffer))


@torch.no_grad()
def _average_clustered(
    state: "GradQueueState", local: LocalClusters, names: tuple[str, ...], buffer: Tensor
) -> Future:
    """Reduce weighted gradients, and the raw ones beside them."""
    clustered = tuple(name for name in names if name in local.covered)
    shares = None
    if clustered:
        shares = local.shares(clustered, buffer.device, first=not state.shares_known)
        state.shares_known = True
    local.scale_(names, state.buckets.split(names, buffer), shares)
    if state.shard_queue:
        return _average_slices(state, local, names, clustered, buffer, shares)
    reduced = _reduce(state, names, buffer, partial(_all_reduce, state))
    if shares is None:
        return reduced.then(partial(_weigh, state, names, buffer))
    raw = local.raw_bucket(clustered, buffer, shares)
    # A future of its own: the callback waits for the first reduction too, which began earlier.
    second = _reduce(state, clustered, raw, partial(_all_reduce, state))
    return second.then(
        partial(_finish_clustered, state, local, names, buffer, shares, reduced, raw)
    )


def _average_slices(
    state: "GradQueueState",
    local: LocalClusters,
    names: tuple[str, ...],
    clustered: tuple[str, ...],
    buffer: Tensor,
    shares: Shares | None,
) -> Future:
    """Reduce weighted gradients; reduce-scatter the raw ones, each rank queues its slice.

    What has no clusters is weighted in slices as without clusters, in a bucket of its own.
    """
    if shares is None:
        return _reduce(state, names, buffer, partial(_by_slices, state))
    slices = dict(zip(names, state.buckets.split(names, buffer), strict=True))
    plain = tuple(name for name in names if name not in local.covered)
    others = torch.cat([slices[name] for name in plain]) if plain else buffer[:0]
    reduced = _reduce(state, names, buffer, partial(_all_reduce, state))
    squares: dict[str, Tensor] = {}
    raw = local.raw_bucket(clustered, buffer, shares)
    _reduce(state, clustered, raw, partial(_queue_slices, state, shares, squares))
    weighed = _reduce(state, plain, others, partial(_by_slices, state)) if plain else None

    @torch.no_grad()
    def finish(done: Future) -> Tensor:
        done.value()  # raises what the reduction raised
        with state.lock, state.streams.after_current(buffer.device):
            local.finish_slices(
                clustered, [slices[name] for name in clustered],
                torch.stack([squares[name] for name in clustered]), shares=shares,
                grad_scale=state.loss_scale(buffer.device),
            )  # fmt: skip
            for name, piece in zip(plain, state.buckets.split(plain, others), strict=True):
                slices[name].copy_(piece)
            in_use(others)
        return buffer

    if weighed is not None:
        weighed.wait()
    return reduced.then(finish)


@torch.no_grad()
def _queue_slices(
    state: "GradQueueState",
    shares: Shares,
    squares: dict[str, Tensor],
    names: tuple[str, ...],
    raw: Tensor,
) -> Future:
    """Add raw means up over the ranks, each rank its slice, and queue those; as ``_by_slices``.

    Args:
        state: whose bucket it is.
        shares: this rank's.
        squares: filled with the squared norms by name.
        names: clustered parameters.
        raw: their raw gradients on this rank, flat.
    """
    assert isinstance(state.queues, ClusteredSlices)
    # Without the lock, which callbacks wait for in threads that this exchange may need: no callback
    # touches the slices.
    with state.streams.after_current(raw.device, wait=False):
        part = reduce_scatter(raw, state.process_group)
        norms = state.queues.push_slice(
            names, part, shares=shares, length=state.next_length(raw.device),
            grad_scale=state.loss_scale(raw.device), skip_zeros=_skips_zeros(state),
        )  # fmt: skip
        squares.update(zip(names, norms, strict=True))
        in_use(raw)
    return completed(raw)


@torch.no_grad()
def _finish_clustered(
    state: "GradQueueState",
    local: LocalClusters,
    names: tuple[str, ...],
    buffer: Tensor,
    shares: Shares,
    reduced: Future,
    raw: Tensor,
    second: Future,
) -> Tensor:
    """Queue the raw means; weight what has no clusters. Local work only, as ``_weigh``."""
    second.value()
    reduced.wait()
    slices = dict(zip(names, state.buckets.split(names, buffer), strict=True))
    clustered = [name for name in names if name in local.covered]
    plain = tuple(name for name in names if name not in local.covered)
    scale, skips = state.loss_scale(buffer.device), _skips_zeros(state)
    with state.lock, state.streams.after_current(buffer.device):
        local.finish(
            clustered, [slices[name] for name in clustered], state.buckets.split(clustered, raw),
            shares=shares, grad_scale=scale, skip_zeros=skips,
        )  # fmt: skip
        _weigh_slices(state, plain, [slices[name] for name in plain])
    return buffer


def _reduce(
    state: "GradQueueState", names: tuple[str, ...], buffer: Tensor, through: Callable[..., Future]
) -> Future:
    """Start to add a bucket up over the group, in place, cut as in the saved run where due.

    Args:
        state: whose bucket it is.
        names: the parameters in the order of the bucket.
        buffer: their gradients on this rank, flat.
        through: adds a bucket up over the ranks, in place: ``_all_reduce`` or ``_by_slices``.

    Returns:
        A future of ``buffer``.
    """
    former = state.buckets.former(names, _static_graph(state))
    if not former:
        return through(names, buffer)
    slices = dict(zip(names, state.buckets.split(names, buffer), strict=True))
    # Waiting is no loss here: it is for one step, whose only bucket this usually is.
    for bucket in former:
        pieces = [slices[name] for name in bucket]
        whole = torch.cat(pieces)
        through(bucket, whole).wait()
        for piece, mean in zip(pieces, state.buckets.split(bucket, whole), strict=True):
            piece.copy_(mean)
    return completed(buffer)


def _all_reduce(state: "GradQueueState", names: tuple[str, ...], buffer: Tensor) -> Future:
    """Start to add a bucket up over the ranks."""
    work = dist.all_reduce(buffer, group=state.process_group, async_op=True)
    assert work is not None
    return work.get_future()


@torch.no_grad()
def _by_slices(state: "GradQueueState", names: tuple[str, ...], buffer: Tensor) -> Future:
    """Add a bucket up over the ranks and weight it, each rank its slice; start to gather those.

    Everything but the gathering is done, or given to the stream, before this returns: in no
    thread but the caller's, so that all ranks issue their collectives in the same order.
    """
    assert isinstance(state.queues, SlicedQueues)
    with state.lock, state.streams.after_current(buffer.device, wait=False):
        if state.local is None:
            state.take_loss()
        part = reduce_scatter(buffer, state.process_group)
        scale, skips = state.loss_scale(buffer.device), _skips_zeros(state)
        state.queues.weigh_slice_(names, part, grad_scale=scale, skip_zeros=skips)
        return all_gather(part, buffer, state.process_group)


@torch.no_grad()
def _weigh(
    state: "GradQueueState", names: tuple[str, ...], buffer: Tensor, reduced: Future
) -> Tensor:
    """Weight a reduced bucket in place and queue the raw one; local work only.

    Runs in a thread of gloo, where waiting for another collective could deadlock, or on a
    stream that follows the reduction.
    """
    reduced.value()  # raises what the reduction raised
    with state.lock, state.streams.after_current(buffer.device):
        if state.local is None:
            state.take_loss()
        _weigh_slices(state, names, state.buckets.split(names, buffer))
    return buffer


def _weigh_slices(state: "GradQueueState", names: Sequence[str], grads: Sequence[Tensor]) -> None:
    """Weight reduced gradients in place and queue the raw ones."""
    absent = None
    if grads and _skips_zeros(state):
        absent = all_zero(grads)
    if grads:
        scale = state.loss_scale(grads[0].device)
        state.queues.weigh_(names, grads, grad_scale=scale, absent=absent)


def _static_graph(state: "GradQueueState") -> bool:
    ddp = state.ddp
    return ddp is not None and ddp.static_graph


def _skips_zeros(state: "GradQueueState") -> bool:
    ddp = state.ddp
    return ddp is not None and (ddp.find_unused_parameters or ddp.static_graph)
