"""AdamW on weighted gradients.

Shape legend: L = queue slots, P = elements of one parameter, N = tensors.
"""

from collections.abc import Sequence

from torch import Tensor

from gq_triton.engines.eager.law import Turn, blocks, flags
from gq_triton.engines.eager.sgd import Rounding, unscaled
from gq_triton.law import Law

__all__ = ["gqadamw_"]


def gqadamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    queues: Sequence[Tensor],
    queued: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    accepted: Tensor | None,
    law: Law,
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    stochastic_rounding: bool = False,
    place: int = 0,
) -> None:
    """Take one step of AdamW on weighted gradients; see ``protocol``.

    The step equals that of ``torch.optim.AdamW`` bit for bit where every weight is 1.
    """
    if law.skips:
        return
    unscale, accept = law.unscale, flags(accepted, len(grads))
    # Arithmetic with a learning rate that is a tensor stays in the tensor's type, as in torch.
    keep = float(1 - lr * weight_decay)
    for index, (param, grad, queue) in enumerate(zip(params, grads, queues, strict=True)):
        turn = Turn(queue, queued[index], accept[index], law)
        steps[index].add_(1)
        step = float(steps[index])
        step_size = float(lr / (1 - beta1**step))
        correction = (1 - beta2**step) ** 0.5
        moments = exp_avgs[index], exp_avg_sqs[index]
        rounding = Rounding(param, stochastic_rounding, queued[index], place + index)
        for block, g, ring, *old in blocks(param, grad, queue, *moments):
            p, m, v = rounding.wide(block, *old)
            (raw,) = rounding.wide(g)
            g = unscaled(raw, turn.block(g, ring, unscale), unscale)
            g = -g if maximize else g
            p.mul_(keep)
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            p.addcdiv_(m, v.sqrt().div_(correction).add_(eps), value=-step_size)
            rounding.close(block, p, *zip(old, (m, v), strict=True))
        queued[index].add_(accept[index])
