# pyright: basic, reportInvalidTypeForm=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false
"""The sums of `sums.py` for many layers: one launch for those of one layout, types and alignment.

A table has one row of addresses per layer, and its programs are counted as chunks are elsewhere.

Shape legend: B = samples, K = clusters, T or S = positions of a sample, N or C = columns, G =
groups of a GroupNorm, M = parts of a layer.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gq_triton.kernels.chunks import typed
from gq_triton.kernels.launch import (
    TRITON_DTYPE,
    VECTOR,
    Row,
    Table,
    device_guard,
    shared,
    tables,
)
from gq_triton.kernels.law import load
from gq_triton.kernels.sums import (
    MOST_COLUMNS,
    NUM_WARPS,
    ROWS,
    TILE,
    add_rows,
    check_sums,
    find_part,
    finish,
)
from gq_triton.kernels.tickets import take_tickets
from gq_triton.layer_sums import LayerSums

__all__ = ["sums_all"]

# Columns of a table, after the programs of a layer and its number.
DY = tl.constexpr(2)
X = tl.constexpr(3)
MEAN = tl.constexpr(4)
RSTD = tl.constexpr(5)
POSITIONS = tl.constexpr(6)
COLUMNS = tl.constexpr(7)
# Of images: channels of a group, distance of two samples' statistics.
PER_GROUP = tl.constexpr(8)
STRIDE_STAT = tl.constexpr(9)
# First element of the layer's parts, first of its tickets, addresses of its sums.
PARTS = tl.constexpr(10)
TICKETS = tl.constexpr(11)
SHIFTS = tl.constexpr(12)
SCALES = tl.constexpr(13)
WIDTH = tl.constexpr(14)
# Channels of a tile of images; its other side has positions, which lie next to each other.
CHANNELS = TILE // MOST_COLUMNS
# Beyond the number of any program.
NEVER = tl.constexpr(2**31)
# Parts that are added up at a time.
AT_ONCE = tl.constexpr(16)
# Lengths in the aligned class are multiples of it, so masks are as wide as loads.
EVEN = 16


@triton.jit
def _add_images(
    dy, x, mean, rstd, has_x, order, begin, end, channels, exists, positions, n, per_group,
    stride_stat, C_DTYPE: tl.constexpr, TILE_C: tl.constexpr, TILE_S: tl.constexpr,
    RUN: tl.constexpr,
):  # fmt: skip
    """Return the sums of ``dy`` and of ``dy * (x - mean) * rstd`` over places ``(b, s)`` of a part.

    RUN divides the positions: as many places lie next to each other, which makes accesses wide.

    Example: one channel, two positions; samples (1, 2) and (3, 4): 10, and 0 without ``x``.
    """
    shift = tl.zeros((TILE_C, TILE_S // RUN, RUN), C_DTYPE)
    scale = tl.zeros((TILE_C, TILE_S // RUN, RUN), C_DTYPE)
    group, runs = channels // per_group, positions // RUN
    each = stride_stat != 0  # otherwise a BatchNorm, whose statistics all samples share
    shared = exists & has_x & (stride_stat == 0)
    center = load(mean + group, shared, C_DTYPE)[:, None, None]
    rate = load(rstd + group, shared, C_DTYPE)[:, None, None]
    within = (channels.to(tl.int64) * positions)[:, None, None] + tl.arange(0, RUN)[None, None, :]
    for first in range(begin // RUN, end // RUN, TILE_S // RUN):
        run = first + tl.arange(0, TILE_S // RUN)
        live = run < end // RUN
        sample = tl.load(order + run // runs, mask=live, other=0)
        at = sample * n * positions + run % runs * RUN
        mask = exists[:, None, None] & live[None, :, None]
        g = load(dy + at[None, :, None] + within, mask, C_DTYPE)
        shift += g
        if has_x:
            v = load(x + at[None, :, None] + within, mask, C_DTYPE)
            if each:
                stat = (sample[None, :] * stride_stat + group[:, None])[:, :, None]
                v -= load(mean + stat, mask, C_DTYPE)
                scale += g * (v * load(rstd + stat, mask, C_DTYPE))
            else:
                scale += g * ((v - center) * rate)
    return tl.sum(tl.sum(shift, axis=2), axis=1), tl.sum(tl.sum(scale, axis=2), axis=1)


@triton.jit(do_not_specialize=["n_layers", "n_clusters"])
def _sums_all_kernel(
    rows, starts, n_layers, order, offsets, parts, tickets, n_clusters,
    G_DTYPE: tl.constexpr, X_DTYPE: tl.constexpr, S_DTYPE: tl.constexpr, C_DTYPE: tl.constexpr,
    IMAGES: tl.constexpr, ALIGNED: tl.constexpr, PART: tl.constexpr, TILE_R: tl.constexpr,
    TILE_C: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Write the sums of one part of one of N layers, for TILE_C columns; end its cluster's sums."""
    # All starts at once: behind a loop that searches them, accesses would be narrow.
    at = tl.arange(0, N)
    begins = tl.load(starts + at, mask=at < n_layers, other=NEVER)
    layer = tl.sum((begins <= tl.program_id(0)).to(tl.int32)) - 1
    row = rows + layer.to(tl.int64) * WIDTH
    n = tl.load(row + COLUMNS).to(tl.int32)
    positions = tl.load(row + POSITIONS).to(tl.int32)
    if ALIGNED:
        n = tl.multiple_of(n, 16)
        if IMAGES:
            positions = tl.multiple_of(positions, 16)
    place = (tl.program_id(0) - tl.load(starts + layer)).to(tl.int32)
    blocks = tl.cdiv(n, TILE_C)
    part, block = place // blocks, place % blocks
    cluster, begin, end, _, _ = find_part(part, offsets, n_clusters, positions, PART, K)
    if cluster == n_clusters:
        return
    columns = block * TILE_C + tl.arange(0, TILE_C)
    exists = columns < n
    dy = typed(tl.load(row + DY), G_DTYPE, ALIGNED)
    x, mean_address = typed(tl.load(row + X), X_DTYPE, ALIGNED), tl.load(row + MEAN)
    scales_address = tl.load(row + SCALES)
    has_x = scales_address != 0  # an empty tensor may have address 0
    mean = typed(mean_address, S_DTYPE, False)
    rstd = typed(tl.load(row + RSTD), S_DTYPE, False)
    if IMAGES:
        shift, scale = _add_images(
            dy, x, mean, rstd, has_x, order, begin, end, columns, exists, positions, n,
            tl.load(row + PER_GROUP).to(tl.int32), tl.load(row + STRIDE_STAT), C_DTYPE, TILE_C,
            TILE_R, 16 if ALIGNED else 1,
        )  # fmt: skip
    else:
        shift, scale = add_rows(
            dy, x, mean, rstd, has_x, mean_address != 0, order, begin, end, columns, exists,
            positions, n, C_DTYPE, TILE_R, TILE_C,
        )  # fmt: skip
    # The parts of the shift come first, then those of the scale.
    shifts = parts + tl.load(row + PARTS)
    out = part.to(tl.int64) * n + columns
    tl.store(shifts + out, shift, mask=exists)
    # Another layer's programs are not counted, those beyond the last part are.
    count = (tl.load(row) // blocks).to(tl.int64)
    scales = shifts + count * n
    tl.store(scales + out, scale, mask=exists & has_x)
    finish(
        shifts, scales, typed(tl.load(row + SHIFTS), C_DTYPE, False),
        typed(scales_address, C_DTYPE, False), has_x,
        tickets + tl.load(row + TICKETS) + block * n_clusters, part, offsets, n_clusters, positions,
        columns, exists, n, PART, K, AT_ONCE, TILE_C,
    )  # fmt: skip


def sums_all(layers: Sequence[LayerSums], order: Tensor, offsets: Tensor) -> None:
    """Write the sums by cluster of many layers; see ``engines.protocol``.

    Summed as in `position_sums` and `channel_sums`, in an order that depends on the shapes and the
    clusters' sizes only: repeats agree bit for bit.

    Raises:
        ValueError: the tensors disagree in shape, dtype, layout or device.
    """
    batches: dict[tuple, list[LayerSums]] = {}
    for layer in layers:
        batches.setdefault(_kind(layer), []).append(layer)
    for kind in [kind for kind in batches if kind[3] is None]:
        # Layers without inputs go with others of the same layout and types.
        host = next((other for other in batches if other[:3] == kind[:3] and other != kind), None)
        if host is not None:
            batches[host] += batches.pop(kind)
    with device_guard(order.device):
        for kind, batch in batches.items():
            _launch(kind, batch, order, offsets)


def _kind(layer: LayerSums) -> tuple:
    """Return the layout of a layer and the types of gradients, sums, inputs and statistics."""
    x, rstd = (None if t is None else t.dtype for t in (layer.x, layer.rstd))
    return layer.images, layer.dy.dtype, layer.shifts.dtype, x, rstd


def _launch(kind: tuple, layers: list[LayerSums], order: Tensor, offsets: Tensor) -> None:
    """Launch the programs of layers of one kind."""
    images, grad, wide, x, stat = kind
    clusters, device = len(offsets) - 1, order.device
    # One tile for all layers: a layer's sums do not depend on which others share its launch.
    columns = CHANNELS if images else MOST_COLUMNS
    part = ROWS * MOST_COLUMNS // columns
    rows, used, of_tickets = [], 0, 0
    for number, (dy, *others, _) in enumerate(layers):
        batch, n, *rest = dy.shape
        positions = math.prod(rest)
        if not images:
            n, positions = positions, n
        # Every cluster may end in a part that is not full.
        count, blocks = -(-batch * positions // part) + clusters, -(-n // columns)
        shared_by = others[2].shape if images and others[2] is not None else (1,)
        groups = shared_by[-1]
        each = groups if len(shared_by) > 1 and shared_by[0] > 1 else 0
        *read, shifts, scales = [
            0 if tensor is None else tensor.data_ptr() for tensor in (dy, *others)
        ]
        rows.append((
            count * blocks, number, *read, positions, n, max(n // groups, 1), each, used,
            of_tickets, shifts, scales,
        ))  # fmt: skip
        used += count * n * (1 if others[0] is None else 2)
        of_tickets += clusters * blocks

    def checked() -> list[Row]:
        for layer in layers:
            check_sums(layer, order, offsets)
        return rows

    def is_aligned(row: Row) -> bool:
        lengths = row[6:8] if images else row[7:8]
        return not (row[2] % VECTOR or row[3] % VECTOR or any(n % EVEN for n in lengths))

    key = "sums", device, kind, clusters, tuple(rows)
    parts = torch.empty(used, dtype=wide, device=device)
    own = take_tickets(device, of_tickets)
    table: Table
    for table in tables(device, key, shared, checked, is_aligned, chunk=1):
        if table.n_chunks:
            _sums_all_kernel[(table.n_chunks,)](
                table.rows, table.starts, table.n_tensors, order, offsets, parts, own, clusters,
                G_DTYPE=TRITON_DTYPE[grad], X_DTYPE=TRITON_DTYPE[x or grad],
                S_DTYPE=TRITON_DTYPE[stat or wide], C_DTYPE=TRITON_DTYPE[wide], IMAGES=images,
                ALIGNED=table.aligned, PART=part, TILE_R=TILE // columns, TILE_C=columns,
                K=max(triton.next_power_of_2(clusters), 16),
                N=max(triton.next_power_of_2(table.n_tensors), 16), num_warps=NUM_WARPS,
            )  # fmt: skip
