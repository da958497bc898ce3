"""SGD on weighted gradients.

Shape legend: L = queue slots, P = elements of one parameter, N = tensors.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gq_triton.engines.eager.law import Turn, blocks, flags
from gq_triton.law import Law
from gq_triton.rounding import key_of, random_bits, stochastic_bfloat16

__all__ = ["Rounding", "gqsgd_", "unscaled"]


class Rounding:
    """How the blocks of one parameter are updated: in its type, or in float32 and at random.

    Args:
        param: the parameter.
        stochastic: whether a parameter of bfloat16 is rounded at random.
        queued: the counter of its queue, before this step.
        index: its place among the tensors of the optimizer.
    """

    def __init__(self, param: Tensor, stochastic: bool, queued: Tensor, index: int) -> None:
        self.at_random = stochastic and param.dtype == torch.bfloat16
        self._key = key_of(int(queued), index) if self.at_random else 0
        self._next = 0

    def wide(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors that an update changes: themselves, or copies in float32."""
        return tuple(t.float() for t in tensors) if self.at_random else tensors

    def close(self, param: Tensor, wide: Tensor, *others: tuple[Tensor, Tensor]) -> None:
        """Write what ``wide`` returned and an update changed back into its block.

        Args:
            param: the block of the parameter.
            wide: its new value.
            *others: further blocks and their values, rounded to the nearest.
        """
        if not self.at_random:
            return
        bits = random_bits(self._key, self._next, len(param), param.device)
        self._next += len(param)
        param.copy_(stochastic_bfloat16(wide, bits))
        for block, value in others:
            block.copy_(value)


def unscaled(grad: Tensor, weights: Tensor, unscale: float) -> Tensor:
    """Return ``w * g`` without the loss scale, rounded once to the gradient's type.

    Weights of a block are overwritten.
    """
    grad = grad if unscale == 1.0 else grad * unscale
    return grad if weights.dim() == 0 else weights.mul_(grad.to(weights.dtype)).to(grad.dtype)


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
    stochastic_rounding: bool = False,
    place: int = 0,
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
        rounding = Rounding(param, stochastic_rounding, queued[index], place + index)
        for block, g, ring, moment in blocks(param, grad, queue, buffer):
            p, buf = rounding.wide(block, moment)
            (raw,) = rounding.wide(g)
            g = unscaled(raw, turn.block(g, ring, unscale), unscale)
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
            rounding.close(block, p, *([] if momentum_buffers is None else [(moment, buf)]))
        queued[index].add_(accept[index])
