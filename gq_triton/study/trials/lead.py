"""The control ``lead``: a lead of the gradient in the momentum, without any weights."""

from collections import deque

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["Lead"]


class Lead:
    """The backward pass of a momentum of ``g + (g - mu)``; mu is the mean of the last gradients.

    Adam's second moment stays that of ``g``. If it had the lead too, the difference ``g - mu``,
    most of which is noise, would shorten every step. Until the queue is full there is no lead, as
    Grad Queue has no weights then.

    Args:
        model: the model.
        optimizer: torch's SGD or AdamW over its parameters.
        queue_length: gradients whose mean is ``mu``.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, queue_length: int) -> None:
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = optimizer
        self.rings: list[deque[Tensor]] = [deque(maxlen=queue_length) for _ in self.params]
        self.norm_ratio = 1.0

    def backward(self, outputs: Tensor, losses: Tensor, labels: Tensor) -> None:
        """Leave the gradients in ``p.grad`` and the lead in the momentum; see ``Backward``."""
        losses.mean().backward()
        before = after = 0.0
        for param, ring in zip(self.params, self.rings, strict=True):
            raw = param.grad
            assert raw is not None
            ahead = raw
            if len(ring) == ring.maxlen:
                lead = raw - torch.stack(tuple(ring)).mean(dim=0)
                ahead = raw + lead
                self._add(param, raw, lead)
            before += raw.double().square().sum().item()
            after += ahead.double().square().sum().item()
            ring.append(raw.clone())  # a copy: an optimizer may write into p.grad
        self.norm_ratio = (after / before) ** 0.5 if before > 0 else 1.0

    def _add(self, param: Tensor, raw: Tensor, lead: Tensor) -> None:
        """Make the next step add the lead to the momentum as it adds the raw gradient."""
        state = self.optimizer.state[param]
        if "exp_avg" not in state:
            param.grad = raw + lead  # SGD has no second moment
            return
        # AdamW's step turns the momentum m into beta1 m + (1 - beta1) g.
        beta1, _ = self.optimizer.param_groups[0]["betas"]
        state["exp_avg"].add_(lead, alpha=(1 - beta1) / beta1)

    def metrics(self) -> dict[str, float]:
        """Return the norm of the gradients with their lead over that of the raw ones."""
        return {"norm_ratio": self.norm_ratio}
