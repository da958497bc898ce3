"""AdamW with the law fused in: one pass over memory.

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

__all__ = ["gqadamw_"]

_STEP = VECTORS + 3


@cache
def _kernel(used: int, whole: bool, in_bytes: bool) -> Callable[..., Any]:
    weight, (open_tile, compared, put) = weight_of(used, whole), ring_of(in_bytes)
    length = TILE if in_bytes else CHUNK

    @exact()
    def kernel(pieces, numbers, rows, turns, slots, code, unscale, law, update):
        sign, keep, new1, beta2, new2, eps = update
        for n in range(len(pieces)):
            row, start, stop = pieces[n, 0], pieces[n, 1], pieces[n, 2]
            slot, stride = turns[row], rows[row, STRIDE]
            inverse_correction, step_size = numbers[n, 0], numbers[n, 1]
            ring = vector(rows[row, QUEUE], (slots + 1) * stride, code)
            grad, p = vector(rows[row, GRAD], stop, eps), vector(rows[row, VECTORS], stop, eps)
            m = vector(rows[row, VECTORS + 1], stop, eps)
            v = vector(rows[row, VECTORS + 2], stop, eps)
            for tile in range(start, stop, length):
                end = min(tile + length, stop)
                queue, width, origin = open_tile(ring, stride, slots, tile, end)
                for i in range(tile, end):
                    j, k = np.uint64(i), np.uint64(i - origin)
                    at = np.uint64(slot * width) + k
                    raw = grad[j] * unscale
                    w = weight(queue, width, slots, slot, k, queue[at], compared(raw), law)
                    queue[at] = raw
                    g = sign * raw * w
                    first = m[j] + new1 * (g - m[j])
                    second = beta2 * v[j] + new2 * g * g
                    m[j] = first
                    v[j] = second
                    p[j] = p[j] * keep - step_size * (
                        first / (np.sqrt(second) * inverse_correction + eps)
                    )
                put(ring, stride, slots, slot, tile, end, grad, unscale)

    return kernel


@exact()
def _next_steps(rows, act):
    """Count one more step of the tensors that act; return the counts, 0 for the others."""
    counts = np.zeros(len(rows), np.float64)
    for n in range(len(rows)):
        if act[n]:
            step = vector(rows[n, _STEP], 1, np.float32(0))
            step[0] += np.float32(1)
            counts[n] = step[0]
    return counts


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
    # Random bits depend on a tensor's place in the call.
    at_random = stochastic_rounding and params and params[0].dtype == torch.bfloat16
    if at_random or not grads:
        moments = exp_avgs, exp_avg_sqs, steps
        eager.gqadamw_(params, grads, queues, queued, *moments, accepted, law, **settings)
        return
    others = [params, exp_avgs, exp_avg_sqs]
    table, unscale = table_of(grads, queues, queued, others, [steps]), law.unscale
    turns = Turns(table, accepted, law, unscale)
    rest = turns.others
    if rest:
        eager.gqadamw_(
            chosen(params, rest), chosen(grads, rest), chosen(queues, rest), chosen(queued, rest),
            chosen(exp_avgs, rest), chosen(exp_avg_sqs, rest), chosen(steps, rest),
            None if accepted is None else accepted[rest], law, **settings,
        )  # fmt: skip
    if len(rest) == len(grads):
        return
    used, kind = turns.used, table.kind
    kernel = _kernel(used, used == table.slots, table.in_bytes)
    # Arithmetic with a learning rate that is a tensor stays in the tensor's type, as in torch.
    keep = float(1 - lr * weight_decay)
    hyper = -1.0 if maximize else 1.0, keep, 1 - beta1, beta2, 1 - beta2, eps
    counts = _next_steps(table.rows, turns.act)
    factors = {
        step: ((1 - beta2**step) ** -0.5, float(lr / (1 - beta1**step)))
        for step in set(counts.tolist()) - {0.0}
    }
    pieces = turns.pieces(table)
    numbers = np.array([factors[step] for step in counts[pieces[:, 0]].tolist()], kind)
    run_pieces(
        kernel, pieces, numbers.reshape(-1, 2), table.rows, turns.slots, table.slots,
        table.code, kind(unscale), law_arguments(kind, law.rho, used), typed(kind, hyper),
    )  # fmt: skip
    count_(table.rows, turns.act)
