"""The statistics of a ring, stored for operations that do not read the ring.

Shape legend: L = queue slots, P = elements of one parameter.
"""

import math

import torch
from torch import Tensor

from gq_triton.engines.eager.law import Turn, blocks
from gq_triton.law import Law

__all__ = ["queue_statistics", "statistics_missing"]


def queue_statistics(
    queue: Tensor, queued: Tensor, out: Tensor, *, length: Tensor | None = None
) -> None:
    """Write a ring's mean and 1 / sigma; see ``protocol``."""
    turn = Turn(queue, queued, True, Law(math.inf, length))
    if not turn.rows:
        out.fill_(math.nan)
        return
    for ring, center, rate in blocks(queue, out[0], out[1]):
        spread = turn.spread(ring, out.dtype)
        assert spread is not None
        torch.add(spread.base, spread.mean, out=center)
        torch.div(spread.inverse, spread.sigma, out=rate).clamp_(max=torch.finfo(out.dtype).max)


def statistics_missing(statistics: Tensor) -> bool:
    """Return whether ``queue_statistics`` found too few gradients, and so wrote NaN everywhere."""
    return bool(statistics[1, :1].isnan().any())
