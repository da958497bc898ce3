"""The operations of torch by what they do to stand-ins, and how a result's elements follow."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gq_triton.cluster_grad.standins.origin import OTHER, REPEATED, SAME, Origin

__all__ = [
    "CHANGING",
    "CONVOLVED",
    "ELEMENTWISE",
    "JOINED",
    "MULTIPLIED",
    "NORMALISED",
    "TAPPED",
    "link_of",
    "tensors_of",
]

# Operations whose operands are broadcast against each other, element by element.
ELEMENTWISE = {
    torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__,
    torch.sub, Tensor.sub, Tensor.sub_, Tensor.__sub__, Tensor.__rsub__, Tensor.__isub__,
    torch.subtract, Tensor.subtract, torch.rsub,
    torch.mul, Tensor.mul, Tensor.mul_, Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__,
    torch.multiply, Tensor.multiply,
    torch.div, Tensor.div, Tensor.div_, Tensor.__truediv__, Tensor.__rtruediv__,
    Tensor.__itruediv__, torch.divide, Tensor.divide, torch.true_divide, Tensor.true_divide,
    torch.where, Tensor.where, torch.maximum, Tensor.maximum, torch.minimum, Tensor.minimum,
    torch.addcmul, Tensor.addcmul, torch.lerp, Tensor.lerp, torch.pow, Tensor.pow, Tensor.__pow__,
    Tensor.masked_fill,
}  # fmt: skip
# Operations of which the gradients by cluster are found by K products, where the result has the
# samples in dimension 0.
TAPPED = {
    torch.einsum, torch.bmm, Tensor.bmm, torch.baddbmm, torch.tensordot, F.bilinear,
    F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.grid_sample, torch.matmul,
    Tensor.matmul, Tensor.__matmul__, F.conv1d, F.conv2d, F.conv3d, F.linear,
}  # fmt: skip
# Operations that keep the elements and their order.
_SAME = {
    Tensor.view, Tensor.reshape, torch.reshape, Tensor.unsqueeze, torch.unsqueeze, Tensor.squeeze,
    torch.squeeze, Tensor.flatten, torch.flatten, Tensor.unflatten, Tensor.contiguous,
    Tensor.clone, torch.clone, Tensor.to, Tensor.float, Tensor.double, Tensor.half,
    Tensor.bfloat16, Tensor.type_as, Tensor.view_as, Tensor.type,
}  # fmt: skip
CHANGING: set[Any] = {
    getattr(Tensor, name)
    for name in dir(Tensor)
    if (name.endswith("_") and not name.startswith("_"))
    or (name.startswith("__i") and name not in ("__init__", "__init_subclass__", "__int__"))
    or name == "__setitem__"
}
JOINED = {torch.cat, torch.concat, torch.concatenate}
_REPEATED = {Tensor.expand, Tensor.expand_as, torch.broadcast_to, Tensor.broadcast_to}
MULTIPLIED = {torch.matmul, Tensor.matmul, Tensor.__matmul__}
CONVOLVED = {F.conv1d, F.conv2d, F.conv3d}


# The arguments of functions that normalise, then scale and shift, in their order.
_RUNNING = "input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"
NORMALISED: dict[Any, tuple[str, ...]] = {
    F.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps"),
    F.rms_norm: ("input", "normalized_shape", "weight", "eps"),
    F.group_norm: ("input", "num_groups", "weight", "bias", "eps"),
    F.batch_norm: _RUNNING,
    F.instance_norm: (*_RUNNING[:5], "use_input_stats", *_RUNNING[6:]),
}


def tensors_of(values: Any) -> list[Tensor]:
    """Return the tensors among the arguments of an operation, and in lists of them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(tensors_of(value))
    return found


def link_of(func: Any, args: tuple[Any, ...], source: Any, out: Tensor) -> str:
    """Return how the elements of a result follow from those of the stand-in's parameter."""
    origin: Origin = source._gq_origin
    if origin.link == SAME and out.numel() == source.numel():
        numbers = func in (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
        if func in _SAME or (numbers and len(tensors_of(args)) == 1):
            return SAME
        if func is Tensor.__getitem__ and _only_adds_dimensions(args[1]):
            return SAME
    repeats = origin.link == SAME and func in _REPEATED and source.dim() == out.dim()
    if repeats and source.shape[1:] == out.shape[1:] and source.shape[0] == 1:
        return REPEATED
    return OTHER


def _only_adds_dimensions(index: Any) -> bool:
    entries = index if isinstance(index, tuple) else (index,)
    # slice(None) as a value cannot be compared in a compiled graph.
    return all(
        entry is None
        or entry is Ellipsis
        or (
            isinstance(entry, slice)
            and entry.start is None
            and entry.stop is None
            and entry.step is None
        )
        for entry in entries
    )
