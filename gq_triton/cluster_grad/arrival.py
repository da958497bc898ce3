"""In which order the rows of samples arrive at a layer, and how they are put in order."""

from typing import Any

import torch
from torch import Tensor

from gq_triton.cluster_grad.converted import Converted
from gq_triton.cluster_grad.layers.embedding import EMBEDDING
from gq_triton.cluster_grad.layers.linear import CONV1D, LINEAR
from gq_triton.cluster_grad.layers.norm import LAYER_NORM, RMS_NORM
from gq_triton.cluster_grad.layers.order import (
    JOINED,
    SECOND,
    in_order,
    is_view_of_input,
    other_order,
)
from gq_triton.cluster_grad.passes import in_backward
from gq_triton.cluster_grad.site import Collector
from gq_triton.cluster_grad.standins.origin import saving_hooks

__all__ = ["as_before", "by_sample", "is_ordered", "order_of", "samples_first"]

# Families that work on the last dimensions alone.
_ROW_BY_ROW = (LINEAR, CONV1D, LAYER_NORM, RMS_NORM)


def order_of(x: Tensor, own: Converted) -> tuple[str, bool | None]:
    """Return the other order in which a layer's input has its rows; empty if it has none.

    The second result is that of ``is_ordered`` for an input without another order, if it was found.
    """
    collector, family = own.collector, own.family
    module: Any = own.module
    # Layers that work on the last dimensions take samples in any other one.
    kept = x.dim() - (len(module.normalized_shape) if family in (LAYER_NORM, RMS_NORM) else 1)
    if collector.batch_dim:
        kept = 2 if family is EMBEDDING else kept
        second = family in (EMBEDDING, *_ROW_BY_ROW) and kept > 1
        return SECOND if second and x.shape[1] == collector.batch else "", None
    if torch.compiler.is_compiling() or family is EMBEDDING:
        return "", None
    by_row = family in _ROW_BY_ROW and kept > 1
    if not x.requires_grad:
        turned = by_row and x.shape[1] == collector.batch and not is_ordered(x, collector)
        # The memory of an input of the model shows which dimension is which.
        turned = turned and collector.inputs.get(x.data_ptr()) == x.stride(1)
        return SECOND if turned else "", None
    # A checkpointed segment, which runs again in the backward pass, shows no order there.
    if saving_hooks() is not None or in_backward():
        return "", None
    if is_ordered(x, collector):
        return "", True
    order = other_order(x, collector.batch, collector.trusted)
    return ("", False) if order == SECOND and not by_row else (order, None if order else False)


def samples_first(x: Tensor, order: str, batch: int) -> Tensor:
    """Return a tensor with its samples' rows in order."""
    if order == JOINED:
        return x.unflatten(0, (-1, batch)).transpose(0, 1).flatten(0, 1)
    return x.transpose(0, 1) if order else x


def as_before(out: Tensor, order: str, batch: int) -> Tensor:
    """Return a layer's output in the order of its input."""
    if order == JOINED:
        return out.unflatten(0, (batch, -1)).transpose(0, 1).flatten(0, 1)
    return out.transpose(0, 1) if order else out


def is_ordered(x: Tensor, collector: Collector) -> bool:
    """Return whether the rows of a layer's input are those of the samples, in their order."""
    batch = collector.batch
    if x.dim() == 0:
        return True
    if torch.compiler.is_compiling():
        # Rows in two dimensions may be tokens in any order, as those of an expert are.
        return x.dim() != 2 or x.shape[0] == batch
    if not x.requires_grad and x.data_ptr() in collector.inputs:
        return is_view_of_input(x, collector.inputs, batch)
    return in_order(x, batch, collector.trusted)


def by_sample(indices: Tensor, collector: Collector) -> bool:
    """Return whether each sample looks up rows of its own.

    Positions and tables of distances, which all samples share, may have the shape of such indices.
    Only the model's own inputs are known to be of samples. What other indices look up becomes a
    stand-in, which the first operation with samples tells by. A compiled graph does not show the
    memory: there two dimensions, of which the first alone is as long as the batch, are believed.
    """
    batch, dims = collector.batch, indices.dim()
    if dims == 0 or indices.shape[0] == 0 or indices.shape[0] % batch:
        return False
    if not torch.compiler.is_compiling():
        return is_view_of_input(indices, collector.inputs, batch)
    return dims > 1 and indices.shape[0] == batch and indices.shape[1] != batch
