"""What one forward pass leaves for its backward pass: features, then the samples' clusters."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from gq_triton.grouping.groups import Groups

__all__ = ["Partial", "Step"]


@dataclass(eq=False)
class Partial:
    """A parameter that is used several times, while a backward pass goes through its uses.

    Attributes:
        sums: gradients summed by cluster so far, ``(K, elements)``.
        uses: how many uses those are of.
        weighted: what was returned for them.
        raw: their raw mean.
    """

    sums: Tensor
    uses: int = 0
    weighted: Tensor | float = 0.0
    raw: Tensor | float = 0.0


@dataclass(eq=False)
class Step:
    """One forward pass of the model and the clusters of its batch.

    Attributes:
        assign: finds the clusters.
        features: ``(B, F)``, known after the forward pass or at the start of the backward pass.
        uses: how often each parameter, by name, was used in the forward pass.
        open: whether the forward pass still runs.
        hidden: whether its forward pass is seen in the backward pass only.
        finishing: whether its backward pass runs.
    """

    assign: Callable[["Step"], Groups]
    features: Tensor | None = None
    uses: dict[str, int] = field(default_factory=dict)
    partial: dict[str, Partial] = field(default_factory=dict)
    open: bool = True
    hidden: bool = False
    finishing: bool = False
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
