"""Metrics: the weights of the last step in numbers for the user."""

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["measures", "measures_by_name"]


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
    *sums, used = torch.cat([total, length]).tolist()
    return {**_shares(sums, elements), "effective_length": used}


def measures_by_name(table: Tensor, elements: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """Return what the law did with each parameter, in one transfer to the host.

    Args:
        table: ``(N, 5)``, the sums of ``measures``, one row per parameter.
        elements: by name, how many elements each has; none is empty.

    Returns:
        By name, the figures of ``measures`` without the effective length, which all share.
    """
    rows = table.tolist()
    return {
        name: _shares(sums, count)
        for (name, count), sums in zip(elements.items(), rows, strict=True)
        if count
    }


def _shares(sums: list[float], elements: int) -> dict[str, float]:
    raw, weighted, weight, high, low = sums
    return {
        "mean_weight": weight / elements,
        "norm_ratio": (weighted / raw) ** 0.5 if raw > 0 else 1.0,
        "saturated_high": high / elements,
        "saturated_low": low / elements,
    }
