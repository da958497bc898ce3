# pyright: basic, reportInvalidTypeForm=false, reportArgumentType=false, reportCallIssue=false
"""The law for clusters: the weighted sum of the clusters' mean gradients, in one pass over memory.

Shape legend: K = clusters, L = queue slots, P = elements of one parameter, C = chunks of a launch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gq_triton.float8 import slots
from gq_triton.kernels.launch import (
    THREADS,
    TRITON_DTYPE,
    block_size,
    check_queues,
    check_scalars,
    device_guard,
    num_warps,
)
from gq_triton.kernels.law import (
    fold,
    inverse_scale,
    load,
    product,
    reciprocal,
    spread,
    store,
    to_queue,
    widen,
)
from gq_triton.law import Law

__all__ = ["combine"]

# Elements one program works on: fewer than `launch.CHUNK`, since a launch has one tensor only.
CHUNK = 4096


@triton.jit
def mean_and_weight(
    s, inverse_share, scale, base, mean, inverse, rate, unscale, active, low, high,
    Q_DTYPE: tl.constexpr,
):  # fmt: skip
    """Return the mean gradient of one cluster, and its weights.

    Example: a share of 1/2 and s = 2.5 give c = 5; with mu = 2 and sigma = sqrt(3), w = 1.732.
    """
    c = product(s, inverse_share)
    x = widen(to_queue(product(c, unscale), Q_DTYPE), s.dtype)
    # ``inverse * rate`` would overflow for a constant queue, and 0 * inf is NaN.
    z = ((tl.abs((x - base) - mean) * inverse) * rate) * reciprocal(scale.to(s.dtype))
    return c, tl.where(active, tl.minimum(tl.maximum(z, low), high), 1.0)


@triton.jit
def combine_chunk(
    sums, stride_sums, queue, stride_queue, queued_ptr, length_ptr, grad_scale_ptr,
    inverse_shares, mixture, sigma_scales, weighted, raw, out, first, n, n_clusters, low, high,
    C_DTYPE: tl.constexpr, Q_DTYPE: tl.constexpr, L: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr, REPAIR: tl.constexpr,
):  # fmt: skip
    """Write ``sum_k p_k w(c_k) c_k`` and ``sum_k sums_k`` of one chunk, and its five statistics.

    Returns 1 where the raw gradient of the chunk is not finite, else 0. With REPAIR every weight
    is 1. Without ``queued_ptr`` the two rows of ``queue`` are the mean and 1 / sigma of a ring of
    Q_DTYPE; where 1 / sigma is NaN every weight is 1.

    Example: L = 4, rows 1, 1, 1, 5 (mu = 2, sigma = sqrt(3)), rho = 3, two clusters with a share of
    1/2 each and sums 2.5 and 1, so means 5 and 2: weights 1.732 and 1/3, weighted
    (8.66 + 0.667) / 2 = 4.66, raw 3.5; statistics 12.25, 21.8, 1.03, 0 and 0.5.
    """
    count = tl.minimum(n - first, CHUNK).to(tl.int32)
    if queued_ptr is not None:
        queued = tl.load(queued_ptr)
        slot, active = queued % L, (queued >= L) & (not REPAIR)
    length = None if length_ptr is None else tl.load(length_ptr).to(tl.int32)
    unscale = inverse_scale(grad_scale_ptr, C_DTYPE)
    low_c = tl.full((), low, C_DTYPE)
    high_c = tl.full((), high, C_DTYPE)
    zero = tl.full((), 0.0, C_DTYPE)
    raw_squares = tl.zeros((THREADS,), C_DTYPE)
    squares = tl.zeros((THREADS,), C_DTYPE)
    weights = tl.zeros((THREADS,), C_DTYPE)
    at_high = tl.zeros((THREADS,), C_DTYPE)
    at_low = tl.zeros((THREADS,), C_DTYPE)
    bad = tl.zeros((THREADS,), tl.int32)
    for at in range(0, count, BLOCK):
        offsets = at + tl.arange(0, BLOCK)
        mask = first + offsets < n
        if queued_ptr is None:
            base = load(queue + first + offsets, mask, C_DTYPE)
            inverse = load(queue + stride_queue + first + offsets, mask, C_DTYPE)
            mean = tl.zeros_like(base)
            rate = tl.full((), 1.0, C_DTYPE)
            active = (inverse == inverse) & (not REPAIR)
        else:
            base, mean, inverse, sigma = spread(
                queue + first, stride_queue, slot, offsets, mask, length, C_DTYPE, L, ALIGNED
            )
            rate = reciprocal(sigma)
        total = tl.zeros((BLOCK,), C_DTYPE)
        result = tl.zeros((BLOCK,), C_DTYPE)
        mass = tl.zeros((BLOCK,), C_DTYPE)
        highs = tl.zeros((BLOCK,), C_DTYPE)
        lows = tl.zeros((BLOCK,), C_DTYPE)
        part = sums + first
        for k in range(0, n_clusters):
            s = load(part + offsets, mask, C_DTYPE)
            total += s
            part += stride_sums
            inverse_share = tl.load(inverse_shares + k).to(C_DTYPE)
            if inverse_share > 0:
                c, w = mean_and_weight(
                    s, inverse_share, tl.load(sigma_scales + k), base, mean, inverse, rate,
                    unscale, active, low_c, high_c, Q_DTYPE,
                )  # fmt: skip
                result += tl.load(mixture + k).to(C_DTYPE) * (w * c)
                share = reciprocal(inverse_share)
                mass += share * w
                highs += tl.where(w >= high_c, share, zero)
                lows += tl.where(w <= low_c, share, zero)
        store(raw + first + offsets, total, mask)
        store(weighted + first + offsets, result, mask)
        bad += fold(tl.where(tl.abs(total) < float("inf"), 0, 1), THREADS)
        raw_squares += fold((total * unscale) * (total * unscale), THREADS)
        squares += fold((result * unscale) * (result * unscale), THREADS)
        weights += fold(tl.where(mask, mass, zero), THREADS)
        at_high += fold(tl.where(mask, highs, zero), THREADS)
        at_low += fold(tl.where(mask, lows, zero), THREADS)
    whole = tl.full((), 0.0, tl.float64)
    for k in range(0, n_clusters):
        inverse_share = tl.load(inverse_shares + k).to(C_DTYPE)
        if inverse_share > 0:
            # The shares are rounded as above, so that the mean of weights of 1 is 1.
            whole += reciprocal(inverse_share).to(tl.float64)
    tl.store(out, tl.sum(raw_squares).to(tl.float64))
    tl.store(out + 1, tl.sum(squares).to(tl.float64))
    tl.store(out + 2, tl.sum(weights).to(tl.float64) / whole)
    # With rho = 1 every weight is at both bounds: the counts would mean nothing, so they are 0.
    whole = tl.where(low_c < high_c, whole, float("inf"))
    tl.store(out + 3, tl.sum(at_high).to(tl.float64) / whole)
    tl.store(out + 4, tl.sum(at_low).to(tl.float64) / whole)
    return tl.max(bad)


@triton.jit(do_not_specialize=["n_clusters"])
def _combine_kernel(
    sums, stride_sums, queue, stride_queue, queued_ptr, length_ptr, grad_scale_ptr,
    inverse_shares, mixture, sigma_scales, weighted, raw, partials, flags, n, n_clusters,
    low: tl.float64, high: tl.float64,
    C_DTYPE: tl.constexpr, Q_DTYPE: tl.constexpr, L: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, THREADS: tl.constexpr, REPAIR: tl.constexpr,
):  # fmt: skip
    """Combine one chunk of a parameter; see `combine_chunk`.

    The first launch sets the chunk's byte of ``flags`` where the raw gradient of the chunk is not
    finite. The second launch, with REPAIR, returns at once if no byte is set. Otherwise it repeats
    the work with every weight 1.
    """
    if REPAIR:
        n_chunks = tl.cdiv(n, CHUNK)
        found = tl.full((), 0, tl.int32)
        for at in range(0, n_chunks, THREADS):
            flag = at + tl.arange(0, THREADS)
            some = tl.load(flags + flag, mask=flag < n_chunks, other=0)
            found = tl.maximum(found, tl.max(some.to(tl.int32)))
        if found == 0:
            return
    chunk = tl.program_id(0).to(tl.int64)
    bad = combine_chunk(
        sums, stride_sums, queue, stride_queue, queued_ptr, length_ptr, grad_scale_ptr,
        inverse_shares, mixture, sigma_scales, weighted, raw, partials + chunk * 5,
        chunk * CHUNK, n, n_clusters, low, high,
        C_DTYPE, Q_DTYPE, L, False, CHUNK, BLOCK, THREADS, REPAIR,
    )  # fmt: skip
    if not REPAIR:
        tl.store(flags + chunk, bad.to(tl.uint8))


def check_clusters(clusters: int, device: torch.device, **vectors: Tensor) -> None:
    """Raise ValueError unless each vector is ``(K,)`` float64, contiguous, on the device."""
    for name, vector in vectors.items():
        right = vector.shape == (clusters,) and vector.is_contiguous()
        if not right or vector.dtype != torch.float64 or vector.device != device:
            raise ValueError(
                f"{name} must be contiguous float64 of shape ({clusters},) on {device}, got "
                f"{vector.dtype} of shape {tuple(vector.shape)} on {vector.device}"
            )


def check_outputs(sums: Tensor, *outputs: Tensor) -> None:
    """Raise ValueError unless each output is ``(P,)``, contiguous, of the sums' type and device."""
    for out in outputs:
        right = out.shape == sums.shape[1:] and out.is_contiguous()
        if not right or out.dtype != sums.dtype or out.device != sums.device:
            raise ValueError(
                f"into must hold contiguous {sums.dtype} of shape {tuple(sums.shape[1:])} on "
                f"{sums.device}, got {out.dtype} of shape {tuple(out.shape)} on {out.device}"
            )


def combine(
    sums: Tensor,
    queue: Tensor,
    queued: Tensor | None,
    law: Law,
    *,
    inverse_shares: Tensor,
    mixture: Tensor,
    sigma_scales: Tensor,
    into: tuple[Tensor, Tensor] | None = None,
    queue_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight the cluster means of one parameter and add them up; see ``engines.protocol``.

    Computed in float32 (float64 if a tensor is float64). The queue's statistics are computed once
    per element and the sums are read once. Repeats agree bit for bit.

    Raises:
        ValueError: the tensors disagree in shape, dtype, layout or device.
    """
    clusters, n = sums.shape
    device = sums.device
    if n > 1 and sums.stride(1) != 1:
        sums = sums.contiguous()
    check_queues([queue], [sums[0]])
    if queued is not None:
        check_scalars("queued", [queued], [sums], torch.int64)
    check_clusters(
        clusters, device, inverse_shares=inverse_shares, mixture=mixture, sigma_scales=sigma_scales
    )
    chunks = -(-n // CHUNK)
    dtypes = (sums.dtype, queue.dtype)
    wide = TRITON_DTYPE[torch.float64 if torch.float64 in dtypes else torch.float32]
    with device_guard(device):
        weighted, raw = into or (sums.new_empty(n), sums.new_empty(n))
        check_outputs(sums, weighted, raw)
        partials = torch.empty(chunks, 5, dtype=torch.float64, device=device)
        flags = torch.empty(chunks, dtype=torch.uint8, device=device)
        for repair in (False, True):
            if chunks:
                _combine_kernel[(chunks,)](
                    sums, sums.stride(0), queue, queue.stride(0), queued, law.length,
                    law.grad_scale,
                    inverse_shares, mixture, sigma_scales, weighted, raw, partials, flags, n,
                    clusters, 1.0 / law.rho, float(law.rho), C_DTYPE=wide,
                    Q_DTYPE=TRITON_DTYPE[queue_dtype or queue.dtype], L=slots(queue),
                    CHUNK=CHUNK, BLOCK=block_size(*dtypes), THREADS=THREADS, REPAIR=repair,
                    num_warps=num_warps(device),
                )  # fmt: skip
        return weighted, raw, partials
