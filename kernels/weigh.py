# pyright: basic, reportInvalidTypeForm=false, reportArgumentType=false
"""The law alone, for many tensors in one launch per alignment class: weights, queue and sums.

Shape legend: N = tensors, L = queue slots, P = elements of one tensor, C = chunks of a launch.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gq_triton.kernels.chunks import (
    GRAD,
    INDEX,
    QUEUE,
    STRIDE,
    chunk_bounds,
    count,
    find_tensor,
    ring_turn,
    typed,
)
from gq_triton.kernels.launch import THREADS, as_bytes, device_guard, ring_launch
from gq_triton.kernels.law import (
    fold,
    inverse_scale,
    load,
    store,
    weigh_and_queue,
)
from gq_triton.law import Law

__all__ = ["weigh_"]

# Sums of each tensor: g^2, (w g)^2, w, elements at rho, elements at 1/rho.
_SUMS = tl.constexpr(5)
# Both counts of a chunk share one int32 accumulator. One weight at 1/rho adds this number, which is
# larger than CHUNK, so that the counts cannot mix.
_AT_LOW = tl.constexpr(1 << 16)


@triton.jit
def _weigh_block(
    g_ptr, ring, stride, slot, offsets, mask, active, queue_it, length, low, high, unscale,
    raw, weighted, weights, saturated, L: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Weight one block and return the four sums ``(THREADS,)``, to which it has added its own."""
    scaled = load(g_ptr + offsets, mask, low.dtype)
    g = scaled * unscale
    w = weigh_and_queue(
        g, ring, stride, slot, offsets, mask, active, queue_it, length, low, high, L, ALIGNED
    )
    # Where the law does not act nothing is stored: a NaN keeps its bits.
    store(g_ptr + offsets, w * scaled, mask & active)
    raw += fold(g * g, raw.shape[0])
    weighted += fold((w * g) * (w * g), raw.shape[0])
    weights += fold(tl.where(mask, w, 0.0), raw.shape[0])
    at_low = tl.where(mask & active & (w <= low), _AT_LOW, 0)
    saturated += fold(tl.where(mask & active & (w >= high), 1, at_low), raw.shape[0])
    return raw, weighted, weights, saturated


@triton.jit(do_not_specialize=["n_tensors"])
def _weigh_kernel(
    rows, starts, n_tensors, finite_ptr, length_ptr, grad_scale_ptr, partials,
    low: tl.float64, high: tl.float64,
    G_DTYPE: tl.constexpr, Q_DTYPE: tl.constexpr, C_DTYPE: tl.constexpr, L: tl.constexpr,
    W: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    THREADS: tl.constexpr,
):  # fmt: skip
    """Replace one chunk of a gradient by ``w g``, queue the raw one, write the chunk's five sums.

    Example: L = 4, rows 1, 1, 1, 5, rho = 3, g = 5: w = 1.732, g becomes 8.66, the oldest row 5;
    the sums are 25, 75, 1.732, 0 and 0.
    """
    chunk = tl.program_id(0)
    tensor = find_tensor(starts, n_tensors, chunk)
    row = rows + tensor.to(tl.int64) * W
    first, count = chunk_bounds(starts, row, tensor, chunk, CHUNK)
    slot, active, queue_it = ring_turn(row, finite_ptr, L)
    g_ptr = typed(tl.load(row + GRAD), G_DTYPE, ALIGNED) + first
    ring = typed(tl.load(row + QUEUE), Q_DTYPE, ALIGNED) + first
    stride = tl.load(row + STRIDE)
    length = None if length_ptr is None else tl.load(length_ptr).to(tl.int32)
    unscale = inverse_scale(grad_scale_ptr, C_DTYPE)
    low_c = tl.full((), low, C_DTYPE)
    high_c = tl.full((), high, C_DTYPE)
    raw = tl.zeros((THREADS,), C_DTYPE)
    weighted = tl.zeros((THREADS,), C_DTYPE)
    weights = tl.zeros((THREADS,), C_DTYPE)
    saturated = tl.zeros((THREADS,), tl.int32)
    full = count // BLOCK * BLOCK
    for at in range(0, full, BLOCK):
        raw, weighted, weights, saturated = _weigh_block(
            g_ptr, ring, stride, slot, at + tl.arange(0, BLOCK), True, active, queue_it, length,
            low_c, high_c, unscale, raw, weighted, weights, saturated, L, ALIGNED,
        )  # fmt: skip
    if full < count:
        offsets = full + tl.arange(0, BLOCK)
        raw, weighted, weights, saturated = _weigh_block(
            g_ptr, ring, stride, slot, offsets, offsets < count, active, queue_it, length,
            low_c, high_c, unscale, raw, weighted, weights, saturated, L, ALIGNED,
        )  # fmt: skip
    out = partials + chunk.to(tl.int64) * _SUMS
    tl.store(out, tl.sum(raw).to(tl.float32))
    tl.store(out + 1, tl.sum(weighted).to(tl.float32))
    tl.store(out + 2, tl.sum(weights).to(tl.float32))
    # With rho = 1 every weight is at both bounds: the counts would mean nothing, so they are 0.
    both = tl.where(low_c < high_c, tl.sum(saturated), 0)
    tl.store(out + 3, (both % _AT_LOW).to(tl.float32))
    tl.store(out + 4, (both // _AT_LOW).to(tl.float32))


@triton.jit(do_not_specialize=["n_tensors", "n_chunks"])
def _total_kernel(
    rows, starts, n_tensors, n_chunks, finite_ptr, partials, sums,
    W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up the chunks of one tensor in a fixed order, and advance its counter.

    There are no atomics, so repeats agree bit for bit.

    Example: chunks ``[1, 2, 3, 0, 0]`` and ``[4, 5, 6, 1, 0]`` give ``[5, 7, 9, 1, 0]``.
    """
    tensor = tl.program_id(0)
    begin = tl.load(starts + tensor)
    end = tl.full((), n_chunks, tl.int64)
    if tensor + 1 < n_tensors:
        end = tl.load(starts + tensor + 1)
    row = rows + tensor.to(tl.int64) * W
    out = sums + tl.load(row + INDEX) * _SUMS
    for column in tl.static_range(_SUMS):  # pyright: ignore[reportGeneralTypeIssues]
        total = tl.zeros((BLOCK,), tl.float64)
        for at in range(begin, end, BLOCK):
            chunk = at + tl.arange(0, BLOCK)
            part = tl.load(partials + chunk * _SUMS + column, mask=chunk < end, other=0.0)
            total += part.to(tl.float64)
        tl.store(out + column, tl.sum(total).to(tl.float32))
    count(row, True, finite_ptr, None, 0)


def weigh_(
    grads: Sequence[Tensor],
    queues: Sequence[Tensor],
    queued: Sequence[Tensor],
    accepted: Tensor | None,
    law: Law,
) -> Tensor:
    """Weight gradients in place and queue the raw ones; see ``engines.protocol``.

    Computed in float32 (float64 if a tensor is float64) with one rounding at each store; the
    statistics are float32. Repeats agree bit for bit.

    Raises:
        ValueError: the lists disagree in length, shape, dtype or layout.
    """
    if not grads:
        return torch.zeros(0, 5)
    device = grads[0].device
    with device_guard(device):
        ring, tables = ring_launch(grads, queues, queued, {})
        flags = as_bytes(accepted)
        sums = torch.empty(len(grads), 5, device=device)
        for table in tables:
            partials = torch.empty(table.n_chunks, 5, device=device)
            if table.n_chunks:
                _weigh_kernel[(table.n_chunks,)](
                    table.rows, table.starts, table.n_tensors, flags, law.length, law.grad_scale,
                    partials, 1.0 / law.rho, float(law.rho), ALIGNED=table.aligned,
                    THREADS=THREADS, **ring.constants,
                )  # fmt: skip
            _total_kernel[(table.n_tensors,)](
                table.rows, table.starts, table.n_tensors, table.n_chunks, flags, partials, sums,
                W=ring.constants["W"], BLOCK=128,
            )  # fmt: skip
    return sums
