# pyright: basic, reportInvalidTypeForm=false, reportArgumentType=false
"""GQAdamW: the law and one step of AdamW for many tensors in one launch per alignment class.

Shape legend: N = tensors, L = queue slots, P = elements of one tensor.
"""

import math
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
from gq_triton.kernels.law import divide, inverse_scale, load, square_root, store, weigh_and_queue
from gq_triton.kernels.rounding import key_of, store_weight
from gq_triton.law import Law

__all__ = ["gqadamw_"]

_PARAM = tl.constexpr(6)
_EXP_AVG = tl.constexpr(7)
_EXP_AVG_SQ = tl.constexpr(8)
_STEP = tl.constexpr(9)


@triton.jit
def _power(log2_base, exponent):
    """Return ``base ** exponent`` in float64; ``log2_base`` is -inf for base 0."""
    return tl.exp2(tl.full((), log2_base, tl.float64) * exponent.to(tl.float64))


@triton.jit
def _adamw_block(
    p_ptr, g_ptr, m_ptr, v_ptr, ring, stride, slot, offsets, mask, active, queue_it, length, low,
    high, unscale, keep, beta1, gain1, beta2, gain2, correction2, eps, step_size, first, key,
    MAXIMIZE: tl.constexpr, STOCHASTIC: tl.constexpr, L: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Update one block from element ``first`` on; scalars are in the compute type."""
    g = load(g_ptr + offsets, mask, keep.dtype) * unscale
    p = load(p_ptr + offsets, mask, keep.dtype)
    m = load(m_ptr + offsets, mask, keep.dtype)
    v = load(v_ptr + offsets, mask, keep.dtype)
    g = g * weigh_and_queue(
        g, ring, stride, slot, offsets, mask, active, queue_it, length, low, high, L, ALIGNED
    )
    if MAXIMIZE:
        g = -g
    # Interpolate from the nearer end, like torch.lerp.
    m = tl.where(gain1 < 0.5, m + gain1 * (g - m), g - (g - m) * beta1)
    v = v * beta2 + gain2 * g * g
    denominator = divide(square_root(v), correction2) + eps
    p = p * keep - divide(step_size * m, denominator)
    store(m_ptr + offsets, m, mask)
    store(v_ptr + offsets, v, mask)
    store_weight(p_ptr + offsets, p, mask, first + offsets, key, STOCHASTIC)


@triton.jit(do_not_specialize=["n_tensors", "place"])
def _gqadamw_kernel(
    rows, starts, n_tensors, place, ticket, finite_ptr, length_ptr, grad_scale_ptr, found_inf_ptr,
    lr_ptr,
    lr: tl.float64, beta1: tl.float64, log2_beta1: tl.float64, beta2: tl.float64,
    log2_beta2: tl.float64, eps: tl.float64, weight_decay: tl.float64,
    low: tl.float64, high: tl.float64,
    P_DTYPE: tl.constexpr, G_DTYPE: tl.constexpr, Q_DTYPE: tl.constexpr, M_DTYPE: tl.constexpr,
    V_DTYPE: tl.constexpr, C_DTYPE: tl.constexpr, MAXIMIZE: tl.constexpr,
    STOCHASTIC: tl.constexpr, L: tl.constexpr, W: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update one chunk with step number ``t``, one more than the tensor's counter holds.

    ``m = beta1 m + (1 - beta1) g*``, ``v = beta2 v + (1 - beta2) g*^2`` and
    ``p = (1 - lr wd) p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)``. Factors
    that do not depend on the element are formed in float64 and rounded once to ``C_DTYPE``.

    Example: t = 1, m = v = 0, p = 1, wd = 0, g* = 4: m and v are corrected to 4 and 16, so
    p = 1 - lr * 4 / 4.
    """
    chunk = tl.program_id(0)
    tensor = find_tensor(starts, n_tensors, chunk)
    row = rows + tensor.to(tl.int64) * W
    first, count = chunk_bounds(starts, row, tensor, chunk, CHUNK)
    count = unless_found_inf(count, found_inf_ptr)
    slot, active, queue_it = ring_turn(row, finite_ptr, L)
    queued = tl.load(typed(tl.load(row + QUEUED), tl.int64, False))
    key = key_of(queued, place + tl.load(row + INDEX))
    step = tl.load(typed(tl.load(row + _STEP), tl.float32, False)) + 1
    p_ptr = typed(tl.load(row + _PARAM), P_DTYPE, ALIGNED) + first
    g_ptr = typed(tl.load(row + GRAD), G_DTYPE, ALIGNED) + first
    m_ptr = typed(tl.load(row + _EXP_AVG), M_DTYPE, ALIGNED) + first
    v_ptr = typed(tl.load(row + _EXP_AVG_SQ), V_DTYPE, ALIGNED) + first
    ring = typed(tl.load(row + QUEUE), Q_DTYPE, ALIGNED) + first
    stride = tl.load(row + STRIDE)
    length = None if length_ptr is None else tl.load(length_ptr).to(tl.int32)
    unscale = inverse_scale(grad_scale_ptr, C_DTYPE)
    one = tl.full((), 1.0, tl.float64)
    rate = tl.full((), lr, tl.float64) if lr_ptr is None else tl.load(lr_ptr).to(tl.float64)
    step_size = (rate / (one - _power(log2_beta1, step))).to(C_DTYPE)
    correction2 = tl.sqrt(one - _power(log2_beta2, step)).to(C_DTYPE)
    keep = (one - rate * tl.full((), weight_decay, tl.float64)).to(C_DTYPE)
    gain1 = (one - tl.full((), beta1, tl.float64)).to(C_DTYPE)
    gain2 = (one - tl.full((), beta2, tl.float64)).to(C_DTYPE)
    beta1_c = tl.full((), beta1, C_DTYPE)
    beta2_c = tl.full((), beta2, C_DTYPE)
    eps_c = tl.full((), eps, C_DTYPE)
    low_c = tl.full((), low, C_DTYPE)
    high_c = tl.full((), high, C_DTYPE)
    full = count // BLOCK * BLOCK
    for at in range(0, full, BLOCK):
        _adamw_block(
            p_ptr, g_ptr, m_ptr, v_ptr, ring, stride, slot, at + tl.arange(0, BLOCK), True,
            active, queue_it, length, low_c, high_c, unscale,
            keep, beta1_c, gain1, beta2_c, gain2, correction2, eps_c, step_size,
            first, key, MAXIMIZE, STOCHASTIC, L, ALIGNED,
        )  # fmt: skip
    if full < count:
        offsets = full + tl.arange(0, BLOCK)
        _adamw_block(
            p_ptr, g_ptr, m_ptr, v_ptr, ring, stride, slot, offsets, offsets < count,
            active, queue_it, length, low_c, high_c, unscale,
            keep, beta1_c, gain1, beta2_c, gain2, correction2, eps_c, step_size,
            first, key, MAXIMIZE, STOCHASTIC, L, ALIGNED,
        )  # fmt: skip
    count_when_last(rows, n_tensors, ticket, finite_ptr, found_inf_ptr, W, _STEP)


def gqadamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    queues: Sequence[Tensor],
    queued: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    accepted: Tensor | None,
    law: Law,
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    stochastic_rounding: bool = False,
    place: int = 0,
) -> None:
    """Take one step of AdamW on weighted gradients; see ``engines.protocol``.

    Computed in float32 (float64 if a tensor is float64) with one rounding at each store; types may
    differ from list to list. The bias corrections come from the steps on the device. The host waits
    neither for the steps nor for a learning rate on the device.

    Raises:
        ValueError: the lists disagree in length, shape, dtype or layout.
    """
    if not grads:
        return
    vectors = {"params": params, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    # A learning rate on the host, a number or a tensor, is passed by value.
    device = device_of(grads)
    on_device = isinstance(lr, Tensor) and lr.device == device
    lr_tensor = lr if on_device else None
    with device_guard(device):
        ring, tables = ring_launch(grads, queues, queued, vectors, {"steps": steps})
        flags = as_bytes(accepted)
        for table in tables:
            _gqadamw_kernel[table.grid](
                table.rows, table.starts, table.n_tensors, place, table.ticket,
                flags, law.length, law.grad_scale, law.found_inf, lr_tensor,
                0.0 if on_device else float(lr), float(beta1), _log2(beta1),
                float(beta2), _log2(beta2), float(eps), float(weight_decay), 1.0 / law.rho,
                float(law.rho), P_DTYPE=ring.dtypes["params"], M_DTYPE=ring.dtypes["exp_avgs"],
                V_DTYPE=ring.dtypes["exp_avg_sqs"], MAXIMIZE=maximize,
                STOCHASTIC=stochastic_rounding and params[0].dtype == torch.bfloat16,
                ALIGNED=table.aligned, **ring.constants,
            )  # fmt: skip


def _log2(beta: float) -> float:
    return math.log2(beta) if beta > 0 else -math.inf
