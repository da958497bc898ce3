# pyright: basic, reportInvalidTypeForm=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false
"""Gradients of shifts and scales by cluster: sums of ``dy`` and of ``dy * (x - mean) * rstd``.

``dy`` and ``x`` are read once. No sum per sample, no product and no normalised input is stored. A
program adds up some rows of one cluster, which are a part; a second kernel adds the parts of each
cluster in a fixed order.

Shape legend: B = samples, K = clusters, T or S = positions of a sample, N or C = columns (shifts),
G = groups of a GroupNorm, M = parts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gq_triton.kernels.launch import TRITON_DTYPE, device_guard
from gq_triton.kernels.law import load

__all__ = ["channel_sums", "position_sums"]

# Elements a program works on at a time: 8 per thread and tensor.
TILE = 2048
# Most columns of such a tile.
MOST_COLUMNS = 128
# Rows that a program adds up: enough that the sums it writes are few against the rows it reads.
ROWS = 128
NUM_WARPS = 8
# Parts and columns of a tile of the second kernel.
TILE_M, TILE_N = 32, 64


@triton.jit
def _find_part(offsets, n_clusters, unit, PART: tl.constexpr, K: tl.constexpr):
    """Return this program's part: its cluster, its first row, and the row after its last.

    Each cluster is cut into parts of PART rows; a sample has ``unit`` rows. Programs beyond the
    last part get cluster ``n_clusters``.

    Example: sizes 3, 0, 2 (offsets 0, 3, 3, 5), 2 rows per sample, PART = 4: parts of cluster 0
    begin at rows 0 and 4 of 6, the one of cluster 2 at row 6; the fourth program has none.
    """
    part = tl.program_id(0)
    k = tl.arange(0, K)
    begin = tl.load(offsets + k, mask=k < n_clusters, other=0).to(tl.int32) * unit
    end = tl.load(offsets + k + 1, mask=k < n_clusters, other=0).to(tl.int32) * unit
    parts = tl.cdiv(end - begin, PART)
    before = tl.cumsum(parts)
    cluster = tl.sum((before <= part).to(tl.int32))
    mine = k == cluster
    row = tl.sum(tl.where(mine, begin + (part - before + parts) * PART, 0))
    last = tl.minimum(row + PART, tl.sum(tl.where(mine, end, 0)))
    return tl.minimum(cluster, n_clusters), row, last


@triton.jit(do_not_specialize=["n_clusters"])
def _position_kernel(
    dy, x, mean, rstd, order, offsets, shifts, scales, positions, n, n_clusters,
    C_DTYPE: tl.constexpr, PART: tl.constexpr, TILE_R: tl.constexpr, TILE_C: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    """Write one part's sums over its rows ``(b, t)`` for TILE_C columns.

    Example: rows 1, 2 of one cluster and 4 of another: parts 3 and 4.
    """
    cluster, begin, end = _find_part(offsets, n_clusters, positions, PART, K)
    if cluster == n_clusters:
        return
    columns = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    exists = columns < n
    shift = tl.zeros((TILE_R, TILE_C), C_DTYPE)
    scale = tl.zeros((TILE_R, TILE_C), C_DTYPE)
    for first in range(begin, end, TILE_R):
        rows = first + tl.arange(0, TILE_R)
        live = rows < end
        sample = tl.load(order + rows // positions, mask=live, other=0)
        row = sample * positions + rows % positions
        mask = live[:, None] & exists[None, :]
        g = load(dy + row[:, None] * n + columns[None, :], mask, C_DTYPE)
        shift += g
        if x is not None:
            v = load(x + row[:, None] * n + columns[None, :], mask, C_DTYPE)
            if mean is not None:
                v -= load(mean + row, live, C_DTYPE)[:, None]
            scale += g * (v * load(rstd + row, live, C_DTYPE)[:, None])
    out = tl.program_id(0).to(tl.int64) * n + columns
    tl.store(shifts + out, tl.sum(shift, axis=0), mask=exists)
    if x is not None:
        tl.store(scales + out, tl.sum(scale, axis=0), mask=exists)


@triton.jit(do_not_specialize=["n_clusters"])
def _channel_kernel(
    dy, x, mean, rstd, stride_stat, order, offsets, shifts, scales, positions, n, per_group,
    n_clusters,
    C_DTYPE: tl.constexpr, PART: tl.constexpr, TILE_C: tl.constexpr, TILE_S: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    """Write one part's sums over its samples and their positions for TILE_C channels.

    Example: one channel, two positions; samples (1, 2) and (3, 4) of one cluster: 10.
    """
    cluster, begin, end = _find_part(offsets, n_clusters, 1, PART, K)
    if cluster == n_clusters:
        return
    first_channel = tl.program_id(1) * TILE_C
    channels = first_channel + tl.arange(0, TILE_C)
    exists = channels < n
    s = tl.arange(0, TILE_S)
    # Offsets from the tile's first channel in one sample: 32 bits are enough.
    within = tl.arange(0, TILE_C)[:, None] * positions + s[None, :]
    shift = tl.zeros((TILE_C, TILE_S), C_DTYPE)
    scale = tl.zeros((TILE_C, TILE_S), C_DTYPE)
    for at in range(begin, end):
        sample = tl.load(order + at)
        if x is not None:
            stat = sample * stride_stat + channels // per_group
            center = load(mean + stat, exists, C_DTYPE)[:, None]
            rate = load(rstd + stat, exists, C_DTYPE)[:, None]
        for first in range(0, positions, TILE_S):
            at_s = (sample * n + first_channel) * positions + first
            mask = exists[:, None] & (s < positions - first)[None, :]
            g = load(dy + at_s + within, mask, C_DTYPE)
            shift += g
            if x is not None:
                v = load(x + at_s + within, mask, C_DTYPE)
                scale += g * ((v - center) * rate)
    out = tl.program_id(0).to(tl.int64) * n + channels
    tl.store(shifts + out, tl.sum(shift, axis=1), mask=exists)
    if x is not None:
        tl.store(scales + out, tl.sum(scale, axis=1), mask=exists)


@triton.jit(do_not_specialize=["n_clusters", "n_parts"])
def _total_parts_kernel(
    parts, offsets, sums, n, n_parts, n_clusters, unit,
    PART: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Add up one cluster's parts, as `_find_part` cuts them, for TILE_N columns.

    Example: parts 3, 4, 5 of which the first two are cluster 0's: 7 and 5.
    """
    cluster, output = tl.program_id(0), tl.program_id(2).to(tl.int64)
    parts += output * n_parts * n
    sums += output * n_clusters * n
    k = tl.arange(0, K)
    begin = tl.load(offsets + k, mask=k < n_clusters, other=0).to(tl.int32) * unit
    end = tl.load(offsets + k + 1, mask=k < n_clusters, other=0).to(tl.int32) * unit
    counts = tl.cdiv(end - begin, PART)
    first = tl.sum(tl.where(k < cluster, counts, 0))
    last = first + tl.sum(tl.where(k == cluster, counts, 0))
    columns = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    exists = columns < n
    total = tl.zeros((TILE_M, TILE_N), parts.dtype.element_ty)
    for at in range(first, last, TILE_M):
        row = at + tl.arange(0, TILE_M)
        mask = (row < last)[:, None] & exists[None, :]
        total += tl.load(parts + row.to(tl.int64)[:, None] * n + columns[None, :], mask, other=0.0)
    out = cluster.to(tl.int64) * n + columns
    tl.store(sums + out, tl.sum(total, axis=0), mask=exists)


def _check(dy: Tensor, x: Tensor | None, order: Tensor, offsets: Tensor) -> None:
    """Raise ValueError unless gradients, inputs, order and offsets fit each other."""
    known = [t.dtype in TRITON_DTYPE for t in (dy, x) if t is not None]
    if dy.dim() != 3 or not all(known) or (x is not None and x.shape != dy.shape):
        raise ValueError(
            f"dy and x must have one shape of three dimensions and one of the types "
            f"{', '.join(map(str, TRITON_DTYPE))}, got {tuple(dy.shape)} {dy.dtype}"
            + ("" if x is None else f" and {tuple(x.shape)} {x.dtype}")
        )
    if dy.shape[0] * max(dy.shape[1:]) >= 2**31 or dy.shape[1] * dy.shape[2] >= 2**31:
        raise ValueError(f"one call covers fewer than 2**31 rows, got dy {tuple(dy.shape)}")
    named = {"order": (order, dy.shape[0]), "offsets": (offsets, max(len(offsets), 2))}
    for name, (tensor, length) in named.items():
        right = tensor.shape == (length,) and tensor.is_contiguous()
        if not right or tensor.dtype != torch.int64 or tensor.device != dy.device:
            raise ValueError(
                f"{name} must be contiguous int64 of shape ({length},) on {dy.device}, got "
                f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
            )


def _check_statistics(
    x: Tensor | None, shapes: tuple[tuple[int, ...], ...], **statistics: Tensor | None
) -> None:
    """Raise ValueError unless x comes with statistics, each in one of the shapes."""
    for name, tensor in statistics.items():
        if tensor is None:
            continue
        wide = tensor.dtype in (torch.float32, torch.float64)
        if x is None or tensor.shape not in shapes or not (wide and tensor.is_contiguous()):
            raise ValueError(
                f"{name} must come with x, be contiguous float32 or float64 and of shape "
                f"{' or '.join(map(str, shapes))}, got {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}{' without x' if x is None else ''}"
            )
    if x is not None and statistics["rstd"] is None:
        raise ValueError("x needs rstd, its reciprocal standard deviation, got None")


class _Parts:
    """The common part of both launchers: the parts, their number, and the second kernel.

    Attributes:
        shifts: ``(M, N)`` sums of ``dy`` by part.
        scales: ``(M, N)`` sums of ``dy`` times the normalised input, or None.
        constants: the keyword arguments of the first kernel.
    """

    def __init__(
        self, dy: Tensor, x: Tensor | None, offsets: Tensor, n: int, rows: int, unit: int, part: int
    ) -> None:
        self.offsets, self.n, self.unit, self.clusters = offsets, n, unit, len(offsets) - 1
        types = (dy.dtype, *([] if x is None else [x.dtype]))
        dtype = torch.float64 if torch.float64 in types else torch.float32
        # Every cluster may end in a part that is not full.
        self.count = triton.cdiv(rows, part) + self.clusters
        outputs = 1 if x is None else 2
        self.parts = torch.empty(outputs, self.count, n, dtype=dtype, device=dy.device)
        self.shifts, self.scales = self.parts[0], None if x is None else self.parts[1]
        padded = max(triton.next_power_of_2(self.clusters), 16)
        self.constants = {"PART": part, "K": padded, "num_warps": NUM_WARPS}

    def total(self) -> tuple[Tensor, Tensor | None]:
        """Return the sums by cluster, ``(K, N)`` each."""
        outputs = len(self.parts)
        sums = self.parts.new_empty(outputs, self.clusters, self.n)
        if self.n:
            _total_parts_kernel[(self.clusters, triton.cdiv(self.n, TILE_N), outputs)](
                self.parts, self.offsets, sums, self.n, self.count, self.clusters, self.unit,
                TILE_M=TILE_M, TILE_N=TILE_N, **self.constants,
            )  # fmt: skip
        return sums[0], sums[1] if outputs == 2 else None


def position_sums(
    dy: Tensor,
    order: Tensor,
    offsets: Tensor,
    *,
    x: Tensor | None = None,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Sum by cluster and column, over all positions; see ``engines.protocol``.

    Summed in float32 (float64 if a tensor is float64), in an order that depends on the clusters'
    sizes only: repeats agree bit for bit.

    Raises:
        ValueError: the tensors disagree in shape, dtype, layout or device.
    """
    _check(dy, x, order, offsets)
    batch, positions, n = dy.shape
    _check_statistics(x, ((batch, positions),), mean=mean, rstd=rstd)
    columns = min(triton.next_power_of_2(max(n, 1)), MOST_COLUMNS)
    rows = TILE // columns
    with device_guard(dy.device):
        parts = _Parts(dy, x, offsets, n, batch * positions, positions, max(ROWS, rows))
        if n:
            _position_kernel[(parts.count, triton.cdiv(n, columns))](
                dy.contiguous(), None if x is None else x.contiguous(), mean, rstd, order, offsets,
                parts.shifts, parts.scales, positions, n, parts.clusters, TILE_R=rows,
                TILE_C=columns, C_DTYPE=TRITON_DTYPE[parts.shifts.dtype], **parts.constants,
            )  # fmt: skip
        return parts.total()


def channel_sums(
    dy: Tensor,
    order: Tensor,
    offsets: Tensor,
    *,
    x: Tensor | None = None,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Sum by cluster and channel, over all positions; see ``engines.protocol``.

    Summed in float32 (float64 if a tensor is float64), in an order that depends on the clusters'
    sizes only: repeats agree bit for bit.

    Raises:
        ValueError: the tensors disagree in shape, dtype, layout or device.
    """
    _check(dy, x, order, offsets)
    batch, n, positions = dy.shape
    groups = 1 if rstd is None else rstd.shape[-1]
    _check_statistics(x, ((batch, groups), (1, groups)), mean=mean, rstd=rstd)
    if x is not None and (mean is None or rstd is None or mean.shape != rstd.shape or n % groups):
        raise ValueError(
            f"mean and rstd must have one shape (B, G) where G divides the {n} channels, got "
            f"{None if mean is None else tuple(mean.shape)} and "
            f"{None if rstd is None else tuple(rstd.shape)}"
        )
    width = min(triton.next_power_of_2(max(positions, 1)), ROWS)
    channels = min(TILE // width, MOST_COLUMNS, triton.next_power_of_2(max(n, 1)))
    samples = max(1, ROWS // max(positions, 1))
    with device_guard(dy.device):
        parts = _Parts(dy, x, offsets, n, batch, 1, samples)
        if n:
            _channel_kernel[(parts.count, triton.cdiv(n, channels))](
                dy.contiguous(), None if x is None else x.contiguous(), mean, rstd,
                0 if rstd is None or len(rstd) == 1 else groups, order, offsets, parts.shifts,
                parts.scales, positions, n, n // max(groups, 1), parts.clusters, TILE_C=channels,
                TILE_S=width, C_DTYPE=TRITON_DTYPE[parts.shifts.dtype], **parts.constants,
            )  # fmt: skip
        return parts.total()
