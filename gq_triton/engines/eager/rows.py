"""The weighted sum of cluster means on the rows of a table that were looked up.

Shape legend: n = lookups, d = columns, V = rows of the table, U = touched rows, K = clusters.
"""

import torch
from torch import Tensor

from gq_triton.engines.eager.combine import combine
from gq_triton.law import Law

__all__ = ["combine_rows"]


def combine_rows(
    grads: Tensor,
    where: Tensor,
    labels: Tensor,
    queue: Tensor,
    queued: Tensor,
    law: Law,
    *,
    inverse_shares: Tensor,
    mixture: Tensor,
    sigma_scales: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight the cluster means of the touched rows; see ``protocol``. The host waits for U."""
    width, dtype = grads.shape[1], torch.promote_types(grads.dtype, torch.float32)
    counts = where < queue.shape[1] // width
    rows, place = where[counts].unique(return_inverse=True)
    shape = len(inverse_shares), len(rows), width
    sums = torch.zeros(shape, dtype=dtype, device=grads.device)
    sums.view(-1, width).index_add_(0, labels[counts] * len(rows) + place, grads[counts].to(dtype))
    part = queue.view(len(queue), -1, width).index_select(1, rows).flatten(1)
    values = combine(
        sums.flatten(1), part, queued, law, inverse_shares=inverse_shares, mixture=mixture,
        sigma_scales=sigma_scales,
    )  # fmt: skip
    weighted, raw = (
        torch.zeros(queue.shape[1] // width, width, dtype=dtype, device=grads.device).index_copy_(
            0, rows, value.view(-1, width)
        )
        for value in values[:2]
    )
    statistics = values[2].clone()
    statistics[0, 2] += queue.shape[1] - part.shape[1]
    return weighted, raw, statistics, torch.isfinite(raw).all()
