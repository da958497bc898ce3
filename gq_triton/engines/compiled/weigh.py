"""The weighting of gradients in place, and the queueing of the raw ones.

Shape legend: L = queue slots, E = effective length, P = elements of one parameter, N = tensors.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gq_triton.engines import eager
from gq_triton.engines.compiled.jit import exact, sums, vector
from gq_triton.engines.compiled.law import TILE, law_arguments, ring_of, weight_of
from gq_triton.engines.compiled.table import (
    GRAD,
    QUEUE,
    STRIDE,
    Turns,
    chosen,
    count_,
    run_pieces,
    table_of,
)
from gq_triton.law import Law

__all__ = ["weigh_"]


@sums()
def _tile_sums(grad, weights, count, unscale, low, high, out):
    raw = weighted = total = 0.0
    at_high = at_low = 0
    for j in range(count):
        g = np.float64(grad[j]) * unscale
        w = np.float64(weights[j])
        raw += g * g
        weighted += (g * w) * (g * w)
        total += w
        at_high += weights[j] >= high
        at_low += weights[j] <= low
    out[0] += raw
    out[1] += weighted
    out[2] += total
    out[3] += at_high
    out[4] += at_low


@cache
def _kernel(used: int, whole: bool, in_bytes: bool, kind: Any) -> Callable[..., Any]:
    weight, (open_tile, compared, put) = weight_of(used, whole), ring_of(in_bytes)

    @exact()
    def kernel(pieces, seen, rows, turns, slots, code, unscale, law):
        weights = np.empty(TILE, kind)
        low, high = law[0], law[1]
        for n in range(len(pieces)):
            row, start, stop = pieces[n, 0], pieces[n, 1], pieces[n, 2]
            slot, stride = turns[row], rows[row, STRIDE]
            ring = vector(rows[row, QUEUE], (slots + 1) * stride, code)
            grad = vector(rows[row, GRAD], stop, low)
            for tile in range(start, stop, TILE):
                end = min(tile + TILE, stop)
                queue, width, origin = open_tile(ring, stride, slots, tile, end)
                for i in range(end - tile):
                    raw = grad[np.uint64(tile + i)] * unscale
                    k = np.uint64(tile + i - origin)
                    at = np.uint64(slot * width) + k
                    weights[i] = weight(queue, width, slots, slot, k, queue[at], compared(raw), law)
                    queue[at] = raw
                _tile_sums(grad[tile:end], weights, end - tile, unscale, low, high, seen[n])
                put(ring, stride, slots, slot, tile, end, grad, unscale)
                for i in range(end - tile):
                    grad[np.uint64(tile + i)] *= weights[i]

    return kernel


def weigh_(
    grads: Sequence[Tensor],
    queues: Sequence[Tensor],
    queued: Sequence[Tensor],
    accepted: Tensor | None,
    law: Law,
) -> Tensor:
    """Weight gradients in place and queue the raw ones; see ``protocol``."""
    statistics = torch.zeros(len(grads), 5, dtype=torch.float64)
    if not grads:
        return statistics
    table, unscale = table_of(grads, queues, queued), law.unscale
    turns = Turns(table, accepted, law, unscale)
    rest = turns.others
    if rest:
        statistics[rest] = eager.weigh_(
            chosen(grads, rest), chosen(queues, rest), chosen(queued, rest),
            None if accepted is None else accepted[rest], law,
        )  # fmt: skip
    if len(rest) == len(grads):
        return statistics
    used, kind, pieces = turns.used, table.kind, turns.pieces(table)
    kernel = _kernel(used, used == table.slots, table.in_bytes, kind)
    seen = np.zeros((len(pieces), 5))
    run_pieces(
        kernel, pieces, seen, table.rows, turns.slots, table.slots, table.code, kind(unscale),
        law_arguments(kind, law.rho, used),
    )  # fmt: skip
    np.add.at(statistics.numpy(), pieces[:, 0], seen)
    count_(table.rows, turns.act)
    return statistics
