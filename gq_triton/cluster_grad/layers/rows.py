"""Helpers of the families of layers: the rows of samples, and the type in which sums are formed.

Shapes: B samples, T rows per sample, N numbers per row.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from gq_triton.cluster_grad.site import UnknownRows
from gq_triton.grouping.groups import Groups
from gq_triton.ring import shaped

__all__ = [
    "accumulation_type",
    "add_rows_",
    "check_rows",
    "launches_cost",
    "memory_of_sums",
    "rounds_to_tf32",
    "samples",
]

# The usual types, for which torch need not be asked.
_NARROW = {torch.float16, torch.bfloat16, torch.float32}


def samples(tensor: Tensor, groups: Groups, layer: str) -> Tensor:
    """Return ``(B, T, N)`` from ``(B, ..., N)``, or from rows ``(B T, N)`` in order of samples."""
    check_rows(tensor, groups, layer)
    batch = groups.labels.numel()
    if tensor.dim() == 3 and len(tensor) == batch:
        return tensor
    # T is computed: reshape cannot infer it for a layer without inputs, whose rows are empty.
    return tensor.reshape(batch, tensor.shape[:-1].numel() // batch, tensor.shape[-1])


def check_rows(tensor: Tensor, groups: Groups, layer: str) -> None:
    """Raise ``UnknownRows`` unless the first dimension can be that of the clustered samples."""
    batch, first = groups.labels.numel(), tensor.shape[0] if tensor.dim() else 0
    if first == 0 or first % batch:
        raise UnknownRows(f"{layer} saw {first} rows for {batch} samples")


def accumulation_type(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which sums of numbers of a type are formed: float32 at least."""
    return torch.float32 if dtype in _NARROW else torch.promote_types(dtype, torch.float32)


def launches_cost(tensor: Tensor) -> bool:
    """Return whether operations on a tensor are launches, each of which costs the host time."""
    return tensor.device.type != "cpu"


def memory_of_sums(
    clusters: int, param: Tensor, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return memory for sums ``(K, *param.shape)``, each cluster's in the parameter's order."""
    if param.is_contiguous():
        return torch.empty((clusters, *param.shape), dtype=dtype, device=device)
    return shaped(torch.empty(clusters, param.numel(), dtype=dtype, device=device), like=param)


def add_rows_(sums: Tensor, where: Tensor, rows: Tensor) -> None:
    """Add rows ``(n, N)`` to the rows ``where`` of ``(V, N)``, in an order that is always the same.

    On a GPU ``index_add_`` adds in the order of arrival. The operation of indexing's own backward
    pass sorts by row, and the host checks no index.
    """
    if launches_cost(sums):
        torch.ops.aten._index_put_impl_(sums, [where], rows, accumulate=True, unsafe=True)
    else:
        sums.index_add_(0, where, rows)


def rounds_to_tf32(operation: Literal["matmul", "conv"]) -> bool:
    """Return whether torch's setting lets an operation round float32 to tf32 on a GPU.

    Torch 2.9 introduced a setting by name. Where it was used, to read the older one is an error.
    """
    cuda: Any = torch.backends.cuda.matmul
    setting: Any = cuda if operation == "matmul" else getattr(torch.backends.cudnn, "conv", None)
    if hasattr(setting, "fp32_precision"):
        return setting.fp32_precision == "tf32"
    return cuda.allow_tf32 if operation == "matmul" else torch.backends.cudnn.allow_tf32
