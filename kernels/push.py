# pyright: basic, reportInvalidTypeForm=false, reportArgumentType=false
"""The queueing of gradients that were weighted elsewhere, one launch per alignment class.

Shape legend: N = tensors, L = queue slots, P = elements of one tensor.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from gq_triton.kernels.chunks import (
    GRAD,
    QUEUE,
    STRIDE,
    chunk_bounds,
    count_when_last,
    find_tensor,
    ring_turn,
    typed,
)
from gq_triton.kernels.launch import as_bytes, device_guard, ring_launch
from gq_triton.kernels.law import inverse_scale, load, put_row, to_queue

__all__ = ["push_"]


@triton.jit(do_not_specialize=["n_tensors"])
def _push_kernel(
    rows, starts, n_tensors, ticket, finite_ptr, grad_scale_ptr,
    G_DTYPE: tl.constexpr, Q_DTYPE: tl.constexpr, C_DTYPE: tl.constexpr, L: tl.constexpr,
    W: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write one chunk of a gradient over the oldest row of its ring.

    Example: L = 2, rows 1 (oldest) and 2, g = 3 under a loss scale of 4: rows 0.75 and 2.
    """
    chunk = tl.program_id(0)
    tensor = find_tensor(starts, n_tensors, chunk)
    row = rows + tensor.to(tl.int64) * W
    first, count = chunk_bounds(starts, row, tensor, chunk, CHUNK)
    slot, _, queue_it = ring_turn(row, finite_ptr, L)
    if queue_it:
        g_ptr = typed(tl.load(row + GRAD), G_DTYPE, ALIGNED) + first
        ring = typed(tl.load(row + QUEUE), Q_DTYPE, ALIGNED) + first
        stride = tl.load(row + STRIDE)
        unscale = inverse_scale(grad_scale_ptr, C_DTYPE)
        full = count // BLOCK * BLOCK
        for at in range(0, full, BLOCK):
            offsets = at + tl.arange(0, BLOCK)
            g = load(g_ptr + offsets, True, C_DTYPE) * unscale
            put_row(ring, stride, slot, to_queue(g, Q_DTYPE), offsets, True, L, ALIGNED)
        if full < count:
            offsets = full + tl.arange(0, BLOCK)
            mask = offsets < count
            g = load(g_ptr + offsets, mask, C_DTYPE) * unscale
            put_row(ring, stride, slot, to_queue(g, Q_DTYPE), offsets, mask, L, ALIGNED)
    count_when_last(rows, n_tensors, ticket, finite_ptr, None, W, 0)


def push_(
    grads: Sequence[Tensor],
    queues: Sequence[Tensor],
    queued: Sequence[Tensor],
    accepted: Tensor | None,
    *,
    grad_scale: Tensor | None = None,
) -> None:
    """Queue gradients that were weighted elsewhere; see ``engines.protocol``.

    Raises:
        ValueError: the lists disagree in length, shape, dtype or layout.
    """
    if not grads:
        return
    with device_guard(grads[0].device):
        ring, tables = ring_launch(grads, queues, queued, {})
        flags = as_bytes(accepted)
        for table in tables:
            _push_kernel[table.grid](
                table.rows, table.starts, table.n_tensors, table.ticket, flags, grad_scale,
                ALIGNED=table.aligned, **ring.constants,
            )  # fmt: skip
