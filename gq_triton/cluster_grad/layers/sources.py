"""The places that the rows of an operation's result come from, as the autograd graph tells them.

The samples of a tensor are at a place: the dimension that holds them, and the number of groups of
B rows that they are repeated for there. Rows in order are groups of one: dimension 0, 1 group. A
batch that was joined with another view of it, ``cat([x, y])``, has 2 groups in dimension 0, and so
has the flattened ``(2, B, ...)``.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

__all__ = ["Place", "chosen_along", "graph_parents", "shape_of", "sources"]

# Operations that keep all dimensions but may change sizes elsewhere: row i of the result depends on
# row i of the operands. Names are those of autograd's nodes without "Backward" at the end.
_KEEPING = {
    "Add", "Sub", "Rsub", "Mul", "Div", "Neg", "Pow", "Sqrt", "Rsqrt", "Exp", "Log", "Abs", "Tanh",
    "Sin", "Cos", "Erf", "Expm1", "Log1P", "Reciprocal", "Softshrink", "Hardshrink", "Threshold",
    "Sigmoid", "LogSigmoid", "Silu", "Gelu", "Relu", "LeakyRelu", "Elu", "Hardtanh", "Hardswish",
    "Hardsigmoid", "Softplus", "Mish", "Where", "MaskedFill", "Clamp", "ClampMin", "ClampMax",
    "Maximum", "Minimum", "Addcmul", "Lerp", "ToCopy", "Clone", "Alias", "NativeDropout",
    "NativeLayerNorm", "FusedRmsNorm", "NativeGroupNorm", "NativeBatchNorm", "Convolution",
    "PreluKernel", "ScaledDotProductFlashAttentionForCpu", "ScaledDotProductFlashAttention",
    "ScaledDotProductEfficientAttention", "ScaledDotProductCudnnAttention", "ConstantPadNd",
    "_Linear", "_Conv", "_Embedding", "_LayerNorm", "_RMSNorm", "_GroupNorm", "_BatchNorm",
    "_Slices", "AvgPool2D", "MaxPool2DWithIndices", "AdaptiveAvgPool2D", "AdaptiveMaxPool2D",
    "RegisterPostBackwardFunction", "_DDPSink",  # of FSDP2 and DDP: they return what they are given
}  # fmt: skip
# Operations that are known to put rows in another order.
_MIXING = {"Index", "IndexSelect", "Gather", "Flip", "Roll", "Sort", "Expand", "View", "UnsafeView"}
_VIEWING = {"View", "UnsafeView", "ReshapeAlias", "Reshape", "Squeeze", "Unsqueeze"}
# Operations that mix or choose rows along the dimensions that they keep as "dim" or "dims".
_ALONG = {
    "Mean", "Sum", "Softmax", "SafeSoftmax", "LogSoftmax", "Slice", "Cat", "Split",
    "SplitWithSizes", "Flip", "Roll", "Gather", "IndexSelect", "Cumsum", "Glu", "Amax", "Amin",
    "Logsumexp", "Var", "Std", "LinalgVectorNorm", "Max", "Min",
}  # fmt: skip
# Operations that mix along their last dimension, or the last two, or all but the first one.
_LAST = {"_Linear", "NativeLayerNorm", "FusedRmsNorm", "_LayerNorm", "_RMSNorm"}
_FIRST_ONLY = {"Convolution", "_Conv", "NativeGroupNorm", "_GroupNorm"}


class Place(NamedTuple):
    """Where the samples of an operation's result are.

    Attributes:
        node: the operation.
        output: which of its results.
        axis: the dimension that holds the samples.
        groups: the number of groups of samples, one after the other, that it holds.
    """

    node: Any
    output: int
    axis: int = 0
    groups: int = 1


def shape_of(node: Any, place: int) -> tuple[int, ...]:
    """Return the shape of an output of a node."""
    shape: tuple[int, ...] = tuple(node._input_metadata[place].shape)
    return shape


def graph_parents(node: Any) -> Iterator[tuple[int, Any, int, tuple[int, ...]]]:
    """Yield the operands of a node that need a gradient, parameters excepted.

    Yields:
        The position of the operand; its node; which output of that node it is; its shape.
    """
    for position, (parent, place) in enumerate(node.next_functions):
        if parent is None:
            continue
        if type(parent).__name__ != "AccumulateGrad":
            yield position, parent, place, shape_of(parent, place)
        elif not isinstance(parent.variable, nn.Parameter):
            yield position, parent, place, tuple(parent.variable.shape)


def sources(place: Place, batch: int, believing: bool) -> list[Place] | None:
    """Return the places that samples come from; None if they are mixed, or it is not known.

    Args:
        place: where they are.
        batch: the number of samples B.
        believing: whether operations of which nothing is known are believed to keep their rows.
    """
    node, axis, groups = place.node, place.axis, place.groups
    kind, shape = type(node).__name__.rpartition("Backward")[0], shape_of(node, place.output)
    if kind in ("Cat", "Split", "SplitWithSizes", "Slice") and axis == _along(node, len(shape)):
        return _joined(place, kind, batch)
    found: list[Place] = []
    for position, parent, output, inner in graph_parents(node):
        into: tuple[int, int] | None = None
        if kind in _VIEWING:
            into = _through_view(axis, groups, batch, shape, inner)
        else:
            one = _axis(node, kind, position, axis, shape, inner)
            if one is None and believing and kind not in _MIXING:
                one = _broadcast(axis, shape, inner)
            into = None if one is None else (one, groups)
        if into is None:
            return None
        if into[0] >= 0:
            found.append(Place(parent, output, *into))
    return found


def chosen_along(node: Any, axis: int) -> bool:
    """Return whether an operation chooses or moves rows along a dimension."""
    dims = len(shape_of(node, 0))
    given = getattr(node, "_saved_dims", None)
    along = [node._saved_dim] if given is None else given
    return axis in [_signed(dim) % dims for dim in along]


def _along(node: Any, dims: int) -> int:
    """Return the dimension that an operation works along."""
    return _signed(node._saved_dim) % dims


def _joined(result: Place, kind: str, batch: int) -> list[Place] | None:
    """Return the places in tensors that were joined or cut along the samples' dimension."""
    node, axis = result.node, result.axis
    if shape_of(node, result.output)[axis] != result.groups * batch:
        return None  # several rows of a sample lie together
    parents = list(graph_parents(node))
    # What has no gradient may be samples in another order, such as those of earlier steps.
    if len(parents) < len(node.next_functions):
        return None
    start = 0
    if kind == "Split":
        start = result.output * int(node._saved_split_size)
    elif kind == "SplitWithSizes":
        start = sum(node._saved_split_sizes[: result.output])
    elif kind == "Slice":
        start = _signed(node._saved_start) if node._saved_step == 1 else 1
        start += parents[0][3][axis] if start < 0 else 0
    if start % batch or any(inner[axis] % batch for _, _, _, inner in parents):
        return None
    return [
        Place(parent, output, axis, inner[axis] // batch) for _, parent, output, inner in parents
    ]


def _axis(
    node: Any, kind: str, position: int, axis: int, shape: tuple[int, ...], inner: tuple[int, ...]
) -> int | None:
    """Return the dimension of an operand that the rows come from.

    Returns:
        The dimension; -1 if no row depends on the operand alone, as on one that is broadcast; None
        if rows are mixed, or nothing is known of the operation.
    """
    dims = len(shape)
    if kind == "Permute":
        return _signed(node._saved_dims[axis]) % dims
    if kind in ("Transpose", "T"):
        first, second = (0, 1) if kind == "T" else (node._saved_dim0, node._saved_dim1)
        swap = {_signed(first) % dims: _signed(second) % dims}
        swap |= {new: old for old, new in swap.items()}
        return swap.get(axis, axis)
    if kind == "Stack":
        new = _along(node, dims)
        return None if axis == new else axis - (axis > new)
    if kind in ("Unbind", "Select"):
        return axis + (_signed(node._saved_dim) % len(inner) <= axis)
    if kind == "Index":
        return _indexed(node._saved_indices, axis, shape, inner)
    if kind in ("_Expand", "_Tapped"):  # a stand-in, expanded over the rows or met by them
        return -1 if kind == "_Expand" or position else axis
    if kind == "Expand":
        return None if len(inner) < dims - axis else _broadcast(axis, shape, inner)
    if kind in ("Mm", "Addmm", "Bmm", "Baddbmm"):
        right = position - (kind in ("Addmm", "Baddbmm"))
        if right < 0:
            return _broadcast(axis, shape, inner)
        batched = dims == 3 and axis == 0
        return axis if batched or (right == 0 and axis == dims - 2) else -1 if right else None
    if kind in _ALONG:
        return _beside(node, kind, axis, shape, inner)
    mixed = dims - 1 if kind in _LAST else dims - 2 if "Attention" in kind else dims
    if axis and (axis >= mixed or kind in _FIRST_ONLY):
        return None
    return _broadcast(axis, shape, inner) if kind in _KEEPING else None


def _beside(
    node: Any, kind: str, axis: int, shape: tuple[int, ...], inner: tuple[int, ...]
) -> int | None:
    """Return the dimension that rows come from, of an operation that works along others."""
    given = getattr(node, "_saved_dims", getattr(node, "_saved_dim", ()))
    given = given if isinstance(given, tuple) else (given,)
    if None in given:
        return None
    along = {_signed(dim) % len(inner) for dim in given}
    if len(inner) == len(shape):
        moved = kind == "Gather" and inner[axis] != shape[axis]
        return None if axis in along or moved else axis
    # A mean or a sum may drop the dimensions that it works along.
    left = [dim for dim in range(len(inner)) if dim not in along]
    return left[axis] if len(left) == len(shape) else None


def _indexed(indices: Any, axis: int, shape: tuple[int, ...], inner: tuple[int, ...]) -> int | None:
    """Return the dimension behind one that lies before all that are indexed by lists."""
    given = [place for place, index in enumerate(indices) if index is not None]
    together = given == list(range(given[0], given[-1] + 1))
    return axis if together and axis < given[0] and shape[axis] == inner[axis] else None


def _broadcast(axis: int, shape: tuple[int, ...], inner: tuple[int, ...]) -> int:
    into = axis - (len(shape) - len(inner))
    return into if into >= 0 and inner[into] == shape[axis] else -1


def _through_view(
    axis: int, groups: int, batch: int, shape: tuple[int, ...], inner: tuple[int, ...]
) -> tuple[int, int] | None:
    """Return the dimension of the viewed tensor that holds the samples, and their groups in it."""
    if math.prod(shape) != math.prod(inner):
        return None
    before, element = math.prod(shape[:axis]) * groups, 1
    for into, size in enumerate(inner):
        if element == before and size > 1:
            return into, 1
        if element * size > before:
            inside = before // element
            whole = before % element == 0 and size % (inside * batch) == 0
            return (into, inside) if whole else None
        element *= size
    return None


def _signed(number: int) -> int:
    """Return a dimension that autograd keeps as an unsigned number."""
    return number - (1 << 64) if number >= 1 << 63 else number
