"""From per-sample losses to the gradients that the optimizer gets, one class per kind of law."""

from collections import deque
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gq_triton import GradQueue
from gq_triton.cluster_grad import OUTPUT_GRADIENT
from gq_triton.study.altered import AlteredWeights
from gq_triton.study.arms import Law
from gq_triton.study.grouping import Grouping

__all__ = ["Backward", "Measured", "build_law"]

Measured = dict[str, float]


class Backward(Protocol):
    """What turns losses into gradients."""

    def backward(self, outputs: Tensor, losses: Tensor, labels: Tensor) -> None:
        """Leave the gradients for the optimizer in ``p.grad``.

        Args:
            outputs: of the model.
            losses: ``(B,)``, whose mean is minimised.
            labels: of the samples.
        """
        ...

    def metrics(self) -> Measured:
        """Return what was done to the last gradient; empty if nothing."""
        ...


def build_law(
    law: Law, model: nn.Module, optimizer: Optimizer, features: str, seed: int
) -> Backward:
    """Return the backward pass of a law.

    Args:
        law: which.
        model: whose gradients.
        optimizer: that gets them.
        features: name of the submodule that describes a sample.
        seed: of random clusters and permutations; the global generator is left alone.
    """
    if law.kind == "none":
        return _Plain()
    if law.kind == "lead":
        return _Lead(model, optimizer, law.queue_length)
    generator = torch.Generator().manual_seed(seed)
    if law.by_output:
        features = OUTPUT_GRADIENT
    if law.kind == "queue":
        return _Queued(law, model, optimizer, features, generator)
    return AlteredWeights(law, model, features, generator)


class _Plain:
    def backward(self, outputs: Tensor, losses: Tensor, labels: Tensor) -> None:
        losses.mean().backward()

    def metrics(self) -> Measured:
        return {}


class _Lead:
    """The momentum of ``g + (g - mu)``, with ``mu`` the mean of the last gradients; no weights.

    Adam's second moment is that of ``g``: else the difference, most of it noise, would also make
    every step shorter. Until the queue is full the momentum is that of ``g``, as with Grad Queue.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, queue_length: int) -> None:
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = optimizer
        self.rings: list[deque[Tensor]] = [deque(maxlen=queue_length) for _ in self.params]
        self.norm_ratio = 1.0

    def backward(self, outputs: Tensor, losses: Tensor, labels: Tensor) -> None:
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
            ring.append(raw.clone())  # an optimizer may write into p.grad
        self.norm_ratio = (after / before) ** 0.5 if before > 0 else 1.0

    def _add(self, param: Tensor, raw: Tensor, lead: Tensor) -> None:
        """Make the next step's momentum that of the raw gradient plus its lead."""
        state = self.optimizer.state[param]
        if "exp_avg" not in state:
            param.grad = raw + lead
            return
        # The step multiplies by beta1 before it adds (1 - beta1) g.
        beta1, _ = self.optimizer.param_groups[0]["betas"]
        state["exp_avg"].add_(lead, alpha=(1 - beta1) / beta1)

    def metrics(self) -> Measured:
        return {"norm_ratio": self.norm_ratio}


class _Queued:
    """Grad Queue's plug-in."""

    def __init__(
        self,
        law: Law,
        model: nn.Module,
        optimizer: Optimizer,
        features: str,
        generator: torch.Generator,
    ) -> None:
        clusters: dict[str, Any] = {}
        self.labels: Grouping | None = None
        if law.n_clusters is not None:
            self.labels = Grouping(law, generator)
            clusters = {
                "n_clusters": law.n_clusters,
                "features": features,
                "clusterer": self.labels,
                "population_power": law.population_power,
                "centroid_scale": law.centroid_scale,
            }
        self.adaptive = law.loss_window is not None
        self.queue = GradQueue(
            model,
            rho=law.rho,
            queue_length=law.queue_length,
            loss_window=law.loss_window,
            match_norm=law.match_norm,
            **clusters,
        )
        self.queue.attach(optimizer)

    def backward(self, outputs: Tensor, losses: Tensor, labels: Tensor) -> None:
        if self.labels is not None:
            self.labels.batch_labels = labels
        loss = losses.mean()
        if self.adaptive:
            self.queue.record_loss(loss.detach())
        loss.backward()

    def metrics(self) -> Measured:
        names = "mean_weight", "norm_ratio", "saturated_high", "saturated_low", "effective_length"
        measured = self.queue.metrics()
        return {name: float(measured[name]) for name in names if name in measured}
