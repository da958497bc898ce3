"""The test of one batch, which shows before training how each gradient will be found."""

import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gq_triton.cluster_grad.given import MISSING
from gq_triton.cluster_grad.moved import called, moved, same_draws
from gq_triton.grouping.features import tensors_in

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gq_triton.cluster_grad.clusters import Clusters

__all__ = ["Check", "Checked", "check_batch"]

# Each pass may hand a module's parameters over to the module around it. So many passes are run.
_PASSES = 12


class Checked(NamedTuple):
    """A row of the table: one parameter, and how its gradient is found.

    Attributes:
        name: the parameter's name.
        elements: its number of elements.
        how: the words of ``report()``.
    """

    name: str
    elements: int
    how: str


@dataclass(frozen=True)
class Check:
    """The table that a batch has shown, for ``print``.

    Attributes:
        rows: one row per parameter.
    """

    rows: list[Checked]

    @property
    def whole(self) -> list[str]:
        """The names of the parameters that are weighted as one cluster."""
        return [row.name for row in self.rows if row.how.startswith("whole batch")]

    @property
    def reordered(self) -> list[str]:
        """The names of the parameters that would be grouped by the clusters of other samples."""
        return [row.name for row in self.rows if row.how.startswith("reordered")]

    @property
    def share(self) -> float:
        """The share of the trainable elements whose gradients are known by cluster."""
        trainable = [row for row in self.rows if row.how != "frozen"]
        known = sum(row.elements for row in trainable if row.how.startswith("clusters"))
        return known / max(sum(row.elements for row in trainable), 1)

    def __str__(self) -> str:
        """Return a table of the parameters, and a line that sums it up."""
        width = max((len(row.name) for row in self.rows), default=0)
        lines = [f"{row.name:{width}}  {row.elements:>12,}  {row.how}" for row in self.rows]
        return "\n".join([*lines, f"{self.share:.1%} of the trainable elements are clustered"])


def _loss_of(output: Any) -> Tensor:
    """Return a loss that depends on every tensor with a gradient in a model's output."""
    own = getattr(output, "loss", None)
    if isinstance(own, Tensor) and own.requires_grad:
        return own
    parts = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
    if isinstance(output, Tensor) and output.requires_grad and not parts:
        parts = [output]
    if not parts:
        raise ValueError(
            "the model's output has no tensor with a gradient: give check() a loss, a function of "
            "the output"
        )
    return torch.stack([part.square().mean().float() for part in parts]).sum()


@contextmanager
def _unchanged(clusters: "Clusters") -> "Iterator[None]":
    """Give back gradients, buffers, random numbers and the state of the clusters afterwards."""
    model, accumulator = clusters.model, clusters.accumulator
    grads = [(param, param.grad) for param in model.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    saved, last, told = clusters.state_dict(), clusters.last, set(accumulator.coverage.told)
    try:
        with same_draws(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for param, grad in grads:
            param.grad = grad
        with torch.no_grad():
            for buffer, values in buffers:
                buffer.copy_(values)
        accumulator.raw.take_all()
        accumulator.raw.count_passes()
        accumulator.coverage.told = told
        clusters.load_state_dict(saved)
        clusters.last = last


def _shown(clusters: "Clusters", batch: Any) -> dict[str, str]:
    """Return, by parameter name, how the last pass through a batch found its gradient."""
    accumulator, how = clusters.accumulator, clusters.report()
    for name, param in accumulator.params.items():
        if param.requires_grad and name not in accumulator.coverage.known:
            how[name] = "no gradient (the loss of this batch does not depend on it)"
    for name, where in moved(clusters, batch).items():
        if how[name].startswith("clusters"):
            how[name] = f"reordered ({where})"
    return how


def check_batch(
    clusters: "Clusters", batch: Any, loss: Callable[[Any], Tensor] | None = None
) -> Check:
    """Run forward and backward passes of one batch; return how each gradient was found.

    Nothing is queued, and the model keeps its gradients, buffers and random numbers.

    Args:
        clusters: the clusters.
        batch: the arguments of the model: a mapping by name, a tuple or list, or the only one.
        loss: returns the loss of the model's output; by default the output's own ``loss``, or the
            mean square of its tensors.

    Raises:
        RuntimeError: with ``strict=True``, where gradients are not known by cluster; with
            ``labels=True``, where no labels were given.
    """
    coverage = clusters.accumulator.coverage
    given, labels = clusters.labeller.given, None
    if given is not None:
        labels = given.take()
        if labels is None:
            raise RuntimeError(MISSING)
    strict, coverage.strict = coverage.strict, False
    undo = None if clusters.installed else clusters.install()
    try:
        with _unchanged(clusters), torch.enable_grad():
            for _ in range(_PASSES):
                coverage.known.clear()
                for param in clusters.model.parameters():
                    param.grad = None
                known = dict(clusters.owners), clusters.batch_size.place
                if labels is not None:
                    clusters.set_labels(labels)
                (loss or _loss_of)(called(clusters.model, batch)).backward()
                if known == (clusters.owners, clusters.batch_size.place):
                    break
            how = _shown(clusters, batch)
    finally:
        coverage.strict = strict
        if labels is not None:
            clusters.set_labels(labels)
        if undo is not None:
            undo()
    rows = [Checked(name, clusters.accumulator.params[name].numel(), how[name]) for name in how]
    result = Check(rows)
    unknown = {*result.whole, *result.reordered}
    if strict and unknown:
        raise RuntimeError(
            "strict=True, and these parameters are not known by cluster:\n"
            + "\n".join(f"{row.name}: {row.how}" for row in rows if row.name in unknown)
        )
    return result
