"""The weighted sum of cluster means.

Shape legend: K = clusters, L = queue slots, P = elements of one parameter.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gq_triton.engines import eager
from gq_triton.engines.compiled.law import (
    DTYPES,
    exact,
    exact_scale,
    law_arguments,
    spread_of,
    sums,
)
from gq_triton.engines.compiled.threads import chunks, run
from gq_triton.engines.eager.law import Turn
from gq_triton.engines.eager.statistics import statistics_missing
from gq_triton.law import Law

__all__ = ["combine"]

# Elements whose statistics, sums and results stay in L1 while the clusters pass.
TILE = 512


@exact()
def _known(statistics, stride, slots, slot, j, oldest, law):
    """Return the result of ``spread_of``, from the stored mean and 1 / sigma."""
    one = law[2]
    return statistics[j], one - one, statistics[np.uint64(stride) + j], one


@cache
def _combine_kernel(used: int) -> Callable[..., Any]:
    """Return the compiled loop of ``combine``; with ``used`` 0 the ring holds statistics."""
    spread = spread_of(used) if used else _known

    @exact()
    def kernel(
        start, stop, ring, stride, slots, slot, sums, unscale, clusters, raw, out, seen, law
    ):
        low, high, one = law[0], law[1], law[2]
        inverse, portion, narrower, population = clusters
        room = np.empty((5, TILE), sums.dtype)
        # Indexed, not unpacked: Numba would not know that those rows are contiguous.
        base, mean, shrink, rate, weights = room[0], room[1], room[2], room[3], room[4]
        for tile in range(start, stop, TILE):
            end = min(tile + TILE, stop)
            count = end - tile
            total, result = raw[tile:end], out[tile:end]
            for i in range(count):
                j = np.uint64(tile + i)
                base[i], mean[i], shrink[i], sigma = spread(
                    ring, stride, slots, slot, j, law[2], law
                )
                rate[i] = one / sigma
            total[:] = 0
            result[:] = 0
            tile_of = base[:count], mean[:count], shrink[:count], rate[:count]
            for k in range(sums.shape[0]):
                if population[k] == 0:
                    continue
                part, seen_by = sums[k, tile:end], weights[:count]
                _weigh(part, tile_of, inverse[k], unscale, narrower[k], low, high, seen_by)
                _add(part, seen_by, inverse[k], portion[k], total, result)
                _weight_sums(seen_by, low, high, population[k], seen)
            _square_sums(total, result, unscale, seen)

    return kernel


# Separate loops over few arrays each: with more the compiler cannot tell that none overlap.
@exact()
def _weigh(part, statistics, invert, unscale, narrow, low, high, weights):
    base, mean, shrink, rate = statistics
    for i in range(weights.size):
        c = part[i] * invert
        # shrink * rate would overflow for a constant queue, and 0 * inf is NaN.
        z = ((abs((c * unscale - base[i]) - mean[i]) * shrink[i]) * rate[i]) * narrow
        weights[i] = min(max(z, low), high)


@exact()
def _add(part, weights, invert, portion, total, result):
    for i in range(weights.size):
        total[i] += part[i]
        result[i] += portion * (weights[i] * (part[i] * invert))


@sums()
def _weight_sums(weights, low, high, population, out):
    zero = total = at_high = at_low = weights[0] - weights[0]
    one = low / low
    for i in range(weights.size):
        total += weights[i]
        at_high += one if weights[i] >= high else zero
        at_low += one if weights[i] <= low else zero
    share = np.float64(population)
    out[2] += share * total
    out[3] += share * at_high
    out[4] += share * at_low


@sums()
def _square_sums(raw, weighted, unscale, out):
    a = b = 0.0
    for i in range(raw.size):
        r, w = np.float64(raw[i]) * unscale, np.float64(weighted[i]) * unscale
        a += r * r
        b += w * w
    out[0] += a
    out[1] += b


def combine(
    sums: Tensor,
    queue: Tensor,
    queued: Tensor | None,
    law: Law,
    *,
    inverse_shares: Tensor,
    mixture: Tensor,
    sigma_scales: Tensor,
    into: tuple[Tensor, Tensor] | None = None,
    queue_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight the cluster means of one parameter and add them up; see ``protocol``."""
    used, slot = _used(queue, queued, law)
    unscale = law.unscale
    types = {sums.dtype, queue.dtype, queue_dtype or queue.dtype}
    known = sums.dtype in DTYPES and len(types) == 1
    dense = sums.is_contiguous() and queue.stride(1) == 1
    weighted, raw = into or (torch.empty_like(sums[0]), torch.empty_like(sums[0]))
    into = weighted, raw

    def plain() -> tuple[Tensor, Tensor, Tensor]:
        return eager.combine(
            sums, queue, queued, law, inverse_shares=inverse_shares, mixture=mixture,
            sigma_scales=sigma_scales, into=into, queue_dtype=queue_dtype,
        )  # fmt: skip

    if not (known and dense and exact_scale(unscale) and used is not None and sums.numel()):
        return plain()
    kind = DTYPES[sums.dtype]
    occupied = inverse_shares > 0
    population = torch.where(occupied, 1.0 / inverse_shares, 0.0)
    population = population / population.sum()
    clusters = tuple(
        values.to(sums.dtype).numpy()
        for values in (inverse_shares, mixture, 1.0 / sigma_scales, population)
    )
    # A part of a ring: rows keep the distance they have in the whole.
    stride, slots = queue.stride(0), queue.shape[0]
    ring = queue.as_strided(((slots - 1) * stride + queue.shape[1],), (1,)).numpy()
    kernel, bounds = _combine_kernel(used), law_arguments(kind, law.rho, max(used, 1))
    views = sums.numpy(), kind(unscale), clusters, raw.numpy(), weighted.numpy()
    pieces = chunks(sums.shape[1])
    seen = [np.zeros(5) for _ in pieces]
    run(
        [
            partial(kernel, start, stop, ring, stride, slots, slot, *views, out, bounds)
            for (start, stop), out in zip(pieces, seen, strict=True)
        ]
    )
    statistics = np.sum(seen, axis=0)
    # An element that is not finite in any cluster makes this sum of squares not finite either.
    if not math.isfinite(statistics[0]):
        return plain()
    return weighted, raw, torch.from_numpy(statistics)[None]


def _used(queue: Tensor, queued: Tensor | None, law: Law) -> tuple[int | None, int]:
    """Return the number of rows (0 for statistics, None where weights are 1) and the slot."""
    if queued is not None:
        turn = Turn(queue, queued, True, law)
        return len(turn.rows) or None, turn.slot or 0
    return (None if law.rho == 1.0 or statistics_missing(queue) else 0), 0
