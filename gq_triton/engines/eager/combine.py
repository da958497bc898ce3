"""The weighted sum of cluster means.

Shape legend: K = clusters, L = queue slots, P = elements of one parameter.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gq_triton.engines.eager.law import Turn, blocks
from gq_triton.engines.eager.statistics import statistics_missing
from gq_triton.law import Law, Spread, compute_type, to_queue
from gq_triton.ring import flat, rows

__all__ = ["combine", "combine_all"]


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
    rho, unscale = law.rho, law.unscale
    spread_of = _spreads(queue, queued, math.isfinite(sums.sum()), law)
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


def combine_all(
    sums: Sequence[Tensor],
    queues: Sequence[Tensor],
    queued: Sequence[Tensor],
    weighted: Sequence[Tensor],
    raw: Sequence[Tensor],
    law: Law,
    *,
    inverse_shares: Tensor,
    mixture: Tensor,
    sigma_scales: Tensor,
) -> tuple[list[Tensor], Tensor]:
    """Weight the cluster means of parameters one after the other; see ``protocol``."""
    tables = []
    for part, queue, count, out, mean in zip(sums, queues, queued, weighted, raw, strict=True):
        part = part.view(len(inverse_shares), -1) if part.dim() == 1 else rows(part)
        values = combine(
            part, queue, count, law, inverse_shares=inverse_shares, mixture=mixture,
            sigma_scales=sigma_scales, into=(torch.empty_like(mean), mean),
        )  # fmt: skip
        flat(out).copy_(values[0])
        tables.append(values[2])
    return tables, torch.stack([torch.isfinite(mean).all() for mean in raw])


def _spreads(
    queue: Tensor, queued: Tensor | None, finite: bool, law: Law
) -> Callable[[Tensor, torch.dtype], Spread | None]:
    """Return the function from a block of ``queue`` to its spread, or to None for weights of 1."""
    if queued is not None:
        return Turn(queue, queued, finite, law).spread
    if finite and law.rho != 1.0 and not statistics_missing(queue):
        return lambda block, dtype: Spread.known(*block.to(dtype))
    return lambda block, dtype: None
