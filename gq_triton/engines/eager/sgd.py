"""SGD on weighted gradients.

Shape legend: L = queue slots, P = elements of one parameter, N = tensors.
"""

from collections.abc import Sequence

from torch import Tensor

from gq_triton.engines.eager.law import Turn, blocks, flags
from gq_triton.law import Law

__all__ = ["gqsgd_", "unscaled"]


def unscaled(grad: Tensor, weights: Tensor, unscale: float) -> Tensor:
    """Return ``w * g`` without the loss scale, rounded once to the gradient's type."""
    grad = grad if unscale == 1.0 else grad * unscale
    return grad if weights.dim() == 0 else (grad.to(weights.dtype) * weights).to(grad.dtype)


def gqsgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    queues: Sequence[Tensor],
    queued: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] | None,
    accepted: Tensor | None,
    law: Law,
    *,
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first: bool,
) -> None:
    """Take one step of SGD on weighted gradients; see ``protocol``.

    The step equals that of ``torch.optim.SGD`` bit for bit where every weight is 1.
    """
    if law.skips:
        return
    unscale, accept = law.unscale, flags(accepted, len(grads))
    rate = float(lr)
    for index, (param, grad, queue) in enumerate(zip(params, grads, queues, strict=True)):
        turn = Turn(queue, queued[index], accept[index], law)
        buffer = param if momentum_buffers is None else momentum_buffers[index]
        for p, g, ring, buf in blocks(param, grad, queue, buffer):
            g = unscaled(g, turn.block(g, ring, unscale), unscale)
            g = -g if maximize else g
            if weight_decay != 0:
                g = g.add(p, alpha=weight_decay)
            if momentum != 0:
                if first:
                    buf.copy_(g)
                else:
                    buf.mul_(momentum).add_(g, alpha=1 - dampening)
                g = g.add(buf, alpha=momentum) if nesterov else buf
            p.add_(g, alpha=-rate)
        queued[index].add_(accept[index])
