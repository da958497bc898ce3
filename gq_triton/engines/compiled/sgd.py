"""SGD with the law fused in: one pass over memory.

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

__all__ = ["gqsgd_"]


@cache
def _sgd_kernel(used: int, has_momentum: bool, nesterov: bool, narrow: bool) -> Callable[..., Any]:
    weight, (open_tile, compared, put) = weight_of(used), ring_of(narrow)

    @exact()
    def kernel(start, stop, ring, stride, slots, slot, grad, unscale, p, buf, law, update):
        sign, decay, momentum, damped, lr = update
        for tile in range(start, stop, TILE):
            end = min(tile + TILE, stop)
            rows, width, origin = open_tile(ring, stride, slots, tile, end)
            for i in range(tile, end):
                j = np.uint64(i)
                x = grad[j] * unscale
                g = x * weight(rows, width, slots, slot, np.uint64(i - origin), compared(x), law)
                g = sign * g + decay * p[j]
                if has_momentum:
                    m = momentum * buf[j] + damped * g
                    buf[j] = m
                    g = g + momentum * m if nesterov else m
                p[j] -= lr * g
            put(ring, stride, slots, slot, tile, end, grad, unscale)

    return kernel


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
    """Take one step of SGD on weighted gradients; see ``protocol``."""
    if law.skips:
        return
    settings: dict[str, Any] = dict(
        lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay,
        nesterov=nesterov, maximize=maximize, first=first, stochastic_rounding=stochastic_rounding,
        place=place,
    )  # fmt: skip
    if stochastic_rounding and params and params[0].dtype == torch.bfloat16:
        # All together: a tensor's place in the call is part of its random bits.
        eager.gqsgd_(
            params, grads, queues, queued, momentum_buffers, accepted, law, **settings
        )  # fmt: skip
        return
    unscale, accept = law.unscale, flags(accepted, len(grads))
    hyper = (-1.0 if maximize else 1.0, weight_decay, momentum, 1.0 - dampening, float(lr))
    jobs: list[Job] = []
    counters: list[Tensor] = []
    for index, (param, grad, queue) in enumerate(zip(params, grads, queues, strict=True)):
        turn = Turn(queue, queued[index], accept[index], law)
        buffer = param if momentum_buffers is None else momentum_buffers[index]
        if first or not fuses(turn, unscale, queue, param, grad, buffer):
            one = slice(index, index + 1)
            buffers = None if momentum_buffers is None else momentum_buffers[one]
            own = None if accepted is None else accepted[one]
            eager.gqsgd_(
                params[one], grads[one], queues[one], queued[one], buffers, own, law, **settings
            )
            continue
        kind, used = DTYPES[param.dtype], len(turn.rows)
        moving = momentum_buffers is not None
        kernel = _sgd_kernel(used, moving, nesterov, in_bytes(queue))
        tensors = grad.numpy(), kind(unscale), param.numpy(), buffer.numpy()
        arguments = (
            *ring_arguments(turn, queue),
            *tensors,
            law_arguments(kind, law.rho, used),
            typed(kind, hyper),
        )
        for start, stop in chunks(param.numel()):
            jobs.append(partial(kernel, start, stop, *arguments))
        counters.append(queued[index])
    run(jobs)
    count_(counters)
