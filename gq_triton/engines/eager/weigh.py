"""The weighting of gradients in place, and the queueing of the raw ones.

Shape legend: L = queue slots, P = elements of one parameter, N = tensors.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gq_triton.engines.eager.law import Turn, blocks, flags
from gq_triton.law import Law

__all__ = ["weigh_"]


def weigh_(
    grads: Sequence[Tensor],
    queues: Sequence[Tensor],
    queued: Sequence[Tensor],
    accepted: Tensor | None,
    law: Law,
) -> Tensor:
    """Weight gradients in place and queue the raw ones; see ``protocol``."""
    rho, unscale = law.rho, law.unscale
    device = grads[0].device if grads else None
    statistics = torch.zeros(len(grads), 5, dtype=torch.float64, device=device)
    accept = flags(accepted, len(grads))
    for index, (grad, queue) in enumerate(zip(grads, queues, strict=True)):
        turn = Turn(queue, queued[index], accept[index], law)
        for g, ring in blocks(grad, queue):
            raw_square = g.double().square().sum()
            weights = turn.block(g, ring, unscale)
            if turn.rows:
                # The product is formed in the weights' type: one rounding, at the store.
                g.copy_(g.to(weights.dtype) * weights)
            square = g.double().square().sum() if turn.rows else raw_square
            statistics[index, 0] += raw_square * unscale**2
            statistics[index, 1] += square * unscale**2
            statistics[index, 2] += weights.expand(g.shape).sum(dtype=torch.float64)
            statistics[index, 3] += (weights == rho).sum() if turn.rows else 0
            statistics[index, 4] += (weights == 1.0 / rho).sum() if turn.rows else 0
        queued[index].add_(accept[index])
    return statistics
