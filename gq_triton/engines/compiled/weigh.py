"""The weighting of gradients in place, and the queueing of the raw ones.

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
    sums,
    weight_of,
)
from gq_triton.engines.compiled.threads import Job, chunks, count_, run
from gq_triton.engines.eager.law import Turn, flags
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
def _weigh_kernel(used: int, narrow: bool) -> Callable[..., Any]:
    weight, (open_tile, compared, put) = weight_of(used), ring_of(narrow)

    @exact()
    def kernel(start, stop, ring, stride, slots, slot, grad, unscale, out, law):
        low, high = law[0], law[1]
        weights = np.empty(TILE, grad.dtype)
        for tile in range(start, stop, TILE):
            count = min(TILE, stop - tile)
            rows, width, origin = open_tile(ring, stride, slots, tile, tile + count)
            for i in range(count):
                x = compared(grad[np.uint64(tile + i)] * unscale)
                at = np.uint64(tile + i - origin)
                weights[i] = weight(rows, width, slots, slot, at, x, law)
            _tile_sums(grad[tile : tile + count], weights, count, unscale, low, high, out)
            put(ring, stride, slots, slot, tile, tile + count, grad, unscale)
            for i in range(count):
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
    unscale, accept = law.unscale, flags(accepted, len(grads))
    jobs: list[Job] = []
    counters: list[Tensor] = []
    partials: list[tuple[int, list[Any]]] = []
    for index, (grad, queue) in enumerate(zip(grads, queues, strict=True)):
        turn = Turn(queue, queued[index], accept[index], law)
        if not fuses(turn, unscale, queue, grad):
            one = slice(index, index + 1)
            own = None if accepted is None else accepted[one]
            statistics[one] = eager.weigh_(grads[one], queues[one], queued[one], own, law)
            continue
        kind = DTYPES[grad.dtype]
        used = len(turn.rows)
        kernel = _weigh_kernel(used, in_bytes(queue))
        bounds = law_arguments(kind, law.rho, used)
        ring, g = ring_arguments(turn, queue), grad.numpy()
        sums = [np.zeros(5) for _ in chunks(grad.numel())]
        partials.append((index, sums))
        for out, (start, stop) in zip(sums, chunks(grad.numel()), strict=True):
            jobs.append(partial(kernel, start, stop, *ring, g, kind(unscale), out, bounds))
        counters.append(queued[index])
    run(jobs)
    count_(counters)
    for index, sums in partials:
        statistics[index] = torch.from_numpy(np.sum(sums, axis=0))
    return statistics
