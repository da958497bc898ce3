"""Squared distances by one product, in plain torch: what k-means compares.

Shapes: B points, F features, K clusters.
"""

import torch
from torch import Tensor

__all__ = ["cost", "nearest_centers", "row_norms"]


def row_norms(x: Tensor) -> Tensor:
    """``(N, F)`` -> ``(N,)`` squared norms."""
    return torch.linalg.vector_norm(x, dim=1).square()  # pyright: ignore  (torch has no stub)


def cost(x: Tensor, points: Tensor) -> Tensor:
    """``(B, F), (K, F)`` -> ``(B, K)`` squared distances less the squared norms of x."""
    return torch.addmm(row_norms(points), x, points.T, alpha=-2)


def nearest_centers(x: Tensor, centers: Tensor, distinct: Tensor) -> tuple[Tensor, Tensor]:
    """Return each point's nearest cluster, the lowest of equally near ones, and how far it is.

    Args:
        x: ``(B, F)`` points, finite.
        centers: ``(K, F)`` in the type of x; finite.
        distinct: ``(K,)`` bool, at least one True: a centre that is False gets no point.

    Returns:
        Labels ``(B,)`` int64 and squared distances ``(B,)``, at least 0.
    """
    costs = cost(x, centers).masked_fill_(~distinct, float("inf"))
    nearest, labels = costs.min(1)  # the first of equal minima
    return labels, (nearest + row_norms(x)).clamp_(min=0)
