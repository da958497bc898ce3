"""What the samples of each rank count in a bucket's gradients, parameter by parameter."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gq_triton.queues import in_use

__all__ = ["Shares"]


class Shares:
    """This rank's share among all ranks in the gradient of each parameter of a bucket.

    A share is the rank's mass over the mass of all ranks. Nobody waits for that sum: each rank
    multiplies its gradient by its mass in a unit that all ranks know, and the added gradients are
    corrected by ``unit / sum``. That factor is 1 unless the ranks' gradients go back to forward
    passes of several sizes. Column 0 is for weighted gradients, column 1 for raw ones.

    Args:
        names: the parameters.
        mine: this rank's masses ``(N, 2)`` float64.
        unit: the unit ``(2,)``, positive, the same on all ranks.
        group: the ranks, all of which must build it.
    """

    def __init__(
        self, names: Sequence[str], mine: Tensor, unit: Tensor, group: dist.ProcessGroup | None
    ) -> None:
        self._rows = {name: row for row, name in enumerate(names)}
        self._mine, self._unit, self._sum = mine, unit, mine.clone()
        self._work = dist.all_reduce(self._sum, group=group, async_op=True)

    def given(self, column: int) -> dict[str, Tensor]:
        """Return by name what this rank's gradients are multiplied by before they are added up."""
        factors = (self._mine[:, column] / self._unit[column]).unbind()
        return dict(zip(self._rows, factors, strict=True))

    def correct_(self, names: Sequence[str], grads: Sequence[Tensor], column: int) -> None:
        """Multiply added gradients by what makes them means, in place.

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
        for row, grad in zip(rows, grads, strict=True):
            grad.mul_(factors[row].to(grad.dtype))

    def own(self, name: str) -> Tensor:
        """Return this rank's share in a parameter's weighted and raw gradient, ``(2,)``."""
        mine, total = self._mine[self._rows[name]], self._total()[self._rows[name]]
        return torch.where(total > 0, mine / total, 0.0)

    def _total(self) -> Tensor:
        if self._work is not None:
            # Started before the bucket's reduction: waits for no thread that waits for the caller.
            self._work.wait()
            self._work = None
            in_use(self._mine, self._unit, self._sum)
        return self._sum
