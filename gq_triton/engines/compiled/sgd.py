"""SGD with the law fused in: one pass over memory.

Shape legend: L = queue slots, E = effective length, P = elements of one parameter, N = tensors.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gq_triton.engines import eager
from gq_triton.engines.compiled.jit import exact, vector
from gq_triton.engines.compiled.law import TILE, law_arguments, ring_of, typed, weight_of
from gq_triton.engines.compiled.table import (
    GRAD,
    QUEUE,
    STRIDE,
    VECTORS,
    Turns,
    chosen,
    count_,
    run_pieces,
    table_of,
)
from gq_triton.engines.compiled.threads import CHUNK
from gq_triton.law import Law

__all__ = ["gqsgd_"]


@cache
def _kernel(
    used: int, whole: bool, moves: bool, nesterov: bool, decays: bool, in_bytes: bool
) -> Callable[..., Any]:
    weight, (open_tile, compared, put) = weight_of(used, whole), ring_of(in_bytes)
    length = TILE if in_bytes else CHUNK

    @exact()
    def kernel(pieces, numbers, rows, turns, slots, code, unscale, law, update):
        sign, decay, momentum, damped, lr = update
        for n in range(len(pieces)):
            row, start, stop = pieces[n, 0], pieces[n, 1], pieces[n, 2]
            slot, stride = turns[row], rows[row, STRIDE]
            ring = vector(rows[row, QUEUE], (slots + 1) * stride, code)
            grad, p = vector(rows[row, GRAD], stop, lr), vector(rows[row, VECTORS], stop, lr)
            buf = vector(rows[row, VECTORS + 1], stop, lr)
            for tile in range(start, stop, length):
                end = min(tile + length, stop)
                queue, width, origin = open_tile(ring, stride, slots, tile, end)
                for i in range(tile, end):
                    j = np.uint64(i)
                    raw = grad[j] * unscale
                    k = np.uint64(i - origin)
                    at = np.uint64(slot * width) + k
                    w = weight(queue, width, slots, slot, k, queue[at], compared(raw), law)
                    queue[at] = raw
                    g = sign * (raw * w)
                    if decays:  # 0 times an infinite weight would be NaN
                        g = g + decay * p[j]
                    if moves:
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
    # Random bits depend on a tensor's place in the call. First momenta are copies of gradients.
    at_random = stochastic_rounding and params and params[0].dtype == torch.bfloat16
    if at_random or first or not grads:
        eager.gqsgd_(params, grads, queues, queued, momentum_buffers, accepted, law, **settings)
        return
    others = [params] if momentum_buffers is None else [params, momentum_buffers]
    table, unscale = table_of(grads, queues, queued, others), law.unscale
    turns = Turns(table, accepted, law, unscale)
    rest = turns.others
    if rest:
        buffers = None if momentum_buffers is None else chosen(momentum_buffers, rest)
        eager.gqsgd_(
            chosen(params, rest), chosen(grads, rest), chosen(queues, rest), chosen(queued, rest),
            buffers, None if accepted is None else accepted[rest], law, **settings,
        )  # fmt: skip
    if len(rest) == len(grads):
        return
    moves, used, kind = momentum_buffers is not None, turns.used, table.kind
    kernel = _kernel(
        used, used == table.slots, moves, nesterov, weight_decay != 0, table.in_bytes
    )  # fmt: skip
    hyper = (-1.0 if maximize else 1.0, weight_decay, momentum, 1.0 - dampening, float(lr))
    pieces = turns.pieces(table)
    run_pieces(
        kernel, pieces, np.empty((len(pieces), 0)), table.rows, turns.slots, table.slots,
        table.code, kind(unscale), law_arguments(kind, law.rho, used), typed(kind, hyper),
    )  # fmt: skip
    count_(table.rows, turns.act)
