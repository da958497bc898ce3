"""From per-sample losses to the gradients that the optimizer gets, one class per kind of law."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gq_triton import GradQueue
from gq_triton.cluster_grad.clusters import OUTPUT_GRADIENT
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
