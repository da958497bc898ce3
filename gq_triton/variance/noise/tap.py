"""A meter on the clusters of a GradQueue: their random halves are the meter's groups.

In a measured pass every cluster is cut into two random halves, and the layers sum by half. The
meter takes the squares that it needs, and the sink of the GradQueue gets the sums by cluster: its
weights are those of a pass that is not measured, up to the order of summation.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gq_triton.cluster_grad import Clusters, Sink, Step, Taken
from gq_triton.cluster_grad.later import Later
from gq_triton.cluster_grad.site import Block
from gq_triton.grouping import Groups
from gq_triton.variance.noise.groups import halved
from gq_triton.variance.noise.sink import Squares

__all__ = ["Tap"]


@dataclass(frozen=True)
class _Halves(Groups):
    """The halves of clusters.

    Attributes:
        clusters: the clusters themselves.
    """

    clusters: Groups | None = None


class _Both:
    """The sink of a measured pass: the meter's, and behind it the one of the GradQueue."""

    def __init__(self, squares: Squares, behind: Sink) -> None:
        self._squares, self._behind, self.backend = squares, behind, behind.backend
        self.later: Later | None = None  # sums that wait would pass the meter by

    def take(self, name: str, groups: Groups, blocks: Iterator[Block], dtype: torch.dtype) -> Taken:
        """Measure a parameter's halves, block by block, and hand on the sums by cluster."""

        def measured() -> Iterator[Block]:
            for start, stop, sums in blocks:
                self._squares.measure(name, groups, sums)
                yield start, stop, _by_cluster(sums)

        self._squares.begin(name)
        return self._behind.take(name, _clusters(groups), measured(), dtype)

    def take_rows(self, name: str, groups: Groups, rows: Tensor, sums: Tensor) -> Taken:
        """Measure the halves of a table's touched rows, and hand on the sums by cluster."""
        self._squares.begin(name)
        self._squares.measure(name, groups, sums)
        return self._behind.take_rows(name, _clusters(groups), rows, _by_cluster(sums))

    def take_lookups(self, name: str, groups: Groups, where: Tensor, grads: Tensor) -> Taken:
        """Measure the halves of a table's lookups, and hand the lookups on."""
        self._squares.take_lookups(name, groups, where, grads)
        return self._behind.take_lookups(name, _clusters(groups), where, grads)

    def take_whole(self, name: str, groups: Groups, grad: Tensor) -> Taken:
        """Note a gradient that is not known by half, and hand it on."""
        self._squares.unknown.add(name)
        return self._behind.take_whole(name, _clusters(groups), grad)


def _clusters(groups: Groups) -> Groups:
    assert isinstance(groups, _Halves)
    assert groups.clusters is not None
    return groups.clusters


def _by_cluster(sums: Tensor) -> Tensor:
    return sums.unflatten(0, (-1, 2)).sum(dim=1)


class Tap:
    """The meter's place on the clusters of a GradQueue; in ``MeterClusters``' place.

    Args:
        clusters: the clusters of the GradQueue.
        squares: the meter's sink.
        generator: draws the halves.
        heard: returns what is called with the forward passes of a backward pass that has ended.
    """

    def __init__(
        self, clusters: Clusters, squares: Squares, generator: torch.Generator,
        heard: Callable[[], Callable[[list[Step]], None] | None],
    ) -> None:  # fmt: skip
        self._clusters, self._squares = clusters, squares
        self._generator, self._heard = generator, heard
        self._undo: Callable[[], None] | None = None

    @property
    def installed(self) -> bool:
        """Whether the GradQueue weights the model's gradients."""
        return self._clusters.installed

    def install(self) -> Callable[[], None]:
        """Return what ends the tap."""
        return lambda: self.wake(False)

    def wake(self, measured: bool) -> None:
        """Have the forward pass that begins measured, or not."""
        if self._undo is not None:
            self._undo()
            self._undo = None
        if not measured:
            return
        accumulator: Any = self._clusters.accumulator
        assign, sink, end = accumulator._assign, accumulator._sink, accumulator._end_pass

        def halves(step: Step) -> Groups:
            return self._halves(assign(step))

        def end_pass() -> None:
            steps = list(accumulator._steps)
            end()
            if not steps:
                return
            self.wake(False)
            for step in steps:
                if isinstance(step._groups, _Halves):
                    step._groups = step._groups.clusters
            meter = self._heard()
            if meter is not None:
                meter(steps)

        def undo() -> None:
            accumulator._assign, accumulator._sink = assign, sink
            del accumulator._end_pass  # the method of the class is there again

        accumulator._assign, accumulator._end_pass = halves, end_pass
        accumulator._sink = _Both(self._squares, sink)
        self._undo = undo

    def _halves(self, groups: Groups) -> Groups:
        fine = Groups.of(
            halved(groups.labels, self._generator),
            2 * groups.n_clusters,
            replace(self._clusters.options, population_power=1.0),
            backend=self._clusters.accumulator.backend,
        )
        own = {name: getattr(fine, name) for name in ("labels", "order", "offsets", "n_clusters")}
        rest = {name: getattr(groups, name) for name in ("unit", "mass", "one_cluster", "problem")}
        shares = {
            name: getattr(fine, name) for name in ("inverse_shares", "mixture", "sigma_scales")
        }
        return _Halves(**own, **rest, **shares, clusters=groups)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the clusters are saved with the GradQueue."""
        return {}

    def check_saved(self, state: Any) -> None:
        """Accept everything."""

    def load_state_dict(self, state: Any) -> None:
        """Load nothing."""
