"""The measurements of the last steps, and what they say together: ratios of sums, jackknifed.

A single step's noise scale is a ratio of two noisy numbers. So numerators and denominators are
added up over a window first. The jackknife leaves out one step at a time; it takes the steps for
independent, and does not see a drift within the window.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["COLUMNS", "Estimate", "History", "Measured", "Window", "ratio"]

# The figures of a parameter in one measured step: tr S and |G|**2, both unbiased; the two parts of
# F; and those of the lag share. What was not measured is NaN.
ROW = "step", "samples", "variance", "signal"
COLUMNS = "variance", "signal", "between", "within", "expected", "innovation"


class Measured(NamedTuple):
    """The measurement of one step.

    Attributes:
        step: number of the forward pass.
        samples: B, over all ranks.
        table: ``(N, 6)`` float64, a row per parameter with the figures of ``COLUMNS``.
        norms: norms of the groups' gradients on this process, ``(K,)``.
    """

    step: int
    samples: int
    table: Tensor
    norms: Tensor


class Estimate(NamedTuple):
    """A ratio of sums and its interval of 95 %; all NaN where nothing was measured."""

    value: float
    low: float
    high: float


NOTHING = Estimate(math.nan, math.nan, math.nan)


def ratio(numerators: Tensor, denominators: Tensor) -> Estimate:
    """Return a ratio of sums over steps, with its jackknife interval on a scale of logarithms.

    Args:
        numerators: ``(T,)`` float64; the sum of a variance's may be rounded below 0, which counts
            as 0.
        denominators: ``(T,)`` float64. Where their sum is not positive, the ratio is infinite.

    Returns:
        The ratio. With fewer than 3 steps, or where leaving one out changes the sign of a sum, the
        interval is from 0 to infinity.
    """
    steps = len(numerators)
    if not steps:
        return NOTHING
    top, bottom = numerators.sum(), denominators.sum()
    value = float(top.clamp(min=0) / bottom) if bottom > 0 else math.inf
    if math.isnan(value):
        return NOTHING
    tops, bottoms = top - numerators, bottom - denominators
    if value == 0 and bool((bottoms > 0).all()) and not bool(numerators.any()):
        return Estimate(0.0, 0.0, 0.0)
    if steps < 3 or not bool(((tops > 0) & (bottoms > 0)).all()) or not 0 < value < math.inf:
        return Estimate(value, 0.0, math.inf)
    logs = (tops / bottoms).log()
    error = float(((logs - logs.mean()).square().sum() * (steps - 1) / steps).sqrt())
    factor = math.exp(min(1.96 * error, 700.0))
    return Estimate(value, value / factor, value * factor)


class History:
    """The figures of a whole model in every step that was measured.

    Args:
        rows: those of a saved history: step, samples, variance, signal.
    """

    # Rows that may wait on the device.
    _MOST = 64

    def __init__(self, rows: Sequence[Sequence[float]] = ()) -> None:
        self._rows = [(int(row[0]), int(row[1]), *map(float, row[2:])) for row in rows]
        self._waiting: list[tuple[int, int, Tensor]] = []

    def add(self, step: int, samples: int, figures: Tensor) -> None:
        """Add a step; ``figures`` are ``tr S`` and ``|G|**2``, ``(2,)``."""
        self._waiting.append((step, samples, figures))
        if len(self._waiting) > self._MOST:
            self._settle()

    def rows(self) -> list[dict[str, float]]:
        """Return a row per step whose figures are finite."""
        self._settle()
        return [dict(zip(ROW, row, strict=True)) for row in self._rows]

    def _settle(self) -> None:
        waiting, self._waiting = self._waiting, []
        if waiting:
            figures = torch.stack([one for _, _, one in waiting]).tolist()
            self._rows += [
                (step, samples, *found)
                for (step, samples, _), found in zip(waiting, figures, strict=True)
                if all(map(math.isfinite, found))
            ]


class Window:
    """The last measurements of a model.

    Args:
        names: the names of the parameters, in the order of the rows.
        elements: how many elements each has.
        length: how many measurements are kept.
    """

    def __init__(self, names: Sequence[str], elements: Sequence[int], length: int) -> None:
        self.names, self._elements = list(names), torch.tensor(elements, dtype=torch.float64)
        self.measured: deque[Measured] = deque(maxlen=length)
        self._read: tuple[list[Measured], Tensor] | None = None

    def add(self, measured: Measured) -> None:
        """Add the measurement of a step; the oldest one goes."""
        self.measured.append(measured)
        self._read = None

    def clear(self) -> None:
        """Forget all measurements."""
        self.measured.clear()
        self._read = None

    def tables(self) -> tuple[list[Measured], Tensor]:
        """Return the measurements that count, and their tables ``(T, N, 6)`` on the CPU.

        Measurements of fewer parameters than the fullest one do not count, such as those of steps
        whose gradients overflowed.
        """
        if self._read is None:
            kept = list(self.measured)
            tables = [one.table for one in kept]
            stacked = torch.stack(tables).cpu() if tables else torch.empty(0, len(self.names), 6)
            known = stacked[:, :, :2].isfinite().all(dim=2).double() @ self._elements
            full = [row for row, share in enumerate(known.tolist()) if 0 < share == known.max()]
            self._read = [kept[row] for row in full], stacked[full]
        return self._read

    def known(self) -> list[bool]:
        """Return for each parameter whether it was measured."""
        tables = self.tables()[1]
        if not len(tables):
            return [False] * len(self.names)
        return tables[-1, :, :2].isfinite().all(dim=1).tolist()

    def totals(self) -> Tensor:
        """Return the sums over parameters, ``(T, 6)``: NaN where no parameter has a figure."""
        tables = self.tables()[1]
        sums = tables.nan_to_num(nan=0.0).sum(dim=1)
        return torch.where(tables.isnan().all(dim=1), torch.nan, sums)

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the measurements as tensors and plain values."""
        return [one._replace(table=one.table.cpu(), norms=one.norms.cpu())._asdict()
                for one in self.measured]  # fmt: skip

    def load_state_dict(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Load what ``state_dict`` returned."""
        self.clear()
        for one in saved:
            table, norms = (one[name].detach().clone() for name in ("table", "norms"))
            self.add(Measured(int(one["step"]), int(one["samples"]), table, norms))
