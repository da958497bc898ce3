# pyright: basic, reportArgumentType=false, reportCallIssue=false
"""The search for a NaN or an infinity in many gradients, one launch per alignment class.

Shape legend: N = tensors, P = elements of one tensor.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gq_triton.kernels.chunks import GRAD, INDEX, chunk_bounds, find_tensor, typed
from gq_triton.kernels.launch import (
    CHUNK,
    TRITON_DTYPE,
    VECTOR,
    Cache,
    Row,
    addresses,
    block_size,
    check_flat,
    device_guard,
    memo_of,
    num_warps,
    shared,
    tables,
)

__all__ = ["all_finite"]


@triton.jit(do_not_specialize=["n_tensors"])
def _all_finite_kernel(
    rows, starts, n_tensors, flags,
    DTYPE: tl.constexpr, W: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Clear the flag of a tensor whose chunk holds a NaN or an infinity.

    Every program that clears a flag writes the same byte, so the order does not matter.

    Example: tensors ``[1, 2]`` and ``[1, inf]`` turn flags ``[1, 1]`` into ``[1, 0]``.
    """
    chunk = tl.program_id(0)
    tensor = find_tensor(starts, n_tensors, chunk)
    row = rows + tensor.to(tl.int64) * W
    first, count = chunk_bounds(starts, row, tensor, chunk, CHUNK)
    g_ptr = typed(tl.load(row + GRAD), DTYPE, ALIGNED) + first
    bad = tl.zeros((BLOCK,), tl.int32)
    full = count // BLOCK * BLOCK
    for at in range(0, full, BLOCK):
        g = tl.load(g_ptr + at + tl.arange(0, BLOCK))
        g = g if DTYPE == tl.float64 else g.to(tl.float32)
        bad = tl.where(tl.abs(g) < float("inf"), bad, 1)
    if full < count:
        offsets = full + tl.arange(0, BLOCK)
        g = tl.load(g_ptr + offsets, mask=offsets < count, other=0.0)
        g = g if DTYPE == tl.float64 else g.to(tl.float32)
        bad = tl.where(tl.abs(g) < float("inf"), bad, 1)
    if tl.max(bad) > 0:
        tl.store(flags + tl.load(row + INDEX), tl.full((), 0, tl.uint8))


def all_finite(grads: Sequence[Tensor]) -> Tensor:
    """Return for each gradient whether all of its elements are finite; see ``engines.protocol``.

    Raises:
        ValueError: the gradients are not flat or differ in dtype.
    """
    if not grads:
        return torch.ones(0, dtype=torch.bool)
    memo = memo_of(grads)
    if memo is None:
        device, dtype, numels, cache = _settled(grads, shared)
    else:
        if "finite" not in memo:
            check_flat("grads", grads, grads)
            memo["finite"] = _settled(grads, {})
        device, dtype, numels, cache = memo["finite"]
    starts = addresses(grads)

    def rows() -> list[Row]:
        if memo is None:
            check_flat("grads", grads, grads)
        return list(zip(numels, range(len(numels)), starts, strict=True))

    key = "finite", device, dtype, numels, starts
    with device_guard(device):
        flags = torch.ones(len(numels), dtype=torch.uint8, device=device)
        for table in tables(device, key, cache, rows, lambda row: row[2] % VECTOR == 0):
            if table.n_chunks:
                _all_finite_kernel[(table.n_chunks,)](
                    table.rows, table.starts, table.n_tensors, flags,
                    DTYPE=TRITON_DTYPE[dtype], W=3, ALIGNED=table.aligned,
                    CHUNK=CHUNK, BLOCK=block_size(dtype, most=8), num_warps=num_warps(device),
                )  # fmt: skip
    return flags.view(torch.bool)


def _settled(
    grads: Sequence[Tensor], cache: Cache
) -> tuple[torch.device, torch.dtype, tuple[int, ...], Cache]:
    return grads[0].device, grads[0].dtype, tuple(map(Tensor.numel, grads)), cache
