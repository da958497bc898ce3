"""What one forward pass leaves for its backward pass: features, then the samples' clusters."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from gq_triton.grouping.groups import Groups

__all__ = ["Partial", "Step"]


@dataclass(eq=False)
class Partial:
    """The sums of a parameter that is used several times, while a backward pass collects them.

    Attributes:
        sums: gradients summed by cluster so far, ``(K, elements)``.
        gradient: what ``p.grad`` has got for them so far.
        raw: the gradient of the loss that this was made of.
    """

    sums: Tensor
    gradient: Tensor | float = 0.0
    raw: Tensor | float = 0.0


@dataclass(eq=False)
class Step:
    """One forward pass of the model and the clusters of its batch.

    Attributes:
        assign: finds the clusters.
        features: ``(B, F)``, known after the forward pass or at the start of the backward pass.
        uses: how often each parameter, by name, was used in the forward pass.
        partial: by name, the sums of parameters that are used several times.
        open: whether the forward pass still runs.
        hidden: whether its forward pass is seen in the backward pass only.
        finishing: whether its backward pass runs.
        traced: whether a compiled graph runs that.
    """

    assign: Callable[["Step"], Groups]
    features: Tensor | None = None
    uses: dict[str, int] = field(default_factory=dict)
    partial: dict[str, Partial] = field(default_factory=dict)
    open: bool = True
    hidden: bool = False
    finishing: bool = False
    traced: bool = False
    _groups: Groups | None = None

    @property
    def groups(self) -> Groups:
        """The clusters, found when the first gradient asks for them."""
        if self._groups is None:
            self._groups = self.assign(self)
        return self._groups

    @property
    def known_groups(self) -> Groups | None:
        """The clusters if they were asked for already."""
        return self._groups
