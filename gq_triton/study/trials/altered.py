"""Grad Queue in plain torch, with its weights or its queue changed: variants and controls."""

from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from gq_triton import scarcity_weight
from gq_triton.grouping.features import is_spatial, pooled
from gq_triton.options import OUTPUT_GRADIENT, LawOptions
from gq_triton.queues.losses import length_of, new_losses, record_loss
from gq_triton.study.design.law import StudyLaw
from gq_triton.study.trials.clusterer import StudyClusterer

__all__ = ["AlteredWeights"]

_UNCLIPPED = 1e30


class AlteredWeights:
    """The backward pass of Grad Queue with its weights or its queue changed, by the law's kind.

    ``"constant"``: the weights of a centroid in a tensor become their mean. ``"magnitude"``: one
    weight per centroid and tensor, from the norm of its gradient against the norms in the queue.
    ``"rank"``: the elements of all centroids of a tensor are ranked by z, and get the middles of
    equal cells of [1/rho, rho] on a logarithmic scale. ``"shuffled"`` and ``"rank-shuffled"``: each
    centroid's weights are permuted within each tensor, so that their distribution stays and their
    places are random. ``"weighted-queue"``: the queue holds the gradients that the optimizer got.
    Any other kind is Grad Queue itself, which the test of this class compares with the plug-in.

    Args:
        law: the law.
        model: the model.
        features: name of the submodule whose output describes a sample, or ``"output_gradient"``.
        generator: of permutations and random clusters.
    """

    def __init__(
        self, law: StudyLaw, model: nn.Module, features: str, generator: torch.Generator
    ) -> None:
        self.law, self.generator = law, generator
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.rings: list[deque[Tensor]] = [deque(maxlen=law.queue_length) for _ in self.params]
        self.losses = None
        if law.loss_window is not None:
            self.losses = new_losses(law.loss_window, law.queue_length, self.params[0].device)
        self.clusterer = StudyClusterer(law, generator) if law.n_clusters is not None else None
        self.features: Tensor | None = None
        self.by_output = features == OUTPUT_GRADIENT
        if self.clusterer is not None and not self.by_output:
            model.get_submodule(features).register_forward_hook(self._capture)
        self.measured: dict[str, float] = {}

    def _capture(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.features = pooled(output.detach(), channels_first=is_spatial(module))

    def backward(self, outputs: Tensor, losses: Tensor, labels: Tensor) -> None:
        """Leave the altered gradients in ``p.grad``; see ``Backward``."""
        groups = self._groups(outputs, losses, labels)
        sizes = torch.bincount(groups)
        clusters = [k for k, size in enumerate(sizes.tolist()) if size]
        centroids = [
            torch.autograd.grad(losses[groups == k].mean(), self.params, retain_graph=True)
            for k in clusters
        ]
        population = sizes[clusters].to(losses)
        powers = population**self.law.population_power
        length = self._length(losses.mean().detach())
        totals = torch.zeros(5, dtype=torch.float64, device=losses.device)
        for number, param in enumerate(self.params):
            means = torch.stack([grads[number] for grads in centroids])
            raw = torch.tensordot(population / len(losses), means, dims=1)
            weights = self._weights(number, means, length, (len(losses) / population).sqrt())
            grad = torch.tensordot(powers / powers.sum(), weights * means, dims=1)
            if self.law.match_norm and grad.norm() > 0:
                grad = grad * (raw.norm() / grad.norm())
            param.grad = grad
            # A copy: an optimizer may write into p.grad.
            applied = self.law.kind == "weighted-queue"
            self.rings[number].append(grad.clone() if applied else raw)
            share = population.view(-1, *[1] * param.dim()) / len(losses)
            totals += self._count(raw, grad, weights, share)
        self._note(totals, length)

    def _groups(self, outputs: Tensor, losses: Tensor, labels: Tensor) -> Tensor:
        if self.clusterer is None:
            return torch.zeros_like(losses, dtype=torch.int64)
        features = self.features
        if self.by_output:
            (gradient,) = torch.autograd.grad(losses.mean(), outputs, retain_graph=True)
            features = pooled(gradient, channels_first=gradient.dim() > 3)
        assert features is not None
        self.clusterer.batch_labels = labels
        return self.clusterer(features)

    def _length(self, loss: Tensor) -> int:
        if self.losses is None or self.law.loss_window is None:
            return self.law.queue_length
        self.losses = record_loss(self.losses, loss)
        law = LawOptions(queue_length=self.law.queue_length, loss_window=self.law.loss_window)
        length = length_of(self.losses, law, self.losses.device)
        assert length is not None
        return int(length)

    def _weights(self, number: int, means: Tensor, length: int, scales: Tensor) -> Tensor:
        """Return the altered weights of a parameter's centroids ``(K, *param.shape)``."""
        ring = self.rings[number]
        if len(ring) < self.law.queue_length:
            return torch.ones_like(means)
        newest = torch.stack(list(ring)[-length:])[:, None].expand(-1, *means.shape)
        z = self._scarcity(means, newest, scales).flatten(1)
        if self.law.kind.startswith("rank"):
            weights = _by_rank(z, self.law.rho).to(means.dtype)
        else:
            weights = z.clamp(1 / self.law.rho, self.law.rho).to(means.dtype)
        if self.law.kind == "constant":
            weights = weights.mean(dim=1, keepdim=True)
        elif self.law.kind.endswith("shuffled"):
            order = torch.rand(weights.shape, generator=self.generator).argsort(dim=1)
            weights = weights.gather(1, order.to(weights.device))
        return weights.expand(len(means), means[0].numel()).view_as(means)

    def _scarcity(self, means: Tensor, newest: Tensor, scales: Tensor) -> Tensor:
        """Return z of every element ``(K, *param.shape)``, or of every centroid ``(K, 1)``."""
        if self.law.kind == "magnitude":
            means, newest = means.flatten(1), newest.flatten(2)
            means, newest = (g.norm(dim=-1, keepdim=True) for g in (means, newest))
        z = scarcity_weight(means, newest, rho=_UNCLIPPED)
        if self.law.centroid_scale == "standard_error":
            z = z / scales.view(-1, *[1] * (means.dim() - 1))
        return z

    def _count(self, raw: Tensor, grad: Tensor, weights: Tensor, share: Tensor) -> Tensor:
        """Return a parameter's sums: squared norms, weights and saturation, by population."""
        rho = self.law.rho
        parts = raw.square(), grad.square(), weights * share
        on = float(rho > 1)
        high, low = (weights >= rho) * share * on, (weights <= 1 / rho) * share * on
        return torch.stack([part.double().sum() for part in (*parts, high, low)])

    def _note(self, totals: Tensor, length: int) -> None:
        raw, altered, weight, high, low = totals.tolist()
        elements = sum(param.numel() for param in self.params)
        self.measured = {
            "mean_weight": weight / elements,
            "norm_ratio": (altered / raw) ** 0.5 if raw > 0 else 1.0,
            "saturated_high": high / elements,
            "saturated_low": low / elements,
            "effective_length": float(length),
        }

    def metrics(self) -> dict[str, float]:
        """Return what the law did to the last gradient, by names of ``SERIES``."""
        return self.measured


def _by_rank(z: Tensor, rho: float) -> Tensor:
    """Return the weight of each element's rank, ``(K, P)`` like z.

    The K * P weights are the same for every z; only their places differ.
    """
    order = z.flatten().argsort(stable=True)  # elements with equal z keep their order
    share = torch.arange(len(order), dtype=torch.float64, device=z.device)
    share = (share + 0.5) / len(order)
    weights = torch.empty_like(share)
    weights[order] = rho ** (2 * share - 1)
    return weights.view_as(z)
