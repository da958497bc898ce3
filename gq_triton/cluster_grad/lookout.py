"""What the first forward pass of training shows of the order of the samples.

What a model makes of its inputs has no graph. So rows without one, as many as there are samples,
are believed to be the samples', in their order. Two signs of another order are cheap to see: a
layer's input that is an input of the model with its rows in another order, and an output whose
graph shows it. What else a model does before its layers is seen by ``check`` (``moved.py``).
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gq_triton.cluster_grad.layers.order import Output, in_order
from gq_triton.cluster_grad.standins.standin import plain
from gq_triton.grouping.features import tensors_in

if TYPE_CHECKING:
    from gq_triton.cluster_grad.step import Step

__all__ = ["Lookout"]

_INPUT = "{} sees the samples in another order than the model was given them"
_OUTPUT = "the model gives its output in another order than its layers see the samples"


class Lookout:
    """What the first forward pass of training shows of the order of the samples.

    Attributes:
        on: whether it is still to be looked at.
        layer: how a layer sees them in another order than the model's inputs; empty if none does.
        output: how the model's output has them in another order than the layers; empty likewise.
    """

    def __init__(self) -> None:
        self.on, self.layer, self.output = True, "", ""

    def see(self, name: str, values: Iterable[Any], step: "Step | None") -> None:
        """Look at the arguments of a layer."""
        if self.layer or step is None or step.arguments is None:
            return
        for x in values:
            bare = isinstance(x, Tensor) and x.dim() > 0 and not x.requires_grad
            if bare and any(_is_reordered(x, given) for given in step.arguments.tensors):
                self.layer = _INPUT.format(name or "the model")

    def end(self, output: Any, batch: int, trusted: set[Output], by_output: bool) -> None:
        """Look at the model's output, if its gradient describes the samples; look no more."""
        self.on = False
        graded = [plain(tensor) for tensor in tensors_in(output) if tensor.requires_grad]
        if by_output and graded and len(graded[0]) == batch:
            self.output = "" if in_order(graded[0], batch, trusted) else _OUTPUT


def _is_reordered(x: Tensor, given: Tensor) -> bool:
    """Return whether the rows ``(B, ...)`` of a tensor are those of another in another order."""
    same = given.shape == x.shape and given.dtype == x.dtype and given.device == x.device
    if not same or x.device.type == "meta" or given.data_ptr() == x.data_ptr():
        return False
    sums, its = (rows.double().flatten(1).sum(dim=1) for rows in (x, given))
    together = torch.allclose(sums.sort().values, its.sort().values, rtol=1e-9)
    return together and not torch.allclose(sums, its, rtol=1e-6)
