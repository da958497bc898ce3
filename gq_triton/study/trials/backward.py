"""The backward pass of a trial: from losses to the gradients that the optimizer gets."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gq_triton import GradQueue
from gq_triton.options import OUTPUT_GRADIENT
from gq_triton.study.design.law import StudyLaw
from gq_triton.study.design.trial import SERIES
from gq_triton.study.trials.altered import AlteredWeights
from gq_triton.study.trials.clusterer import StudyClusterer
from gq_triton.study.trials.lead import Lead

__all__ = ["Backward", "Measured", "build_backward"]

Measured = dict[str, float]


class Backward(Protocol):
    """The backward pass of one law."""

    def backward(self, outputs: Tensor, losses: Tensor, labels: Tensor) -> None:
        """Leave the gradients for the optimizer in ``p.grad``.

        Args:
            outputs: outputs of the model.
            losses: ``(B,)``, whose mean is minimised.
            labels: labels of the samples.
        """
        ...

    def metrics(self) -> Measured:
        """Return what the law did to the last gradient, by names of ``SERIES``."""
        ...


def build_backward(
    law: StudyLaw,
    model: nn.Module,
    optimizer: Optimizer,
    features: str,
    seed: int,
    classes: int | None = None,
) -> Backward:
    """Return the backward pass of a law.

    Args:
        law: the law.
        model: the model.
        optimizer: the optimizer that gets the gradients.
        features: name of the submodule whose output describes a sample.
        seed: of random clusters and permutations. Torch's global generator is not used.
        classes: the number of classes of the samples; None if they have none.
    """
    if law.kind == "none":
        return _Plain()
    if law.kind == "lead":
        return Lead(model, optimizer, law.queue_length)
    generator = torch.Generator().manual_seed(seed)
    if law.by_output:
        features = OUTPUT_GRADIENT
    if law.kind == "queue":
        clusterer = None
        if law.n_clusters is not None:
            clusterer = StudyClusterer(law, generator, classes)
        return _Queued(law, model, optimizer, features, clusterer)
    return AlteredWeights(law, model, features, generator)


class _Plain:
    """No law."""

    def backward(self, outputs: Tensor, losses: Tensor, labels: Tensor) -> None:
        losses.mean().backward()

    def metrics(self) -> Measured:
        return {}


class _Queued:
    """Grad Queue's plug-in."""

    def __init__(
        self,
        law: StudyLaw,
        model: nn.Module,
        optimizer: Optimizer,
        features: str,
        clusterer: StudyClusterer | None,
    ) -> None:
        clusters: dict[str, Any] = {}
        self.clusterer = clusterer
        if clusterer is not None:
            clusters = {
                "n_clusters": clusterer.n_clusters,
                "features": features,
                "clusterer": clusterer,
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
        if self.clusterer is not None:
            self.clusterer.batch_labels = labels
        loss = losses.mean()
        if self.adaptive:
            self.queue.record_loss(loss.detach())
        loss.backward()

    def metrics(self) -> Measured:
        measured = self.queue.metrics()
        return {name: float(measured[name]) for name in SERIES if name in measured}
