# pyright: basic, reportInvalidTypeForm=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false
"""Gradients of shifts and scales by cluster: sums of ``dy`` and of ``dy * (x - mean) * rstd``.

``dy`` and ``x`` are read once. No sum per sample, no product and no normalised input is stored. A
program adds up some rows of one cluster, which are a part. The program that ends a cluster's last
part adds its parts, in a fixed order.

Shape legend: B = samples, K = clusters, T or S = positions of a sample, N or C = columns (shifts),
G = groups of a GroupNorm, M = parts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gq_triton.kernels.launch import TRITON_DTYPE, device_guard
from gq_triton.kernels.law import load
from gq_triton.kernels.tickets import take_tickets
from gq_triton.layer_sums import LayerSums

__all__ = [
    "add_rows",
    "channel_sums",
    "check_sums",
    "find_part",
    "finish",
    "position_sums",
]

# Elements a program works on at a time: 8 per thread and tensor.
TILE = 2048
# Most columns of such a tile.
MOST_COLUMNS = 128
# Rows that a program adds up: enough that the sums it writes are few against the rows it reads.
ROWS = 128
NUM_WARPS = 8


@triton.jit
def find_part(part, offsets, n_clusters, unit, PART: tl.constexpr, K: tl.constexpr):
    """Return a part's cluster, its first row, and the row after its last.

    Each cluster is cut into parts of PART rows; a sample has ``unit`` rows. An empty cluster has
    one part without rows. Numbers beyond the last part get cluster ``n_clusters``. The last two
    results are the cluster's first part and the number of its parts.

    Example: sizes 3, 0, 2 (offsets 0, 3, 3, 5), 2 rows per sample, PART = 4: parts of cluster 0
    begin at rows 0 and 4 of 6, those of clusters 1 and 2 at row 6; there is no fifth part.
    """
    k = tl.arange(0, K)
    begin = tl.load(offsets + k, mask=k < n_clusters, other=0).to(tl.int32) * unit
    end = tl.load(offsets + k + 1, mask=k < n_clusters, other=0).to(tl.int32) * unit
    parts = tl.where(k < n_clusters, tl.maximum(tl.cdiv(end - begin, PART), 1), 0)
    before = tl.cumsum(parts)
    cluster = tl.sum((before <= part).to(tl.int32))
    mine = k == cluster
    first = tl.sum(tl.where(mine, before - parts, 0))
    row = tl.sum(tl.where(mine, begin, 0)) + (part - first) * PART
    last = tl.minimum(row + PART, tl.sum(tl.where(mine, end, 0)))
    count = tl.sum(tl.where(mine, parts, 0))
    return tl.minimum(cluster, n_clusters), row, last, first, count


@triton.jit
def _add_parts(
    parts, sums, cluster, first, count, columns, exists, n, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the sum of a cluster's parts, for COLUMNS columns of n.

    Example: parts 3, 4, 5 of which the first two are cluster 0's: 7.
    """
    total = tl.zeros((ROWS, COLUMNS), parts.dtype.element_ty)
    for at in range(first, first + count, ROWS):
        row = at + tl.arange(0, ROWS)
        mask = (row < first + count)[:, None] & exists[None, :]
        place = parts + row.to(tl.int64)[:, None] * n + columns[None, :]
        # Other programs wrote the parts: what this multiprocessor's own cache holds may be older.
        total += tl.load(place, mask, other=0.0, cache_modifier=".cg")
    tl.store(sums + cluster.to(tl.int64) * n + columns, tl.sum(total, axis=0), mask=exists)


@triton.jit
def finish(
    shifts, scales, sum_shifts, sum_scales, has_scales, tickets, part, offsets, n_clusters, unit,
    columns, exists, n, PART: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add up the parts of a cluster in the program that gets here last, for its columns.

    Every program of the cluster and these columns calls this once, after it has written its part,
    and takes a number. Whoever takes the last one knows that all parts are written. It puts the
    ticket back to 0 for the next launch. No program waits for another.

    ``tickets`` has one ticket per cluster, ``exists`` says which of the columns there are.
    """
    tl.debug_barrier()  # what all threads wrote comes before the number
    # Found anew: kept since the beginning, it would take registers from the sums.
    cluster, _, _, first, count = find_part(part, offsets, n_clusters, unit, PART, K)
    ticket = tickets + cluster
    if tl.atomic_add(ticket, 1) == count - 1:
        tl.store(ticket, 0)
        _add_parts(shifts, sum_shifts, cluster, first, count, columns, exists, n, ROWS, COLUMNS)
        if has_scales:
            _add_parts(scales, sum_scales, cluster, first, count, columns, exists, n, ROWS, COLUMNS)


@triton.jit
def add_rows(
    dy, x, mean, rstd, has_x, has_mean, order, begin, end, columns, exists, positions, n,
    C_DTYPE: tl.constexpr, TILE_R: tl.constexpr, TILE_C: tl.constexpr,
):  # fmt: skip
    """Return the sums of ``dy`` and of ``dy * (x - mean) * rstd`` over rows ``(b, t)`` of a part.

    Example: rows 1 and 2 of one column: 3, and 0 without ``x``.
    """
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
        if has_x:
            v = load(x + row[:, None] * n + columns[None, :], mask, C_DTYPE)
            if has_mean:
                v -= load(mean + row, live, C_DTYPE)[:, None]
            scale += g * (v * load(rstd + row, live, C_DTYPE)[:, None])
    return tl.sum(shift, axis=0), tl.sum(scale, axis=0)


@triton.jit(do_not_specialize=["n_clusters"])
def _position_kernel(
    dy, x, mean, rstd, order, offsets, shifts, scales, sum_shifts, sum_scales, tickets, positions,
    n, n_clusters,
    C_DTYPE: tl.constexpr, PART: tl.constexpr, TILE_R: tl.constexpr, TILE_C: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    """Write one part's sums over its rows ``(b, t)`` for TILE_C columns; end its cluster's sums.

    Example: rows 1, 2 of one cluster and 4 of another: parts 3 and 4.
    """
    part, block = tl.program_id(0), tl.program_id(1)
    cluster, begin, end, _, _ = find_part(part, offsets, n_clusters, positions, PART, K)
    if cluster == n_clusters:
        return
    columns = block * TILE_C + tl.arange(0, TILE_C)
    exists = columns < n
    shift, scale = add_rows(
        dy, x, mean, rstd, x is not None, mean is not None, order, begin, end, columns, exists,
        positions, n, C_DTYPE, TILE_R, TILE_C,
    )  # fmt: skip
    out = part.to(tl.int64) * n + columns
    tl.store(shifts + out, shift, mask=exists)
    if x is not None:
        tl.store(scales + out, scale, mask=exists)
    finish(
        shifts, scales, sum_shifts, sum_scales, x is not None, tickets + block * n_clusters, part,
        offsets, n_clusters, positions, columns, exists, n, PART, K, TILE_R, TILE_C,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_clusters"])
def _channel_kernel(
    dy, x, mean, rstd, stride_stat, order, offsets, shifts, scales, sum_shifts, sum_scales, tickets,
    positions, n, per_group, n_clusters,
    C_DTYPE: tl.constexpr, PART: tl.constexpr, TILE_C: tl.constexpr, TILE_S: tl.constexpr,
    TILE_M: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Write one part's sums over its samples and their positions for TILE_C channels.

    The program that ends a cluster's last part writes the cluster's sums.

    Example: one channel, two positions; samples (1, 2) and (3, 4) of one cluster: 10.
    """
    part, block = tl.program_id(0), tl.program_id(1)
    cluster, begin, end, _, _ = find_part(part, offsets, n_clusters, 1, PART, K)
    if cluster == n_clusters:
        return
    first_channel = block * TILE_C
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
    out = part.to(tl.int64) * n + channels
    tl.store(shifts + out, tl.sum(shift, axis=1), mask=exists)
    if x is not None:
        tl.store(scales + out, tl.sum(scale, axis=1), mask=exists)
    finish(
        shifts, scales, sum_shifts, sum_scales, x is not None, tickets + block * n_clusters, part,
        offsets, n_clusters, 1, channels, exists, n, PART, K, TILE_M, TILE_C,
    )  # fmt: skip


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


def _check_positions(
    dy: Tensor, x: Tensor | None, mean: Tensor | None, rstd: Tensor | None
) -> None:
    _check_statistics(x, (tuple(dy.shape[:2]),), mean=mean, rstd=rstd)


def _check_channels(dy: Tensor, x: Tensor | None, mean: Tensor | None, rstd: Tensor | None) -> None:
    batch, n, _ = dy.shape
    groups = 1 if rstd is None else rstd.shape[-1]
    _check_statistics(x, ((batch, groups), (1, groups)), mean=mean, rstd=rstd)
    if x is not None and (mean is None or rstd is None or mean.shape != rstd.shape or n % groups):
        raise ValueError(
            f"mean and rstd must have one shape (B, G) where G divides the {n} channels, got "
            f"{None if mean is None else tuple(mean.shape)} and "
            f"{None if rstd is None else tuple(rstd.shape)}"
        )


def check_sums(layer: LayerSums, order: Tensor, offsets: Tensor) -> None:
    """Raise ValueError unless a layer of `sums_all` is what ``engines.protocol`` says."""
    dy, x, mean, rstd, *sums, images = layer.as_declared(len(offsets) - 1)
    _check(dy, x, order, offsets)
    (_check_channels if images else _check_positions)(dy, x, mean, rstd)
    if not all(tensor.is_contiguous() for tensor in (dy, x) if tensor is not None):
        raise ValueError(f"dy and x must be contiguous, got strides {dy.stride()}")
    types = [dy.dtype, torch.float32] + ([] if x is None else [x.dtype])
    wide = torch.float64 if torch.float64 in types else torch.float32
    shape = len(offsets) - 1, dy.shape[1 if images else 2]
    for name, out, wanted in zip(("shifts", "scales"), sums, (True, x is not None), strict=True):
        if (out is not None) != wanted:
            raise ValueError(f"{name} must be given {'' if wanted else 'only '}with x, got {out}")
        if out is not None and (
            out.shape != shape or out.dtype != wide or not out.is_contiguous()
            or out.device != dy.device
        ):  # fmt: skip
            raise ValueError(
                f"{name} must be contiguous {wide} of shape {shape} on {dy.device}, got "
                f"{out.dtype} of shape {tuple(out.shape)} on {out.device}"
            )


class _Parts:
    """The common part of both launchers: the parts, their number, and the results.

    Attributes:
        count: M, the number of parts.
        memory: the sums of ``dy`` and those of ``dy`` times the normalised input, by part
            ``(M, N)`` and by cluster ``(K, N)``, and the tickets; None for what is not wanted.
        constants: the keyword arguments of the kernel.
    """

    def __init__(
        self, dy: Tensor, x: Tensor | None, offsets: Tensor, n: int, rows: int, part: int,
        columns: int,
    ) -> None:  # fmt: skip
        clusters = len(offsets) - 1
        types = (dy.dtype, *([] if x is None else [x.dtype]))
        dtype = torch.float64 if torch.float64 in types else torch.float32
        # Every cluster may end in a part that is not full.
        self.count = triton.cdiv(rows, part) + clusters
        outputs = 1 if x is None else 2
        parts = torch.empty(outputs, self.count, n, dtype=dtype, device=dy.device)
        self.sums = torch.empty(outputs, clusters, n, dtype=dtype, device=dy.device)
        pair = (*parts, *[None] * (2 - outputs)), (*self.sums, *[None] * (2 - outputs))
        self.blocks = triton.cdiv(n, columns)
        self.memory = *pair[0], *pair[1], take_tickets(dy.device, clusters * self.blocks)
        padded = max(triton.next_power_of_2(clusters), 16)
        self.constants = {
            "PART": part, "K": padded, "C_DTYPE": TRITON_DTYPE[dtype], "TILE_C": columns,
            "num_warps": NUM_WARPS,
        }  # fmt: skip

    def result(self) -> tuple[Tensor, Tensor | None]:
        """Return the sums by cluster, ``(K, N)`` each."""
        return self.sums[0], self.sums[1] if len(self.sums) == 2 else None


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
    _check_positions(dy, x, mean, rstd)
    columns = min(triton.next_power_of_2(max(n, 1)), MOST_COLUMNS)
    rows = TILE // columns
    with device_guard(dy.device):
        parts = _Parts(dy, x, offsets, n, batch * positions, max(ROWS, rows), columns)
        if n:
            _position_kernel[(parts.count, parts.blocks)](
                dy.contiguous(), None if x is None else x.contiguous(), mean, rstd, order, offsets,
                *parts.memory, positions, n, len(offsets) - 1, TILE_R=rows, **parts.constants,
            )  # fmt: skip
        return parts.result()


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
    _check_channels(dy, x, mean, rstd)
    width = min(triton.next_power_of_2(max(positions, 1)), ROWS)
    channels = min(TILE // width, MOST_COLUMNS, triton.next_power_of_2(max(n, 1)))
    samples = max(1, ROWS // max(positions, 1))
    with device_guard(dy.device):
        parts = _Parts(dy, x, offsets, n, batch, samples, channels)
        if n:
            _channel_kernel[(parts.count, parts.blocks)](
                dy.contiguous(), None if x is None else x.contiguous(), mean, rstd,
                0 if rstd is None or len(rstd) == 1 else groups, order, offsets, *parts.memory,
                positions, n, n // max(groups, 1), len(offsets) - 1, TILE_S=width,
                TILE_M=TILE // MOST_COLUMNS, **parts.constants,
            )  # fmt: skip
        return parts.result()
