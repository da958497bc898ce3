"""AdamW with the law fused in: one pass over memory.

Shape legend: L = queue slots, E = effective length, P = elements of one parameter, N = tensors.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gq_triton.engines import eager
from gq_triton.engines.compiled.law import (
    DTYPES,
    TILE,
    exact,
    fuses,
    in_bytes,
    law_arguments,
    ring_arguments,
    ring_of,
    typed,
    weight_of,
)
from gq_triton.engines.compiled.threads import Job, chunks, count_, run
from gq_triton.engines.eager.law import Turn, flags
from gq_triton.law import Law

__all__ = ["gqadamw_"]


@cache
def _adamw_kernel(used: int, narrow: bool) -> Callable[..., Any]:
    weight, (open_tile, compared, put) = weight_of(used), ring_of(narrow)

    @exact()
    def kernel(start, stop, ring, stride, slots, slot, grad, unscale, p, m, v, law, update):
        sign, keep, new1, beta2, new2, inverse_correction, eps, step_size = update
        for tile in range(start, stop, TILE):
            end = min(tile + TILE, stop)
            rows, width, origin = open_tile(ring, stride, slots, tile, end)
            for i in range(tile, end):
                j = np.uint64(i)
                x = grad[j] * unscale
                g = (
                    sign
                    * x
                    * weight(rows, width, slots, slot, np.uint64(i - origin), compared(x), law)
                )
                first = m[j] + new1 * (g - m[j])
                second = beta2 * v[j] + new2 * g * g
                m[j] = first
                v[j] = second
                p[j] = p[j] * keep - step_size * (
                    first / (np.sqrt(second) * inverse_correction + eps)
                )
            put(ring, stride, slots, slot, tile, end, grad, unscale)

    return kernel


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
    """Take one step of AdamW on weighted gradients; see ``protocol``."""
    if law.skips:
        return
    settings: dict[str, Any] = dict(
        lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, maximize=maximize,
        stochastic_rounding=stochastic_rounding, place=place,
    )  # fmt: skip
    if stochastic_rounding and params and params[0].dtype == torch.bfloat16:
        # All together: a tensor's place in the call is part of its random bits.
        moments = exp_avgs, exp_avg_sqs, steps
        eager.gqadamw_(params, grads, queues, queued, *moments, accepted, law, **settings)
        return
    unscale, accept = law.unscale, flags(accepted, len(grads))
    # Arithmetic with a learning rate that is a tensor stays in the tensor's type, as in torch.
    keep = float(1 - lr * weight_decay)
    jobs: list[Job] = []
    counters: list[Tensor] = []
    for index, (param, grad, queue) in enumerate(zip(params, grads, queues, strict=True)):
        turn = Turn(queue, queued[index], accept[index], law)
        moments = exp_avgs[index], exp_avg_sqs[index]
        if not fuses(turn, unscale, queue, param, grad, *moments):
            one = slice(index, index + 1)
            state = queues[one], queued[one], exp_avgs[one], exp_avg_sqs[one], steps[one]
            own = None if accepted is None else accepted[one]
            eager.gqadamw_(params[one], grads[one], *state, own, law, **settings)
            continue
        steps[index].add_(1)
        step = float(steps[index])
        hyper = (
            -1.0 if maximize else 1.0, keep, 1 - beta1, beta2, 1 - beta2,
            (1 - beta2**step) ** -0.5, eps, float(lr / (1 - beta1**step)),
        )  # fmt: skip
        kind, used = DTYPES[param.dtype], len(turn.rows)
        tensors = grad.numpy(), kind(unscale), param.numpy(), *(t.numpy() for t in moments)
        arguments = (
            *ring_arguments(turn, queue),
            *tensors,
            law_arguments(kind, law.rho, used),
            typed(kind, hyper),
        )
        kernel = _adamw_kernel(used, in_bytes(queue))
        for start, stop in chunks(param.numel()):
            jobs.append(partial(kernel, start, stop, *arguments))
        counters.append(queued[index])
    run(jobs)
    count_(counters)
