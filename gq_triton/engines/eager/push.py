"""The queueing of gradients that were weighted elsewhere."""

from collections.abc import Sequence

from torch import Tensor

from gq_triton.engines.eager.law import Turn, blocks, flags, put_
from gq_triton.law import Law, to_queue

__all__ = ["push_"]


def push_(
    grads: Sequence[Tensor],
    queues: Sequence[Tensor],
    queued: Sequence[Tensor],
    accepted: Tensor | None,
    *,
    grad_scale: Tensor | None = None,
) -> None:
    """Queue gradients that were weighted elsewhere; see ``protocol``."""
    law = Law(1.0, grad_scale=grad_scale)
    unscale, accept = law.unscale, flags(accepted, len(grads))
    for index, (grad, queue) in enumerate(zip(grads, queues, strict=True)):
        slot = Turn(queue, queued[index], accept[index], law).slot
        if slot is not None:
            for g, ring in blocks(grad, queue):
                value = g if unscale == 1.0 else g * unscale
                put_(ring, slot, to_queue(value, ring.dtype))
            queued[index].add_(1)
