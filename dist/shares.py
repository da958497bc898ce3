"""The shares of the ranks in a bucket's gradients, by their samples, parameter by parameter."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gq_triton.ring import in_use

__all__ = ["Shares"]


class Shares:
    """This rank's share among all ranks in the gradient of each parameter of a bucket.

    A rank's mass is what its samples count in a gradient, and its share is its mass over the mass
    of all ranks. No rank waits for that sum before it sends a gradient: it multiplies the gradient
    by its mass over a unit that all ranks know, and the added gradients are multiplied by ``unit /
    sum``. The second factor is 1 unless the ranks' gradients go back to forward passes of several
    sizes. Column 0 is for weighted gradients, column 1 for raw ones.

    Args:
        names: the names of the parameters.
        mine: this rank's masses ``(N, 2)`` float64.
        unit: the unit ``(2,)``, positive, the same on all ranks.
        group: the process group, every rank of which must build its object.
    """

    def __init__(
        self, names: Sequence[str], mine: Tensor, unit: Tensor, group: dist.ProcessGroup | None
    ) -> None:
        self._rows = {name: row for row, name in enumerate(names)}
        self._mine, self._unit, self._sum = mine, unit, mine.clone()
        self._work = dist.all_reduce(self._sum, group=group, async_op=True)
        self._own: Tensor | None = None

    def given(self, column: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return by name the factors, 0-d, for this rank's gradients before the addition."""
        factors = (self._mine[:, column] / self._unit[column]).to(dtype).unbind()
        return dict(zip(self._rows, factors, strict=True))

    def correct_(self, names: Sequence[str], grads: Sequence[Tensor], column: int) -> None:
        """Make means of gradients that were added up over the ranks, in place.

        Args:
            names: parameters of the bucket.
            grads: their gradients, or parts of them, added up over the ranks.
            column: 0 where they are weighted, 1 where they are raw.
        """
        rows = [self._rows[name] for name in names]
        total = self._total()[:, column]
        factors = torch.where(total > 0, self._unit[column] / total, 1.0)
        if factors.device.type == "cpu" and bool((factors == 1).all()):
            return
        typed = {dtype: factors.to(dtype) for dtype in {grad.dtype for grad in grads}}
        for row, grad in zip(rows, grads, strict=True):
            grad.mul_(typed[grad.dtype][row])

    def own(self, name: str) -> Tensor:
        """Return this rank's share in a parameter's weighted and raw gradient, ``(2,)``."""
        if self._own is None:
            total = self._total()
            self._own = torch.where(total > 0, self._mine / total, 0.0)
        return self._own[self._rows[name]]

    def _total(self) -> Tensor:
        if self._work is not None:
            # This reduction was started before the bucket's: no thread that finishes it waits for
            # the caller.
            self._work.wait()
            self._work = None
            in_use(self._mine, self._unit, self._sum)
        return self._sum
