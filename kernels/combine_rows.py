# pyright: basic, reportInvalidTypeForm=false, reportArgumentType=false, reportCallIssue=false
"""The law for clusters on the rows of a table that were looked up: no sum by cluster is stored.

Shape legend: n = lookups, d = columns, V = rows of the table, K = clusters, L = queue slots.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gq_triton.float8 import slots
from gq_triton.kernels.combine import check_clusters, mean_and_weight
from gq_triton.kernels.launch import (
    TRITON_DTYPE,
    check_queues,
    check_scalars,
    device_guard,
)
from gq_triton.kernels.law import inverse_scale, load, reciprocal, spread, store
from gq_triton.law import Law

__all__ = ["combine_rows"]

# Columns of one program, at most, and of a thread: with four a thread keeps values on its stack.
WIDEST, THREAD = 512, 2


@triton.jit(do_not_specialize=["n", "n_rows", "n_clusters"])
def _combine_rows_kernel(
    grads, order, keys, n, queue, stride_queue, queued_ptr, length_ptr, grad_scale_ptr,
    inverse_shares, mixture, sigma_scales, weighted, raw, partials, flag, width, n_rows, n_clusters,
    low: tl.float64, high: tl.float64,
    C_DTYPE: tl.constexpr, Q_DTYPE: tl.constexpr, L: tl.constexpr, TILE: tl.constexpr,
    REPAIR: tl.constexpr,
):  # fmt: skip
    """Combine some columns of one row of the table, and write their five statistics.

    ``keys`` are sorted, ``row * K + cluster`` of each lookup; ``order`` says which lookup it is.
    The program of a row's first lookup adds up all lookups of the row, cluster by cluster. All
    other programs, and those of rows past the table, return at once. Rows that nobody looked up
    are not written; the very first program adds their weights of 1.

    The first launch clears ``flag`` where the raw gradient is not finite. The second, with REPAIR,
    repeats the work with every weight 1 if it was cleared, and else returns at once.

    Example: K = 2, rows 3, 0, 3 of clusters 1, 0, 0: keys 0, 6, 7. The program of key 6 adds up the
    last lookup, of cluster 0, and the first, of cluster 1.
    """
    if REPAIR:
        if tl.load(flag) != 0:
            return
    at = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    key = tl.load(keys + at)
    row = key // n_clusters
    before = tl.load(keys + at - 1, mask=at > 0, other=-n_clusters) // n_clusters
    works = (row != before) & (row < n_rows)
    out = partials + (at * tl.num_programs(1) + tile) * 5
    ones = tl.where((at == 0) & (tile == 0), (n_rows * width).to(tl.float64), 0.0)
    if not works:
        tl.store(out, 0.0)
        tl.store(out + 1, 0.0)
        tl.store(out + 2, ones)
        tl.store(out + 3, 0.0)
        tl.store(out + 4, 0.0)
        return
    offsets = tile * TILE + tl.arange(0, TILE)
    mask = offsets < width
    queued = tl.load(queued_ptr)
    active = (queued >= L) & (not REPAIR)
    length = None if length_ptr is None else tl.load(length_ptr).to(tl.int32)
    base, mean, inverse, sigma = spread(  # pyright: ignore[reportGeneralTypeIssues]
        queue + row * width, stride_queue, queued % L, offsets, mask, length, C_DTYPE, L, False
    )
    rate = reciprocal(sigma)
    unscale = inverse_scale(grad_scale_ptr, C_DTYPE)
    low_c = tl.full((), low, C_DTYPE)
    high_c = tl.full((), high, C_DTYPE)
    total = tl.zeros((TILE,), C_DTYPE)
    result = tl.zeros((TILE,), C_DTYPE)
    mass = tl.zeros((TILE,), C_DTYPE)
    highs = tl.zeros((TILE,), C_DTYPE)
    lows = tl.zeros((TILE,), C_DTYPE)
    whole = tl.full((), 0.0, tl.float64)
    for k in range(0, n_clusters):
        s = tl.zeros((TILE,), C_DTYPE)
        while key == row * n_clusters + k:
            s += load(grads + tl.load(order + at) * width + offsets, mask, C_DTYPE)
            at += 1
            key = tl.load(keys + at, mask=at < n, other=-1)
        total += s
        inverse_share = tl.load(inverse_shares + k).to(C_DTYPE)
        if inverse_share > 0:
            c, w = mean_and_weight(
                s, inverse_share, tl.load(sigma_scales + k), base, mean, inverse, rate, unscale,
                active, low_c, high_c, Q_DTYPE,
            )  # fmt: skip
            result += tl.load(mixture + k).to(C_DTYPE) * (w * c)
            share = reciprocal(inverse_share)
            mass += share * w
            highs += tl.where(w >= high_c, share, 0.0)
            lows += tl.where(w <= low_c, share, 0.0)
            whole += share.to(tl.float64)
    store(raw + row * width + offsets, total, mask)
    store(weighted + row * width + offsets, result, mask)
    zero = tl.zeros((TILE,), C_DTYPE)
    tl.store(out, tl.sum(total * unscale * (total * unscale)).to(tl.float64))
    tl.store(out + 1, tl.sum(result * unscale * (result * unscale)).to(tl.float64))
    counted = tl.sum(tl.where(mask, 1, 0)).to(tl.float64)
    weights = tl.sum(tl.where(mask, mass, zero)).to(tl.float64) / whole
    tl.store(out + 2, ones + weights - counted)
    # With rho = 1 every weight is at both bounds: the counts would mean nothing, so they are 0.
    whole = tl.where(low_c < high_c, whole, float("inf"))
    tl.store(out + 3, tl.sum(tl.where(mask, highs, zero)).to(tl.float64) / whole)
    tl.store(out + 4, tl.sum(tl.where(mask, lows, zero)).to(tl.float64) / whole)
    if not REPAIR:
        bad = tl.max(tl.where(tl.abs(total) < float("inf"), 0, 1))
        tl.store(flag, tl.full((), 0, tl.uint8), mask=bad > 0)


def combine_rows(
    grads: Tensor,
    where: Tensor,
    labels: Tensor,
    queue: Tensor,
    queued: Tensor,
    law: Law,
    *,
    inverse_shares: Tensor,
    mixture: Tensor,
    sigma_scales: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight the cluster means of the rows that were looked up; see ``engines.protocol``.

    Computed in float32 (float64 if a tensor is float64). A row's lookups are added up one after
    the other, those of a cluster in their order. Repeats agree bit for bit.

    Raises:
        ValueError: the tensors disagree in shape, dtype, layout or device.
    """
    (n, width), device, clusters = grads.shape, grads.device, len(inverse_shares)
    wide = torch.float64 if torch.float64 in (grads.dtype, queue.dtype) else torch.float32
    dtype = torch.promote_types(grads.dtype, torch.float32)
    raw = torch.zeros(queue.shape[1] // width, width, dtype=dtype, device=device)
    weighted = torch.zeros_like(raw)
    check_queues([queue], [raw])
    check_scalars("queued", [queued], [raw], torch.int64)
    check_clusters(
        clusters, device, inverse_shares=inverse_shares, mixture=mixture, sigma_scales=sigma_scales
    )
    for name, vector in (("where", where), ("labels", labels)):
        if vector.shape != (n,) or vector.dtype != torch.int64 or vector.device != device:
            raise ValueError(
                f"{name} must be ({n},) int64 on {device}, got {tuple(vector.shape)} "
                f"{vector.dtype} on {vector.device}"
            )
    keys, order = torch.sort(where * clusters + labels, stable=True)
    tile = min(WIDEST, max(32, triton.next_power_of_2(width)))
    tiles = triton.cdiv(width, tile)
    with device_guard(device):
        partials = torch.empty(n * tiles, 5, dtype=torch.float64, device=device)
        flag = torch.ones((), dtype=torch.uint8, device=device)
        for repair in (False, True):
            _combine_rows_kernel[(n, tiles)](
                grads.contiguous(), order, keys, n, queue, queue.stride(0), queued, law.length,
                law.grad_scale, inverse_shares, mixture, sigma_scales, weighted, raw, partials,
                flag, width, len(raw), clusters, 1.0 / law.rho, float(law.rho),
                C_DTYPE=TRITON_DTYPE[wide], Q_DTYPE=TRITON_DTYPE[queue.dtype], L=slots(queue),
                TILE=tile, REPAIR=repair, num_warps=max(1, tile // (32 * THREAD)),
            )  # fmt: skip
    return weighted, raw, partials, flag.view(torch.bool)
