"""The random groups of a batch, and the clusters that sleep between the steps that are measured."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gq_triton.cluster_grad import Clusters, Sink, Step
from gq_triton.cluster_grad.accumulate import Accumulator
from gq_triton.cluster_grad.coverage import Coverage
from gq_triton.cluster_grad.labeller import Labels
from gq_triton.cluster_grad.raw import RawGradients
from gq_triton.cluster_grad.sink import Coming
from gq_triton.grouping import Groups, KMeans
from gq_triton.options import ClusterOptions

__all__ = ["MeterClusters", "halved", "scattered"]


def scattered(samples: int, clusters: int, generator: torch.Generator) -> Tensor:
    """Return random labels ``(B,)`` of groups whose sizes differ by one sample at most."""
    order = torch.randperm(samples, generator=generator)
    return order % min(clusters, samples)


def halved(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Return labels ``2 k`` and ``2 k + 1`` ``(B,)``: random halves of every cluster k.

    Args:
        labels: the clusters ``(B,)`` int64.
        generator: of the CPU.
    """
    places = torch.rand(len(labels), generator=generator, dtype=torch.float64).to(labels.device)
    order = (labels + places).argsort()
    # Neighbours in this order are of one cluster, in random order: every other one is a half.
    half = torch.empty_like(labels)
    half[order] = torch.arange(len(labels), device=labels.device) % 2
    return 2 * labels + half


class _Measured(Coverage):
    """The parameters whose noise is measured: those whose gradients are known by cluster."""

    def warn(self, names: list[str]) -> None:
        """Warn that the noise of parameters is not measured."""
        warnings.warn(f"noise is not measured of {self.listed(names)}", stacklevel=3)


class _Ears(Accumulator):
    """An accumulator whose parameters have hooks only while a measured pass needs them.

    Attributes:
        heard: returns what is called with the forward passes of a backward pass that has ended.
    """

    heard: Callable[[], Callable[[list[Step]], None] | None]

    def enter_pass(self, step: Step) -> None:
        """Note that the running backward pass computes a step's gradients."""
        if self._unwatched:
            self._watch()  # a second backward pass through a forward pass that was measured
        super().enter_pass(step)

    def _end_pass(self) -> None:
        steps = self._steps
        super()._end_pass()
        for handle in self._hooks:
            handle.remove()
        self._hooks.clear()
        self._unwatched = list(self._covered)
        meter = self.heard()
        if steps and meter is not None:
            meter(steps)


class _Unkept(RawGradients):
    """Raw gradients that nobody keeps: those of a meter are in ``p.grad``.

    A tensor that somebody keeps is copied by autograd into ``p.grad``.
    """

    def __init__(self) -> None:
        super().__init__({}, lambda: None)

    def add(self, step: Step, name: str, raw: Tensor | Coming, whole: bool = False) -> None:
        """Keep nothing."""

    def note(self, name: str) -> None:
        """Keep nothing."""


class MeterClusters(Clusters):
    """``Clusters`` whose groups are random ones, or random halves of clusters of features.

    Args:
        model: the model.
        names: the names of its parameters.
        sink: the receiver of the sums.
        clusters: K.
        features: names the layer whose outputs are clustered; None for random groups.
        batch_dim: the dimension of the samples.
        generator: draws the groups.
        heard: returns what is called with the forward passes of a backward pass that has ended;
            None when the meter is gone.
        leaves: by parameter name, the tensors to which autograd gives the gradients; None stands
            for the parameters.
    """

    accumulator: _Ears

    def __init__(
        self, model: nn.Module, names: dict[Tensor, str], sink: Sink, *, clusters: int,
        features: str | None, batch_dim: int, generator: torch.Generator,
        heard: Callable[[], Callable[[list[Step]], None] | None],
        leaves: dict[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        self._generator = generator
        self._own = None if features is None else KMeans(clusters, nonfinite="zero")
        options = ClusterOptions(
            n_clusters=clusters, features=features or "", clusterer=self._labels,
            batch_dim=batch_dim,
        )  # fmt: skip
        super().__init__(
            model, names, sink, options, sizes_only=features is None,
            accumulator=partial(_Ears, raw=_Unkept(), leaves=leaves, coverage=_Measured),
        )  # fmt: skip
        self.accumulator.heard = heard
        self.accumulator.asleep = True

    def wake(self, measured: bool) -> None:
        """Have the forward pass that begins measured, or run unchanged."""
        self.accumulator.asleep = not measured

    def assign(self, step: Step) -> Groups:
        """Return the groups of a step's samples."""
        if step.features is None and self._own is None:
            # The model returns its loss alone; its inputs tell how many samples there are.
            device = next(iter(self._names)).device
            step.features = torch.empty(self.accumulator.batch, 0, device=device)
        return super().assign(step)

    def _labels(self, features: Tensor) -> Tensor:
        if self._own is None:
            labels = scattered(len(features), self.labeller.n_clusters, self._generator)
            return labels.to(features.device, non_blocking=True)
        return halved(self._own(features), self._generator)

    def _label(self, features: Tensor) -> Labels:
        """Return the labels and the number of groups: those of the meter need no check."""
        groups = self.labeller.n_clusters * (1 if self._own is None else 2)
        return self._labels(features), groups, None

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the clusters of features; an empty one for random groups."""
        return {} if self._own is None else self._own.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """Load what ``state_dict`` returned."""
        if self._own is not None and state:
            self._own.load_state_dict(state)
