"""The order of rows: whether the rows of a tensor are those of the samples, one after the other.

A tensor with another first dimension than the number of samples B may hold rows of samples still:
the windows of an image, the positions of a sequence in two dimensions. A selection of rows, as in a
mixture of experts, and a transposition to time-major order hold as many rows in another order. The
autograd graph tells them apart.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gq_triton.cluster_grad.passes import in_backward

__all__ = ["Output", "in_order", "is_view_of_input"]

# An output of an operation: its node in the graph, and which of the outputs it is.
Output = tuple[Any, int]
# The number of operations that are followed back.
_LIMIT = 500
# The number of operations among which a selection of rows is looked for.
_NEAR = 50
# Operations that keep all dimensions but may change sizes elsewhere: row i of the result depends on
# row i of the operands. Names are those of autograd's nodes without "Backward" at the end.
_KEEPING = {
    "Add", "Sub", "Rsub", "Mul", "Div", "Neg", "Pow", "Sqrt", "Rsqrt", "Exp", "Log", "Abs", "Tanh",
    "Sigmoid", "LogSigmoid", "Silu", "Gelu", "Relu", "LeakyRelu", "Elu", "Hardtanh", "Hardswish",
    "Hardsigmoid", "Softplus", "Mish", "Where", "MaskedFill", "Clamp", "ClampMin", "ClampMax",
    "Maximum", "Minimum", "Addcmul", "Lerp", "ToCopy", "Clone", "Alias", "NativeDropout",
    "NativeLayerNorm", "FusedRmsNorm", "NativeGroupNorm", "NativeBatchNorm", "Convolution",
    "PreluKernel", "ScaledDotProductFlashAttentionForCpu", "ScaledDotProductFlashAttention",
    "ScaledDotProductEfficientAttention", "ScaledDotProductCudnnAttention", "ConstantPadNd",
    "_Linear", "_Conv", "_Embedding", "_LayerNorm", "_RMSNorm", "_GroupNorm", "_BatchNorm",
    "_Slices", "AvgPool2D", "MaxPool2DWithIndices",
    "RegisterPostBackwardFunction", "_DDPSink",  # of FSDP2 and DDP: they return what they are given
}  # fmt: skip
# What became of stand-ins where they met samples, and of modules that run again.
_MET = {"_Expand", "_Tapped", "_Slices"}
# Operations of two operands, of which one without a gradient may be a constant.
_PAIRED = {"Add", "Sub", "Rsub", "Mul", "Div", "Pow", "Where", "MaskedFill", "Maximum", "Minimum"}
# Operations that are known to put rows in another order.
_MIXING = {"Index", "IndexSelect", "Gather", "Flip", "Roll", "Sort", "Expand", "View", "UnsafeView"}
_VIEWING = {"View", "UnsafeView", "ReshapeAlias", "Reshape", "Squeeze", "Unsqueeze"}
_REDUCING = {
    "Mean",
    "Sum",
    "Softmax",
    "SafeSoftmax",
    "LogSoftmax",
    "Slice",
    "Cat",
    "Split",
    "SplitWithSizes",
}


def in_order(tensor: Tensor, batch: int, trusted: set[Output]) -> bool:
    """Return whether each sample's rows lie together along dimension 0, in the samples' order.

    Where only the first dimension is as long as the batch, it is believed to be that of the
    samples, unless the graph shows that it is not. Where others are as long, or it is a multiple,
    the graph must show it. A compiled graph shows nothing: a first dimension of B is believed.

    Args:
        tensor: ``(n, ...)``.
        batch: the number of samples B.
        trusted: outputs of operations that have the samples' rows along dimension 0. The tensor's
            is added where the graph shows it.
    """
    if torch.compiler.is_compiling():
        return tensor.shape[0] == batch
    if in_backward() and tensor.shape[0] == batch:
        return True  # a checkpointed segment runs again: the forward pass has judged it
    shape, node = tuple(tensor.shape), tensor.grad_fn
    if batch == 1:
        return True  # whatever the rows are, they belong to the one sample
    if shape[0] == 0 or shape[0] % batch or not _from_samples(tensor, trusted):
        return False
    if shape[0] == batch and _selected(tensor, trusted):
        return False  # as many as the samples by chance
    if node is None or _has_samples_first(shape, batch):
        return shape[0] == batch
    shown = _leads_to_samples(tensor, batch, trusted)
    if shown:
        trusted.add((node, tensor.output_nr))  # later walks end here
    # Positions, or samples times heads, may be a multiple of B by chance.
    believed = shape[0] == batch and batch not in _others(shape)
    return shown is True or (believed and shown is None)


def _leads_to_samples(tensor: Tensor, batch: int, trusted: set[Output]) -> bool | None:
    """Return whether dimension 0 leads back to that of the samples; None if nothing shows it."""
    # With as many rows as samples only a permutation can mislead: selections were looked for.
    believing = tensor.shape[0] == batch
    start = (tensor.grad_fn, tensor.output_nr, 0)
    stack: list[tuple[Any, int, int]] = [start]
    seen, found, ends = set(), False, False
    while stack:
        entry = stack.pop()
        if entry in seen:
            continue
        seen.add(entry)
        node, place, axis = entry
        if type(node).__name__ == "_SlicesBackward" and node.run.out_dims[place] != axis:
            return False
        known = entry != start and _has_samples_first(_shape(node, place), batch)
        if axis == 0 and (known or (node, place) in trusted):
            found = True
            continue
        sources = None if len(seen) > _LIMIT else _sources(node, place, axis, believing)
        if sources is None:
            return None
        ends = ends or (axis == 0 and not sources)
        for parent, output, into in sources:
            if type(parent).__name__ != "AccumulateGrad":
                stack.append((parent, output, into))
            elif into == 0 and parent.variable.shape[0] == batch:
                found = True  # an input of the model, or of a segment that is run again
    return True if found else None if ends else False


def _from_samples(tensor: Tensor, trusted: set[Output]) -> bool:
    """Return whether a tensor depends on samples, not on parameters and constants alone."""
    if tensor.grad_fn is None:
        return not isinstance(tensor, nn.Parameter)
    stack: list[Output] = [(tensor.grad_fn, tensor.output_nr)]
    seen = set()
    while stack and len(seen) < _LIMIT:
        node, place = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        kind = type(node).__name__.rpartition("Backward")[0]
        if kind in _MET or (node, place) in trusted:
            return True
        if type(node).__name__ == "AccumulateGrad":
            if not isinstance(node.variable, nn.Parameter):
                return True
            continue
        known = [(parent, output) for parent, output in node.next_functions if parent is not None]
        if len(known) < len(node.next_functions):  # samples without a gradient, or a constant
            kept = kind in _PAIRED and known
            if not kept or any(_shape(*one) != _shape(node, place) for one in known):
                return True
        stack.extend(known)
    return bool(stack)


def _selected(tensor: Tensor, trusted: set[Output]) -> bool:
    """Return whether the rows of a tensor were selected since an operation that is trusted."""
    rows, stack, seen = tensor.shape[0], [(tensor.grad_fn, tensor.output_nr)], set()
    while stack and len(seen) < _NEAR:
        entry = stack.pop()
        if entry[0] is None or entry in seen or entry in trusted:
            continue
        seen.add(entry)
        node: Any = entry[0]
        kind = type(node).__name__.rpartition("Backward")[0]
        if kind == "Index":  # a list of rows; with a second index, a position of each sample
            if len(node._saved_indices) == 1:
                return True
        elif kind in ("IndexSelect", "Gather") and node._saved_dim == 0:
            return True
        stack += [(parent, place) for _, parent, place, shape in _parents(node)
                  if (shape and shape[0] == rows) or kind == "Index"]  # fmt: skip
    return False


def is_view_of_input(tensor: Tensor, inputs: Mapping[int, int], batch: int) -> bool:
    """Return whether the rows of a tensor are those of an input of the model, in their order.

    Args:
        tensor: ``(n, ...)``.
        inputs: by the address of an input, the distance in memory from sample to sample.
        batch: the number of samples B.
    """
    distance, rows = inputs.get(tensor.data_ptr()), tensor.shape[0]
    if distance is None or rows == 0 or rows % batch:
        return False
    return batch == 1 or tensor.stride(0) * (rows // batch) == distance


def _has_samples_first(shape: tuple[int, ...], batch: int) -> bool:
    """Return whether dimension 0 is that of the samples, and no other may hold them, too."""
    return bool(shape) and shape[0] == batch and all(size % batch for size in _others(shape))


def _others(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the sizes of the dimensions besides the first one that may be that of the samples."""
    return shape[1:-1] if len(shape) > 2 else shape[1:]


def _shape(node: Any, place: int) -> tuple[int, ...]:
    """Return the shape of an output of a node."""
    shape: tuple[int, ...] = tuple(node._input_metadata[place].shape)
    return shape


def _parents(node: Any) -> Iterator[tuple[int, Any, int, tuple[int, ...]]]:
    """Yield the operands of a node that need a gradient, parameters excepted.

    Yields:
        The position of the operand; its node; which output of that node it is; its shape.
    """
    for position, (parent, place) in enumerate(node.next_functions):
        if parent is None:
            continue
        if type(parent).__name__ != "AccumulateGrad":
            yield position, parent, place, _shape(parent, place)
        elif not isinstance(parent.variable, nn.Parameter):
            yield position, parent, place, tuple(parent.variable.shape)


def _sources(
    node: Any, place: int, axis: int, believing: bool
) -> list[tuple[Any, int, int]] | None:
    """Return where rows along an axis of a node's output come from; None if they are mixed.

    Args:
        node: the node.
        place: which of its outputs.
        axis: the dimension of the rows.
        believing: whether operations of which nothing is known are believed to keep their rows.
    """
    kind, shape = type(node).__name__.rpartition("Backward")[0], _shape(node, place)
    found: list[tuple[Any, int, int]] = []
    for position, parent, output, inner in _parents(node):
        into = _axis(node, kind, position, axis, shape, inner)
        if into is None and believing and kind not in _MIXING:
            into = _broadcast(axis, shape, inner)
        if into is None:
            return None
        if into >= 0:
            found.append((parent, output, into))
    return found


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
    if kind in ("Unbind", "Select"):
        return axis + (_signed(node._saved_dim) % len(inner) <= axis)
    if kind == "Roll":
        return None if axis in node._saved_dims else axis
    if kind in ("_Expand", "_Tapped"):  # a stand-in, expanded over the rows or met by them
        return -1 if kind == "_Expand" or position else axis
    if kind == "Expand":
        return None if len(inner) < dims - axis else _broadcast(axis, shape, inner)
    if kind in _VIEWING:
        return _through_view(axis, shape, inner)
    if kind in ("Mm", "Addmm", "Bmm", "Baddbmm"):
        right = position - (kind in ("Addmm", "Baddbmm"))
        if right < 0:
            return _broadcast(axis, shape, inner)
        batched = dims == 3 and axis == 0
        return axis if batched or (right == 0 and axis == dims - 2) else -1 if right else None
    if kind in _REDUCING:
        changed = getattr(node, "_saved_dim", ())
        changed = changed if isinstance(changed, tuple) else (changed,)
        if (
            len(inner) != dims
            or None in changed
            or axis in {_signed(dim) % len(inner) for dim in changed}
        ):
            return None
        return axis
    return _broadcast(axis, shape, inner) if kind in _KEEPING else None


def _broadcast(axis: int, shape: tuple[int, ...], inner: tuple[int, ...]) -> int:
    into = axis - (len(shape) - len(inner))
    return into if into >= 0 and inner[into] == shape[axis] else -1


def _through_view(axis: int, shape: tuple[int, ...], inner: tuple[int, ...]) -> int | None:
    """Return the dimension of the viewed tensor that begins where the axis of the view begins."""
    if math.prod(shape) != math.prod(inner):
        return None
    before, element = math.prod(shape[:axis]), 1
    for into, size in enumerate(inner):
        if element == before and size > 1:
            return into
        element *= size
    return None


def _signed(number: int) -> int:
    """Return a dimension that autograd keeps as an unsigned number."""
    return number - (1 << 64) if number >= 1 << 63 else number
