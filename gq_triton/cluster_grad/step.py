"""The step: the record of one forward pass, from which its backward pass finds the clusters."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor

from gq_triton.grouping.groups import Groups

if TYPE_CHECKING:
    from gq_triton.cluster_grad.batch import Arguments
    from gq_triton.cluster_grad.sink import Taken

__all__ = ["Partial", "Step"]


@dataclass(eq=False)
class Partial:
    """The sums of a parameter that is used several times, while a backward pass collects them.

    Attributes:
        sums: gradients summed by cluster so far, ``(K, elements)``.
        given: the number of uses whose sums these are.
        taken: the gradients that the sink made of the sums when the parameter's hook was last
            called; None before the first call.
    """

    sums: Tensor
    given: int = 1
    taken: "Taken | None" = None


@dataclass(eq=False)
class Step:
    """One forward pass of the model and the clusters of its batch.

    Attributes:
        assign: returns the clusters of a step.
        batch_dim: the dimension of the samples in the model's inputs and features.
        arguments: what the model's arguments show; None where a compiled graph runs the pass.
        mismatch: how the features contradict the arguments, so that no row has a known sample;
            empty if they agree. It is known with the groups.
        features: ``(B, F)``, known after the forward pass or at the start of the backward pass.
        shape: the shape of the features before the mean over positions.
        outputs: the first dimensions of the tensors that the model returned; empty for a compiled
            model.
        second: by layer name, the input shapes of layers whose batch is the second dimension.
        uses: by parameter name, how often the forward pass used the parameter.
        unordered: the numbers of the sites that saw rows in no known order.
        partial: by parameter name, the sums of parameters that are used several times.
        open: whether the forward pass still runs.
        hidden: whether the forward pass was first seen inside a backward pass, as with a reentrant
            checkpoint around the whole model.
        finishing: whether the step's backward pass runs.
        traced: whether a compiled graph runs the step's backward pass.
    """

    assign: Callable[["Step"], Groups]
    batch_dim: int = 0
    arguments: "Arguments | None" = None
    mismatch: str = ""
    features: Tensor | None = None
    shape: tuple[int, ...] = ()
    outputs: list[int] = field(default_factory=list)
    second: dict[str, tuple[int, ...]] = field(default_factory=dict)
    uses: dict[str, int] = field(default_factory=dict)
    unordered: set[int] = field(default_factory=set)
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
        """The clusters if they have been found already, else None."""
        return self._groups

    def of_unknown(self) -> "Step":
        """Return a step of one sample, to which all rows of a tensor belong."""
        return replace(self, _groups=self.groups.unknown)

    def check_batch(self, name: str) -> None:
        """Raise a RuntimeError where the forward pass shows that samples lie along dimension 1.

        Args:
            name: the submodule whose output the features are; empty for the model itself.
        """
        if self.batch_dim or len(self.shape) < 3 or self.shape[0] == self.shape[1]:
            return
        samples, second = self.shape[:2]
        seen = f"the features, output of {name or 'the model'}, have shape {self.shape}"
        advice = "declare a time-major batch with batch_dim=1, or give the model (B, T, ...)"
        for layer, shape in self.second.items():
            if shape[:2] == (samples, second):
                raise RuntimeError(
                    f"{layer} has batch_first=False, so its batch is {second}, and {seen}, so that "
                    f"{samples} samples would be clustered: {advice}"
                )
        if second in self.outputs and all(rows % samples for rows in self.outputs):
            raise RuntimeError(
                f"{seen}, so that {samples} samples would be clustered, but the model's output has "
                f"{second}: {advice}"
            )
