# pyright: basic, reportInvalidTypeForm=false, reportArgumentType=false, reportCallIssue=false
"""The samples of a batch in the order of their clusters, and the numbers of the clusters.

Shape legend: B = samples, K = clusters, W = columns of the table.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gq_triton.kernels.launch import device_guard

__all__ = ["group"]

# Samples and clusters of a tile. Every number of clusters takes the same compiled kernel.
TILE_B, TILE_K = 256, 32
NUM_WARPS = 8


@triton.jit
def _raised(n, power):
    """Return ``n**power`` in float64, for n >= 0 and power >= 0.

    Example: 4 ** 0.5 = 2; the powers 0 and 1 are exact.
    """
    general = tl.where(n > 0, tl.exp2(power * tl.log2(tl.where(n > 0, n, 1.0))), 0.0)
    return tl.where(power == 0, 1.0, tl.where(power == 1, n, general))


@triton.jit(do_not_specialize=["batch", "clusters", "width"])
def _group_kernel(
    labels, weights, whole_ptr, order, offsets, table, batch, clusters, width,
    whole: tl.float64, steps: tl.float64, power: tl.float64, unit: tl.float64,
    STANDARD_ERROR: tl.constexpr, TILE_B: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """Write order, offsets and table of a batch; a single program does all of it.

    Example: labels 1, 0, 1 of K = 2: order 1, 0, 2, offsets 0, 1, 3; with steps, power and unit 1
    the inverse shares are 3 and 3/2, the mixture 1/3 and 2/3.
    """
    sample = tl.arange(0, TILE_B)
    # In the interpreter these are floats, which it would take as float32.
    whole, steps = tl.full((), whole, tl.float64), tl.full((), steps, tl.float64)
    power, unit = tl.full((), power, tl.float64), tl.full((), unit, tl.float64)
    total = tl.full((), 0.0, tl.float64)
    mass = tl.full((), 0.0, tl.float64)
    begin = tl.full((), 0, tl.int32)
    for first in range(0, clusters, TILE_K):
        k = first + tl.arange(0, TILE_K)
        sizes = tl.zeros((TILE_K,), tl.int32)
        n = tl.zeros((TILE_K,), tl.float64)
        for at in range(0, batch, TILE_B):
            live = at + sample < batch
            label = tl.load(labels + at + sample, mask=live, other=-1).to(tl.int32)
            hot = label[:, None] == k[None, :]
            sizes += tl.sum(hot.to(tl.int32), axis=0)
            if weights is not None:
                weight = tl.load(weights + at + sample, mask=live, other=0.0).to(tl.float64)
                n += tl.sum(tl.where(hot, weight[:, None], 0.0), axis=0)
        if weights is None:
            n = sizes.to(tl.float64)
        ends = begin + tl.cumsum(sizes, axis=0)
        place = ends - sizes
        tl.store(offsets + k, place.to(tl.int64), mask=k < clusters)
        for at in range(0, batch, TILE_B):
            live = at + sample < batch
            label = tl.load(labels + at + sample, mask=live, other=-1).to(tl.int32)
            hot = (label[:, None] == k[None, :]).to(tl.int32)
            rank = tl.sum(hot * (place[None, :] + tl.cumsum(hot, axis=0) - 1), axis=1)
            mine = tl.sum(hot, axis=1) > 0
            tl.store(order + rank, (at + sample).to(tl.int64), mask=mine)
            place += tl.sum(hot, axis=0)
        begin += tl.sum(sizes)
        powers = tl.where(sizes > 0, _raised(n, power), 0.0)
        total += tl.sum(n)
        mass += tl.sum(powers)
        # Kept in the table until the totals are known.
        tl.store(table + k, n, mask=k < clusters)
        tl.store(table + width + k, powers, mask=k < clusters)
        tl.store(table + 2 * width + k, sizes.to(tl.float64), mask=k < clusters)
    tl.store(offsets + clusters, begin.to(tl.int64))
    tl.debug_barrier()
    if whole_ptr is not None:
        whole = tl.load(whole_ptr).to(tl.float64)
    one = tl.full((), 1.0, tl.float64)
    spread = one
    if STANDARD_ERROR:
        spread = tl.sqrt(whole * steps / batch.to(tl.float64))
    for first in range(0, width, TILE_K):
        k = first + tl.arange(0, TILE_K)
        known, kept = k < clusters, k < width
        n = tl.load(table + k, mask=known, other=0.0)
        powers = tl.load(table + width + k, mask=known, other=0.0)
        sizes = tl.load(table + 2 * width + k, mask=known, other=0.0)
        share = n / (total * steps)
        full = (sizes > 0) & (share > 0)
        inverse = tl.where(full, 1.0 / tl.where(full, share * unit, 1.0), 0.0)
        scale = tl.where(known, one, 0.0)
        if STANDARD_ERROR:
            scale = tl.where(known, tl.sqrt(whole * steps / tl.maximum(sizes, 1.0)), 0.0)
        tl.store(table + k, inverse, mask=kept)
        tl.store(table + width + k, powers / mass / steps * unit, mask=kept)
        tl.store(table + 2 * width + k, scale, mask=kept)
        row = table + 3 * width + k
        tl.store(row, tl.where(k == 0, mass, tl.where(k == 1, total, 0.0)), mask=kept)
        tl.store(row + width, tl.where(k == 0, steps / unit, 0.0), mask=kept)
        tl.store(row + 2 * width, tl.where(k == 0, unit / steps, 0.0), mask=kept)
        tl.store(row + 3 * width, tl.where(k == 0, spread, 0.0), mask=kept)
        tl.store(row + 4 * width, tl.where(k == 0, _raised(total, power), 0.0), mask=kept)


def group(
    labels: Tensor,
    clusters: int,
    *,
    sample_weights: Tensor | None,
    whole_batch: int | Tensor,
    steps: int,
    power: float,
    unit: float,
    standard_error: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Order the samples by cluster and compute the clusters' numbers; see ``engines.protocol``.

    One launch of one program. Repeats agree bit for bit.

    Raises:
        ValueError: labels or weights are not flat, or the labels are not int64.
    """
    flat = {"labels": labels, "sample_weights": sample_weights}
    for name, tensor in flat.items():
        if tensor is not None and tensor.shape != (labels.numel(),):
            raise ValueError(f"{name} must have shape (B,), got {tuple(tensor.shape)}")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, got {labels.dtype}")
    device, batch = labels.device, labels.numel()
    width = max(2, clusters + clusters % 2)  # rows that start at multiples of 16 bytes
    whole = whole_batch if isinstance(whole_batch, Tensor) else None
    with device_guard(device):
        order = torch.empty(batch, dtype=torch.int64, device=device)
        offsets = torch.empty(clusters + 1, dtype=torch.int64, device=device)
        table = torch.empty(8, width, dtype=torch.float64, device=device)
        _group_kernel[(1,)](
            labels.contiguous(),
            None if sample_weights is None else sample_weights.to(device).contiguous(),
            None if whole is None else whole.to(device), order, offsets, table, batch, clusters,
            width, 0.0 if isinstance(whole_batch, Tensor) else float(whole_batch), float(steps),
            float(power), float(unit), STANDARD_ERROR=standard_error, TILE_B=TILE_B, TILE_K=TILE_K,
            num_warps=NUM_WARPS,
        )  # fmt: skip
    return order, offsets, table
