"""Metrics: the weights of the last step in numbers for the user."""

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["added", "measures"]


def added(statistics: Iterable[Tensor]) -> Tensor:
    """Return the sum ``(5,)`` float64 of tables ``(N, 5)`` of an engine's statistics."""
    return torch.stack([table.double().sum(dim=0) for table in statistics]).sum(dim=0)


def measures(total: Tensor, elements: int, length: Tensor | int) -> dict[str, float]:
    """Return what the law did, in one transfer to the host.

    Args:
        total: ``(5,)``, sums over all elements: g^2, (w g)^2, w, weights at rho and at 1/rho.
        elements: how many elements were weighted.
        length: effective length, 0-d or a number.

    Returns:
        ``mean_weight``; ``norm_ratio``, ``|g*| / |g|``; ``saturated_high`` and ``saturated_low``,
        shares of elements at rho and at 1/rho; ``effective_length``.
    """
    length = torch.as_tensor(length, device=total.device).reshape(1)
    raw, weighted, weight, high, low, used = torch.cat([total, length]).tolist()
    return {
        "mean_weight": weight / elements,
        "norm_ratio": (weighted / raw) ** 0.5 if raw > 0 else 1.0,
        "saturated_high": high / elements,
        "saturated_low": low / elements,
        "effective_length": used,
    }
