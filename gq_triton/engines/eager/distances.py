"""The squared distances that k-means compares, by one matrix product in plain torch.

Shapes: B points, F features, K clusters.
"""

import torch
from torch import Tensor

__all__ = ["cost", "nearest_centers", "row_norms"]


def row_norms(x: Tensor) -> Tensor:
    """Return the squared norms ``(N,)`` of the rows ``(N, F)``."""
    return torch.linalg.vector_norm(x, dim=1).square()  # pyright: ignore  (torch has no stub)


def cost(x: Tensor, points: Tensor) -> Tensor:
    """Return the squared distances ``(B, K)`` of x (B, F) to points (K, F), less x's norms."""
    return torch.addmm(row_norms(points), x, points.T, alpha=-2)


def nearest_centers(x: Tensor, centers: Tensor, distinct: Tensor) -> tuple[Tensor, Tensor]:
    """Return each point's nearest centre, the lowest of equally near ones, and its distance.

    Args:
        x: points ``(B, F)``, finite.
        centers: centres ``(K, F)`` in the type of x, finite.
        distinct: ``(K,)`` bool, at least one True. A centre whose entry is False gets no point.

    Returns:
        Labels ``(B,)`` int64 and squared distances ``(B,)``, at least 0.
    """
    costs = cost(x, centers).masked_fill_(~distinct, float("inf"))
    nearest, labels = costs.min(1)  # the first of equal minima
    return labels, (nearest + row_norms(x)).clamp_(min=0)
