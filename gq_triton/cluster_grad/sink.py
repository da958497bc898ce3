"""The protocol of a sink, which makes a gradient of a parameter's sums by cluster."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from gq_triton.cluster_grad.site import Block
from gq_triton.grouping.groups import Groups
from gq_triton.ring import shaped

if TYPE_CHECKING:
    from gq_triton.cluster_grad.later import Later

__all__ = ["Coming", "Sink", "Taken", "known"]


class Coming:
    """A raw gradient that has no memory until its parameter is weighted (``later.py``).

    Args:
        param: the parameter.
        settle: weights all parameters that wait.

    Attributes:
        value: the gradient, flat, in the memory order of the parameter; None until then.
    """

    __slots__ = ("_param", "_settle", "value")

    def __init__(self, param: Tensor, settle: Callable[[], None]) -> None:
        self._param, self._settle = param, settle
        self.value: Tensor | None = None

    def flat(self) -> Tensor:
        """Return the gradient, flat; its parameter is weighted now if it was not."""
        if self.value is None:
            self._settle()
        if self.value is None:
            raise RuntimeError(
                "the gradients of a backward pass were not weighted, since an error ended it: call "
                "optimizer.zero_grad() and run the backward pass again"
            )
        return self.value

    def shaped(self) -> Tensor:
        """Return the gradient in the parameter's shape."""
        return shaped(self.flat()[None], like=self._param)[0]


def known(raw: "Tensor | Coming") -> Tensor:
    """Return a raw gradient in the parameter's shape."""
    return raw.shaped() if isinstance(raw, Coming) else raw


class Taken(NamedTuple):
    """The gradient that a sink makes for one parameter, and the gradient of the loss.

    Attributes:
        gradient: the gradient for ``p.grad``, in the parameter's shape and type.
        raw: the gradient of the loss, in the parameter's shape and the type of its sums, or one
            that is to come.
    """

    gradient: Tensor
    raw: Tensor | Coming


class Sink(Protocol):
    """A receiver of gradients that are summed by cluster, one parameter after the other.

    A sum over a cluster times ``groups.inverse_shares`` is the cluster's mean gradient.

    Attributes:
        backend: the engine that forms the layers' sums.
        later: takes sums in place of ``take`` where their gradient may wait; None where none may.
    """

    backend: str
    later: "Later | None"

    def take(self, name: str, groups: Groups, blocks: Iterator[Block], dtype: torch.dtype) -> Taken:
        """Take a parameter's sums; return its gradients.

        Args:
            name: the parameter's name.
            groups: the clusters.
            blocks: parts of the parameter, in its memory order, which together cover it. The memory
                of a block is reused for the next one.
            dtype: type of the sums.
        """
        ...

    def take_rows(self, name: str, groups: Groups, rows: Tensor, sums: Tensor) -> Taken:
        """Take the sums of a table of which only some rows were touched; return its gradients.

        Args:
            name: the name of the table ``(V, d)``, which is contiguous.
            groups: the clusters.
            rows: the touched rows ``(U,)`` int64, without repetition.
            sums: sums of the touched rows, ``(K, U * d)``.
        """
        ...

    def take_lookups(self, name: str, groups: Groups, where: Tensor, grads: Tensor) -> Taken:
        """Take the gradients of a table's lookups; return its gradients.

        Args:
            name: the name of the table ``(V, d)``, which is contiguous.
            groups: the clusters.
            where: the rows that were looked up, ``(n,)`` int64, the same number for each sample; V
                for a lookup that does not count.
            grads: gradients of the lookups, ``(n, d)``.
        """
        ...

    def take_whole(self, name: str, groups: Groups, grad: Tensor) -> Taken:
        """Take a gradient of which some part is not known by cluster; return its gradients.

        Args:
            name: the parameter's name.
            groups: the clusters.
            grad: the gradient of the loss, in the parameter's shape.
        """
        ...
