"""A bucket weighted in place and queued, and what was weighted elsewhere queued.

Shape legend: L = queue slots, E = effective length, P = elements of one parameter, N = tensors.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gq_triton.eager.law import Turn, blocks, to_queue

__all__ = ["all_finite", "push_", "weigh_"]


def all_finite(grads: Sequence[Tensor]) -> Tensor:
    """Return for each gradient whether all of its elements are finite: ``(N,)`` bool."""
    device = grads[0].device if grads else None
    # A sum is one read of the gradient; only where it overflows is a second look needed.
    flags = [math.isfinite(grad.sum()) or bool(torch.isfinite(grad).all()) for grad in grads]
    return torch.tensor(flags, dtype=torch.bool, device=device)


def weigh_(
    grads: Sequence[Tensor],
    queues: Sequence[Tensor],
    queued: Sequence[Tensor],
    finite: Tensor,
    *,
    rho: float,
    length: Tensor | None = None,
    grad_scale: Tensor | None = None,
) -> Tensor:
    """Weight gradients in place and queue the raw ones: equations 1 and 2 of Grad Queue.

    Args:
        grads: N gradients ``(P,)``; replaced by ``w * g``.
        queues: N rings ``(L, P)``; the oldest row is replaced by the raw, unscaled gradient.
        queued: N counters, 0-d int64: gradients queued so far.
        finite: ``(N,)`` bool; where False the gradient passes untouched and is not queued.
        rho: bound of the weight, at least 1.
        length: effective length, 0-d int64, or None for L.
        grad_scale: the loss scale the gradients carry, 0-d, or None.

    Returns:
        ``(N, 5)`` float64: sums of g^2, (w g)^2 and w, and how many weights are rho and 1/rho.
    """
    inverse_scale = None if grad_scale is None else 1.0 / float(grad_scale)
    statistics = torch.zeros(len(grads), 5, dtype=torch.float64)
    for index, (grad, queue) in enumerate(zip(grads, queues, strict=True)):
        turn = Turn(queue, queued[index], bool(finite[index]), rho, length)
        for g, ring in blocks(grad, queue):
            raw_square = g.double().square().sum()
            weights = turn.block(g, ring, rho, inverse_scale)
            if turn.rows:
                # The product is formed in the weights' type: one rounding, at the store.
                g.copy_(g.to(weights.dtype) * weights)
            square = g.double().square().sum() if turn.rows else raw_square
            unscale = 1.0 if inverse_scale is None else inverse_scale**2
            statistics[index, 0] += raw_square * unscale
            statistics[index, 1] += square * unscale
            statistics[index, 2] += weights.expand(g.shape).sum(dtype=torch.float64)
            statistics[index, 3] += (weights == rho).sum() if turn.rows else 0
            statistics[index, 4] += (weights == 1.0 / rho).sum() if turn.rows else 0
        queued[index].add_(finite[index])
    return statistics


def push_(
    grads: Sequence[Tensor],
    queues: Sequence[Tensor],
    queued: Sequence[Tensor],
    finite: Tensor,
    *,
    grad_scale: Tensor | None = None,
) -> None:
    """Queue gradients that were weighted elsewhere.

    Args:
        grads: N gradients ``(P,)``, with the loss scale if there is one; read only.
        queues: N rings ``(L, P)``; the oldest row is replaced by the unscaled gradient.
        queued: N counters, 0-d int64: gradients queued so far.
        finite: ``(N,)`` bool; where False the gradient is not queued.
        grad_scale: the loss scale the gradients carry, 0-d, or None.
    """
    inverse_scale = None if grad_scale is None else 1.0 / float(grad_scale)
    for grad, queue, count, accept in zip(grads, queues, queued, finite.tolist(), strict=True):
        slot = Turn(queue, count, accept, 1.0, None).slot
        if slot is not None:
            value = grad if inverse_scale is None else grad * inverse_scale
            queue[slot].copy_(to_queue(value, queue.dtype))
            count.add_(1)
