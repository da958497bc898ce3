# pyright: basic, reportInvalidTypeForm=false, reportArgumentType=false
"""GQSGD: the law and one step of SGD for many tensors in one launch per alignment class.

Shape legend: N = tensors, L = queue slots, P = elements of one tensor.
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
    QUEUED,
    STRIDE,
    chunk_bounds,
    count_when_last,
    find_tensor,
    ring_turn,
    typed,
    unless_found_inf,
)
from gq_triton.kernels.launch import as_bytes, device_guard, device_of, ring_launch
from gq_triton.kernels.law import inverse_scale, load, store, weigh_and_queue
from gq_triton.kernels.rounding import key_of, store_weight
from gq_triton.law import Law

__all__ = ["gqsgd_"]

_PARAM = tl.constexpr(6)
_BUFFER = tl.constexpr(7)


@triton.jit
def _sgd_block(
    p_ptr, g_ptr, buffer_ptr, ring, stride, slot, offsets, mask, active, queue_it, length, low,
    high, unscale, lr, momentum, undamped, weight_decay, first, key,
    DECAY: tl.constexpr, NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr, FIRST: tl.constexpr,
    STOCHASTIC: tl.constexpr, L: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Update one block from element ``first`` on; scalars are in the compute type."""
    g = load(g_ptr + offsets, mask, lr.dtype) * unscale
    p = load(p_ptr + offsets, mask, lr.dtype)
    g = g * weigh_and_queue(
        g, ring, stride, slot, offsets, mask, active, queue_it, length, low, high, L, ALIGNED
    )
    if MAXIMIZE:
        g = -g
    if DECAY:
        g = g + weight_decay * p
    if buffer_ptr is not None:
        if FIRST:
            buffer = g
        else:
            old = load(buffer_ptr + offsets, mask, lr.dtype)
            buffer = old * momentum + undamped * g
        store(buffer_ptr + offsets, buffer, mask)
        g = g + momentum * buffer if NESTEROV else buffer
    store_weight(p_ptr + offsets, p - lr * g, mask, first + offsets, key, STOCHASTIC)


@triton.jit(do_not_specialize=["n_tensors", "place"])
def _gqsgd_kernel(
    rows, starts, n_tensors, place, ticket, finite_ptr, length_ptr, grad_scale_ptr, found_inf_ptr,
    lr_ptr,
    lr: tl.float64, momentum: tl.float64, undamped: tl.float64, weight_decay: tl.float64,
    low: tl.float64, high: tl.float64,
    P_DTYPE: tl.constexpr, G_DTYPE: tl.constexpr, Q_DTYPE: tl.constexpr, B_DTYPE: tl.constexpr,
    C_DTYPE: tl.constexpr, DECAY: tl.constexpr, NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr,
    FIRST: tl.constexpr, STOCHASTIC: tl.constexpr, L: tl.constexpr, W: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update one chunk: ``g* = w g``, ``m = momentum m + undamped g*``, ``p = p - lr m``.

    Scalars come in float64 and are rounded once to the compute type ``C_DTYPE``. ``B_DTYPE`` is
    None without momentum.

    Example: L = 4, rows 1, 1, 1, 5, rho = 3, g = 5, lr = 0.1, p = 1, no momentum: w = 1.732,
    p = 1 - 0.1 * 8.66 = 0.134; the oldest row becomes 5.
    """
    chunk = tl.program_id(0)
    tensor = find_tensor(starts, n_tensors, chunk)
    row = rows + tensor.to(tl.int64) * W
    first, count = chunk_bounds(starts, row, tensor, chunk, CHUNK)
    count = unless_found_inf(count, found_inf_ptr)
    slot, active, queue_it = ring_turn(row, finite_ptr, L)
    queued = tl.load(typed(tl.load(row + QUEUED), tl.int64, False))
    key = key_of(queued, place + tl.load(row + INDEX))
    p_ptr = typed(tl.load(row + _PARAM), P_DTYPE, ALIGNED) + first
    g_ptr = typed(tl.load(row + GRAD), G_DTYPE, ALIGNED) + first
    ring = typed(tl.load(row + QUEUE), Q_DTYPE, ALIGNED) + first
    stride = tl.load(row + STRIDE)
    buffer_ptr = None
    if B_DTYPE is not None:
        buffer_ptr = typed(tl.load(row + _BUFFER), B_DTYPE, ALIGNED) + first
    length = None if length_ptr is None else tl.load(length_ptr).to(tl.int32)
    unscale = inverse_scale(grad_scale_ptr, C_DTYPE)
    rate = tl.full((), lr, C_DTYPE) if lr_ptr is None else tl.load(lr_ptr).to(C_DTYPE)
    momentum_c = tl.full((), momentum, C_DTYPE)
    undamped_c = tl.full((), undamped, C_DTYPE)
    decay_c = tl.full((), weight_decay, C_DTYPE)
    low_c = tl.full((), low, C_DTYPE)
    high_c = tl.full((), high, C_DTYPE)
    full = count // BLOCK * BLOCK
    for at in range(0, full, BLOCK):
        _sgd_block(
            p_ptr, g_ptr, buffer_ptr, ring, stride, slot, at + tl.arange(0, BLOCK), True,
            active, queue_it, length, low_c, high_c, unscale, rate, momentum_c, undamped_c, decay_c,
            first, key, DECAY, NESTEROV, MAXIMIZE, FIRST, STOCHASTIC, L, ALIGNED,
        )  # fmt: skip
    if full < count:
        offsets = full + tl.arange(0, BLOCK)
        _sgd_block(
            p_ptr, g_ptr, buffer_ptr, ring, stride, slot, offsets, offsets < count,
            active, queue_it, length, low_c, high_c, unscale, rate, momentum_c, undamped_c, decay_c,
            first, key, DECAY, NESTEROV, MAXIMIZE, FIRST, STOCHASTIC, L, ALIGNED,
        )  # fmt: skip
    count_when_last(rows, n_tensors, ticket, finite_ptr, found_inf_ptr, W, 0)


def gqsgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    queues: Sequence[Tensor],
    queued: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] | None,
    accepted: Tensor | None,
    law: Law,
    *,
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first: bool,
    stochastic_rounding: bool = False,
    place: int = 0,
) -> None:
    """Take one step of SGD on weighted gradients; see ``engines.protocol``.

    Computed in float32 (float64 if a tensor is float64) with one rounding at each store; types may
    differ from list to list. The host does not wait for a learning rate on the device.

    Raises:
        ValueError: the lists disagree in length, shape, dtype or layout.
    """
    if not grads:
        return
    buffers = None if momentum == 0 else momentum_buffers
    vectors = {"params": params} | ({} if buffers is None else {"momentum_buffers": buffers})
    # A learning rate on the host, a number or a tensor, is passed by value.
    device = device_of(grads)
    on_device = isinstance(lr, Tensor) and lr.device == device
    lr_tensor = lr if on_device else None
    with device_guard(device):
        ring, tables = ring_launch(grads, queues, queued, vectors)
        flags = as_bytes(accepted)
        for table in tables:
            _gqsgd_kernel[table.grid](
                table.rows, table.starts, table.n_tensors, place, table.ticket,
                flags, law.length, law.grad_scale, law.found_inf, lr_tensor,
                0.0 if on_device else float(lr), float(momentum),
                float(1 - dampening), float(weight_decay), 1.0 / law.rho, float(law.rho),
                P_DTYPE=ring.dtypes["params"], B_DTYPE=ring.dtypes.get("momentum_buffers"),
                DECAY=weight_decay != 0, NESTEROV=nesterov, MAXIMIZE=maximize, FIRST=first,
                STOCHASTIC=stochastic_rounding and params[0].dtype == torch.bfloat16,
                ALIGNED=table.aligned, **ring.constants,
            )  # fmt: skip
