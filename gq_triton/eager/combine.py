"""Cluster means, weighted and added up.

Shape legend: K = clusters, L = queue slots, P = elements of one parameter.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gq_triton.eager.law import Spread, Turn, blocks, compute_type, to_queue

__all__ = ["combine", "queue_statistics", "statistics_missing"]


def queue_statistics(
    queue: Tensor,
    queued: Tensor,
    out: Tensor,
    *,
    length: Tensor | None = None,
) -> None:
    """Write what ``combine`` needs to know of a ring: its mean and 1 / sigma.

    The mean is rounded once, to the type of ``out``. For a constant queue it is exact, and
    1 / sigma is the largest number of that type: z is 0 where a gradient equals it.

    Args:
        queue: the ring ``(L, P)``, read only.
        queued: gradients queued so far, 0-d int64; below L 1 / sigma is NaN: every weight is 1.
        out: ``(2, P)``, float32, or float64 where gradients or ring are float64.
        length: effective length, 0-d int64, or None for L.
    """
    turn = Turn(queue, queued, True, math.inf, length)
    if not turn.rows:
        out.fill_(math.nan)
        return
    for ring, center, rate in blocks(queue, out[0], out[1]):
        spread = turn.spread(ring, out.dtype)
        assert spread is not None
        torch.add(spread.base, spread.mean, out=center)
        torch.div(spread.inverse, spread.sigma, out=rate).clamp_(max=torch.finfo(out.dtype).max)


def combine(
    sums: Tensor,
    queue: Tensor,
    queued: Tensor | None,
    *,
    inverse_shares: Tensor,
    mixture: Tensor,
    sigma_scales: Tensor,
    rho: float,
    length: Tensor | None = None,
    grad_scale: Tensor | None = None,
    into: tuple[Tensor, Tensor] | None = None,
    queue_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight the cluster means of one parameter and add them up: ``sum_k P_k w(c_k) c_k``.

    Args:
        sums: ``(K, P)``, gradients summed over each cluster's samples; ``c_k = sums_k / share_k``.
        queue: the ring ``(L, P)``, read only; or ``(2, P)``, what ``queue_statistics`` wrote.
        queued: gradients queued so far, 0-d int64; below L every weight is 1. None says that
            ``queue`` holds statistics.
        inverse_shares: ``(K,)`` float64, ``1 / share_k``; 0 for an empty cluster.
        mixture: ``(K,)`` float64, ``P_k``.
        sigma_scales: ``(K,)`` float64, what sigma is multiplied by for cluster k.
        rho: bound of the weight.
        length: effective length, 0-d int64, or None for L; statistics have theirs.
        grad_scale: the loss scale the sums carry, 0-d, or None.
        into: where to write the weighted and the raw gradient, ``(P,)`` each; None allocates.
        queue_dtype: type of the ring that statistics are of.

    Returns:
        The weighted gradient ``(P,)`` and the raw one ``(P,)``, both with the loss scale and in the
        type of ``sums``; and ``(C, 5)`` float64, one row per part of the work (here one), whose sum
        is as in ``weigh_``, the last three averaged over the clusters by population.
    """
    unscale = 1.0 if grad_scale is None else 1.0 / float(grad_scale)
    spread_of = _spreads(queue, queued, math.isfinite(sums.sum()), rho, length)
    dtype, stored_as = compute_type(sums, queue), queue_dtype or queue.dtype
    inverse, portion, scale = inverse_shares.tolist(), mixture.tolist(), sigma_scales.tolist()
    clusters = [k for k, value in enumerate(inverse) if value > 0]
    whole = sum(1.0 / inverse[k] for k in clusters)
    weighted, raw = into or (torch.empty_like(sums[0]), torch.empty_like(sums[0]))
    statistics = torch.zeros(5, dtype=torch.float64, device=sums.device)
    for g, total, ring, out in blocks(sums, raw, queue, weighted):
        torch.sum(g, dim=0, out=total)
        spread = spread_of(ring, dtype)
        result = torch.zeros_like(total, dtype=dtype)
        for k in clusters:
            centroid = g[k].to(dtype) * inverse[k]
            population = 1.0 / (inverse[k] * whole)
            if spread is None:
                statistics[2] += population * total.numel()
                result.add_(centroid, alpha=portion[k])
                continue
            stored = to_queue(centroid * unscale, stored_as).to(dtype)
            weights = spread.weight(stored, rho, scale[k])
            result.add_(centroid.mul_(weights), alpha=portion[k])
            statistics[2] += population * weights.sum(dtype=torch.float64)
            statistics[3] += population * (weights == rho).sum(dtype=torch.float64)
            statistics[4] += population * (weights == 1.0 / rho).sum(dtype=torch.float64)
        out.copy_(result)
        statistics[0] += total.double().square().sum() * unscale**2
        statistics[1] += result.double().square().sum() * unscale**2
    return weighted, raw, statistics[None]


def _spreads(
    queue: Tensor, queued: Tensor | None, finite: bool, rho: float, length: Tensor | None
) -> Callable[[Tensor, torch.dtype], Spread | None]:
    """Return what gives a block of a ring, or of statistics, its spread; None: weights are 1."""
    if queued is not None:
        return Turn(queue, queued, finite, rho, length).spread
    if finite and rho != 1.0 and not statistics_missing(queue):
        return lambda block, dtype: Spread.known(*block.to(dtype))
    return lambda block, dtype: None


def statistics_missing(statistics: Tensor) -> bool:
    """Return whether ``queue_statistics`` found too few gradients: it then does everywhere."""
    return bool(statistics[1, :1].isnan().any())
