"""The mean over the ranks of the losses that feed the effective length."""

import warnings

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["MeanLoss"]


class MeanLoss:
    """The mean over all ranks of the losses that they have recorded since the last step.

    A rank may record several losses (micro-batches) or none (a rank that has joined). Losses stay
    on their device, so that on a GPU the host waits for none of them.
    """

    def __init__(self) -> None:
        self._recorded: list[Tensor] = []
        self._warned = False
        self._pending: tuple[dist.Work, Tensor] | None = None
        self._due = False

    def record(self, loss: Tensor | float) -> None:
        """Keep a loss of this rank, one number, until the next step's mean is formed."""
        value = torch.as_tensor(loss).detach().reshape(())
        self._recorded.append(value.to(torch.float64, copy=True))
        self._warned = True

    def reset(self) -> None:
        """Forget the recorded losses and a mean that nobody has taken."""
        self._recorded = []
        self._due = False

    def start(self, device: torch.device, group: dist.ProcessGroup | None) -> None:
        """Start to average the losses recorded since the last step; every rank must call."""
        if not self._warned:
            self._warned = True
            warnings.warn(
                "loss_window is set but no loss was recorded, so the effective length stays at "
                "min_queue_length: call state.record_loss(loss) before loss.backward()",
                stacklevel=2,
            )
        total = torch.zeros(2, dtype=torch.float64, device=device)
        for loss in self._recorded:
            total[0].add_(loss.to(device, non_blocking=True))
            total[1].add_(1)
        self._recorded = []
        work = dist.all_reduce(total, group=group, async_op=True)
        assert work is not None
        # The tensor is kept until the next step, because another stream reads it.
        self._pending = work, total
        self._due = True

    def take(self) -> Tensor | None:
        """Return the mean that was started, 0-d, and forget it; None where there is none."""
        mean = self.peek()
        self._due = False
        return mean

    def peek(self) -> Tensor | None:
        """Return the mean that ``take`` will return, 0-d, and keep it; None where there is none."""
        if self._pending is None or not self._due:
            return None
        work, total = self._pending
        # The reduction was started before any bucket's: no thread that finishes it waits for the
        # caller.
        work.wait()
        return total[0] / total[1]
