"""Metrics: the weights of the last step in numbers for the user."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["LastStep", "measures", "measures_by_name"]


class LastStep:
    """The statistics of the last step's weights, as the engines return them."""

    def __init__(self) -> None:
        # By the names of a batch: the rows of its statistics, and the parameter of each row.
        self._batches: dict[tuple[str, ...], tuple[list[Tensor], Sequence[str]]] = {}

    def keep(
        self, names: tuple[str, ...], statistics: Tensor | list[Tensor], owners: Sequence[str]
    ) -> None:
        """Keep the statistics of a batch; a parameter that comes again begins a new step.

        Args:
            names: the parameters of the batch.
            statistics: ``(N, 5)``, to be added up, or parts of it, which are joined when somebody
                asks for them.
            owners: the parameter of each row.
        """
        if any(not set(names).isdisjoint(batch) for batch in self._batches):
            self._batches.clear()
        parts = statistics if isinstance(statistics, list) else [statistics]
        self._batches[names] = parts, owners

    def shown(self) -> Callable[[], None]:
        """Return what makes the present step the last one again."""
        batches = dict(self._batches)

        def again() -> None:
            self._batches = dict(batches)

        return again

    def _tables(self) -> list[Tensor]:
        """Return the statistics of each batch in float64."""
        return [torch.cat(parts).double() for parts, _ in self._batches.values()]

    def names(self) -> set[str]:
        """Return the names of the parameters that have statistics."""
        return {name for names in self._batches for name in names}

    def total(self) -> Tensor:
        """Return the statistics of all parameters together, ``(1, 5)`` float64."""
        sums = torch.stack([table.sum(dim=0) for table in self._tables()])
        return sums.sum(dim=0, keepdim=True)

    def table(self, names: Sequence[str]) -> Tensor:
        """Return the statistics of each parameter, ``(N, 5)`` float64."""
        place = {name: row for row, name in enumerate(names)}
        parts = self._tables()
        rows = [place[owner] for _, owners in self._batches.values() for owner in owners]
        device = parts[0].device
        index = torch.tensor(rows, dtype=torch.int64, device=device)
        table = torch.zeros(len(names), 5, dtype=torch.float64, device=device)
        return table.index_add_(0, index, torch.cat([part.to(device) for part in parts]))

    def clear(self) -> None:
        """Forget the last step."""
        self._batches.clear()


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
