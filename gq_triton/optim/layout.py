"""A record of how tensors lie in memory, to be compared in every step.

A step of an optimizer compares a thousand tensors with the record of its plan, and Python takes
longer to ask each of them for its type, shape and strides than the device takes for the step.
``torch.compile`` has the same need, and torch a class for it, which compares all of them in C++. It
is not public. So it is used only where it passes a trial, once per process; elsewhere each tensor
is asked.
"""

from collections.abc import Sequence
from functools import cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

__all__ = ["Layout"]

_device, _dtype, _shape = map(attrgetter, ("device", "dtype", "shape"))


class Layout:
    """Types, shapes, strides and devices of tensors, none of which it refers to."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._length = len(tensors)
        make = _guards() if tensors else None
        self._guards = None if make is None else _guards_of(make, tensors)
        if self._guards is not None and not self._guards.check(*tensors):
            self._guards = None  # torch's class refuses one tensor in two places
        self._facts = _facts(tensors) if self._guards is None else None

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether every tensor has the type, shape, strides and device of the recorded one.

        Raises:
            RuntimeError: a tensor has no strides.
        """
        if len(tensors) != self._length:
            return False
        if self._guards is not None:
            return self._guards.check(*tensors)
        return _facts(tensors) == self._facts


def _facts(tensors: Sequence[Tensor]) -> list[list[Any]]:
    facts = type, _dtype, _shape, Tensor.stride, _device, Tensor.is_neg
    return [list(map(fact, tensors)) for fact in facts]


def _guards_of(make: Any, tensors: Sequence[Tensor]) -> Any:
    return make(
        *tensors,
        dynamic_dims_sizes=[list(tensor.shape) for tensor in tensors],
        dynamic_dims_strides=[list(tensor.stride()) for tensor in tensors],
    )


@cache
def _guards() -> Any:
    """Return torch's class if it tells apart what a plan must tell apart, else None."""
    one = torch.zeros(6, 2, device="cpu")
    others = [
        one.double(), one[:5], one[:, :1], one.view(3, 4), one.view(12), one.T, one.view(2, 6).T,
        one.as_strided((6, 2), (1, 1)), one.to("meta"), torch.nn.Parameter(one), one.to_sparse(),
        torch.ops.aten._neg_view(one),
    ]  # fmt: skip
    try:
        from torch._C._dynamo.guards import TensorGuards

        known = _guards_of(TensorGuards, [one, one])
        right = known.check(one, torch.ones(6, 2, device="cpu"))
        wrong = any(known.check(one, other) for other in others)
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError):
        return None
    return TensorGuards if right and not wrong else None
