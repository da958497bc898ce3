"""The order of rows: whether the rows of a tensor are those of the samples, one after the other.

A tensor with another first dimension than the number of samples B may hold rows of samples still:
the windows of an image, the positions of a sequence in two dimensions. A selection of rows, as in a
mixture of experts, and a transposition to time-major order hold as many rows in another order. The
autograd graph tells them apart.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gq_triton.cluster_grad.layers.sources import (
    Place,
    chosen_along,
    graph_parents,
    shape_of,
    sources,
)
from gq_triton.cluster_grad.passes import in_backward

__all__ = ["JOINED", "SECOND", "Output", "in_order", "is_view_of_input", "other_order"]

# Other orders of rows: samples in the second dimension, and several batches one after the other.
SECOND, JOINED = "second dimension", "joined batches"

# An output of an operation: its node in the graph, and which of the outputs it is.
Output = tuple[Any, int]
# The number of operations that are followed back.
_LIMIT = 500
# The number of operations among which a selection of rows is looked for.
_NEAR = 50
# Operations that may choose or move rows.
_CHOOSING = {
    "IndexSelect", "Gather", "Sort", "Flip", "Roll", "Slice", "Split", "SplitWithSizes",
}  # fmt: skip
# What became of stand-ins where they met samples, and of modules that run again.
_MET = {"_Expand", "_Tapped", "_Slices"}
# Operations of two operands, of which one without a gradient may be a constant.
_PAIRED = {"Add", "Sub", "Rsub", "Mul", "Div", "Pow", "Where", "MaskedFill", "Maximum", "Minimum"}


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
    if shape[0] == 0 or shape[0] % batch:
        return False
    if (node, tensor.output_nr) in trusted:
        return True
    # One walk in place of three, where it leads to samples that are known for certain: the others
    # would show the same.
    walks = node is not None and not _has_samples_first(shape, batch)
    if walks and _leads_to_samples(tensor, batch, trusted, certain=True):
        trusted.add((node, tensor.output_nr))
        return True
    if not _from_samples(tensor, trusted):
        return False
    # As many rows as samples by chance, or those of samples: the graph must show it.
    chosen = shape[0] == batch and _selected((node, tensor.output_nr), batch, trusted)
    if not chosen and (node is None or _has_samples_first(shape, batch)):
        return shape[0] == batch
    shown = _leads_to_samples(tensor, batch, trusted, believing=shape[0] == batch and not chosen)
    if shown:
        trusted.add((node, tensor.output_nr))  # later walks end here
    # Positions, or samples times heads, may be a multiple of B by chance.
    believed = shape[0] == batch and not chosen and batch not in _others(shape)
    return shown is True or (believed and shown is None)


def other_order(tensor: Tensor, batch: int, trusted: set[Output]) -> str:
    """Return in which other order a tensor has the rows of samples, if the graph shows it.

    Args:
        tensor: ``(n, ...)``, which is not in order.
        batch: the number of samples B.
        trusted: as for ``in_order``.

    Returns:
        ``SECOND`` for time-major ``(T, B, ...)``, ``JOINED`` for batches of all samples that were
        joined along dimension 0, or time-major rows ``(T * B, ...)``; else an empty string.
    """
    shape = tensor.shape
    if (
        torch.compiler.is_compiling()
        or tensor.grad_fn is None
        or not _from_samples(tensor, trusted)
    ):
        return ""
    if tensor.dim() > 2 and shape[1] == batch and _leads_to_samples(tensor, batch, trusted, axis=1):
        return SECOND
    groups = shape[0] // batch
    if groups > 1 and shape[0] % batch == 0:
        return JOINED if _leads_to_samples(tensor, batch, trusted, groups=groups) else ""
    return ""


def _leads_to_samples(
    tensor: Tensor,
    batch: int,
    trusted: set[Output],
    axis: int = 0,
    groups: int = 1,
    believing: bool = False,
    certain: bool = False,
) -> bool | None:
    """Return whether a place of samples leads back to dimension 0; None if nothing shows it.

    Args:
        tensor: ``(n, ...)``.
        batch: the number of samples B.
        trusted: as for ``in_order``.
        axis: the dimension that may hold the samples.
        groups: the number of groups of samples in it.
        believing: whether operations of which nothing is known keep rows. With as many rows as
            samples only a permutation can mislead, and selections were looked for.
        certain: whether only trusted outputs are samples, whatever the shapes of others are.
    """
    start = Place(tensor.grad_fn, tensor.output_nr, axis, groups)
    stack: list[Place] = [start]
    seen, found, ends = set(), False, False
    while stack:
        place = stack.pop()
        if place in seen:
            continue
        seen.add(place)
        axis = place.axis
        known = _known(place, batch, trusted, first=certain or place == start)
        if known is False:
            return False  # its samples are at another place
        if known:
            found = True
            continue
        into = None if len(seen) > _LIMIT else sources(place, batch, believing)
        if into is None:
            return None
        ends = ends or (axis == 0 and not into)
        for one in into:
            if type(one.node).__name__ != "AccumulateGrad":
                stack.append(one)
            elif one.axis == 0 and one.groups == 1 and one.node.variable.shape[0] == batch:
                found = True  # an input of the model, or of a segment that is run again
    return True if found else None if ends else False


def _known(place: Place, batch: int, trusted: set[Output], first: bool) -> bool | None:
    """Return whether the samples of a result are at a place; None if its operands must tell.

    Args:
        place: where they may be.
        batch: the number of samples B.
        trusted: as for ``in_order``.
        first: whether the walk begins at the result, so that its shape does not tell.
    """
    node, output, axis, groups = place
    alone = groups == 1
    if type(node).__name__ == "_SlicesBackward":
        return alone and node.run.out_dims[output] == axis
    if (node, output) in trusted:
        return alone and axis == 0
    if alone and axis == 0 and not first and _has_samples_first(shape_of(node, output), batch):
        return True if not _selected((node, output), batch, trusted) else None
    return None


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
            if not kept or any(shape_of(*one) != shape_of(node, place) for one in known):
                return True
        stack.extend(known)
    return bool(stack)


def _selected(result: Output, rows: int, trusted: set[Output]) -> bool:
    """Return whether rows of a result were chosen or moved since an operation that is trusted.

    Args:
        result: the operation and its result.
        rows: the number of rows.
        trusted: as for ``in_order``.
    """
    stack, seen = [result], set()
    while stack and len(seen) < _NEAR:
        entry = stack.pop()
        if entry[0] is None or entry in seen or entry in trusted:
            continue
        seen.add(entry)
        node: Any = entry[0]
        kind = type(node).__name__.rpartition("Backward")[0]
        if kind == "_Expand":
            continue  # a stand-in, of whose rows none belongs to a sample
        if kind == "Index":  # a list of rows; with a second index, a position of each sample
            if len(node._saved_indices) == 1:
                return True
        elif kind in _CHOOSING and chosen_along(node, 0):
            return True
        stack += [(parent, place) for _, parent, place, shape in graph_parents(node)
                  if (shape and shape[0] == rows) or kind == "Index"]  # fmt: skip
    return False


def is_view_of_input(tensor: Tensor, inputs: Mapping[int, int], batch: int) -> bool:
    """Return whether the rows of a tensor are those of an input of the model, in their order.

    They may be part of the input: ``tokens[:, 1:]``.

    Args:
        tensor: ``(n, ...)``.
        inputs: by the address of an input, the distance in memory from sample to sample.
        batch: the number of samples B.
    """
    rows = tensor.shape[0]
    if rows == 0 or rows % batch:
        return False
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    length = sum((size - 1) * stride for size, stride in [*sizes][1:])
    each = rows // batch
    for address, distance in inputs.items():
        start, rest = divmod(tensor.data_ptr() - address, tensor.element_size())
        end = start + length + (each - 1) * tensor.stride(0)
        inside = start == 0 or 0 < start <= end < distance
        if rest == 0 and inside and (batch == 1 or tensor.stride(0) * each == distance):
            return True
    return False


def _has_samples_first(shape: tuple[int, ...], batch: int) -> bool:
    """Return whether dimension 0 is that of the samples, and no other may hold them, too."""
    if not shape or shape[0] != batch:
        return False
    for size in _others(shape):  # noqa: SIM110 - a generator takes twice as long
        if size % batch == 0:
            return False
    return True


def _others(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the sizes of the dimensions besides the first one that may be that of the samples."""
    return shape[1:-1] if len(shape) > 2 else shape[1:]
