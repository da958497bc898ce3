"""What becomes of gradients that are summed by cluster: the protocol between layers and a law."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gq_triton.cluster_grad.site import Block
from gq_triton.grouping.groups import Groups

__all__ = ["Sink", "Taken"]


class Taken(NamedTuple):
    """What a sink makes of one parameter's gradient.

    Attributes:
        gradient: what ``p.grad`` gets, in the parameter's shape and type.
        raw: the gradient of the loss, in the parameter's shape and the type of its sums.
    """

    gradient: Tensor
    raw: Tensor


class Sink(Protocol):
    """Takes the gradient of one parameter after the other, summed by cluster.

    ``groups.inverse_shares`` makes a sum over a cluster its mean gradient.

    Attributes:
        backend: the engine that forms the layers' sums.
    """

    backend: str

    def take(self, name: str, groups: Groups, blocks: Iterator[Block], dtype: torch.dtype) -> Taken:
        """Take a parameter's sums.

        Args:
            name: the parameter's name.
            groups: the clusters.
            blocks: parts of the parameter, in its memory order, which together cover it; the
                memory of one is used again for the next.
            dtype: type of the sums.
        """
        ...

    def take_rows(self, name: str, groups: Groups, rows: Tensor, sums: Tensor) -> Taken:
        """Take the sums of a table of which only some rows were touched.

        Args:
            name: the name of the table ``(V, d)``, which is contiguous.
            groups: the clusters.
            rows: the touched rows ``(U,)`` int64, without repetition.
            sums: ``(K, U * d)``.
        """
        ...

    def take_whole(self, name: str, groups: Groups, grad: Tensor) -> Taken:
        """Take a gradient of which some part is not known by cluster, in the parameter's shape."""
        ...
