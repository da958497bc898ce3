# pyright: basic, reportInvalidTypeForm=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
"""Gradients of weights by cluster: products of ``dy`` and ``x``, summed over a cluster's samples.

A program forms one tile of one cluster's sum. It walks through the cluster's samples by ``order``
and ``offsets``, which stay on the device: no sorted copy of the batch, no padding, no wait of the
host. A convolution has one weight matrix per *tap*, a place in its window. Every tap is a product
of its own, whose rows of ``x`` are those that the tap meets.

Shape legend: B = samples, K = clusters, T = positions of a sample at the output, O = columns of
``dy``, I = columns of ``x``, G = groups of channels; BO, BI and BR = outputs, inputs and rows of a
tile, KP = K padded to a power of two.
"""

import triton
import triton.language as tl

__all__ = ["GEOMETRY", "depthwise_kernel", "weight_kernel"]

# Tiles of outputs that are taken in turns, so that neighbouring programs share rows in cache.
TURN = tl.constexpr(8)
# Whether Triton multiplies matrices of float64; 3.4 does not.
MULTIPLIES_FLOAT64 = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 5))
# How a window moves over three dimensions, the last of which is the innermost: sizes at the output
# and at the input, taps, steps, zeros of padding, distances between taps.
GEOMETRY = (
    "out1", "out2", "in0", "in1", "in2", "taps", "taps1", "taps2", "step0", "step1", "step2",
    "pad0", "pad1", "pad2", "gap0", "gap1", "gap2",
)  # fmt: skip
# Arguments that no compiled kernel depends on.
FREE = ("stride_split", "stride_tap", "positions", "groups", "n_clusters", "splits", *GEOMETRY)


@triton.jit
def _cluster_at(offsets, place, n_clusters, KP: tl.constexpr):
    """Return the cluster at a place in the order of sizes, the largest first.

    The largest clusters then start first, and the others fill the gaps behind them. KP = 0 keeps
    the order of the clusters.

    Example: sizes 3, 0, 5, 3: places 0, 1, 2, 3 are clusters 2, 0, 3, 1.
    """
    cluster = place
    if KP > 0:
        k = tl.arange(0, KP)
        begin = tl.load(offsets + k, mask=k < n_clusters, other=0)
        end = tl.load(offsets + k + 1, mask=k < n_clusters, other=-1)
        # One key for size and number: no two clusters have the same.
        key = (end - begin).to(tl.int64) * KP + (KP - 1 - k)
        before = tl.sum((key[None, :] > key[:, None]).to(tl.int32), axis=1)
        cluster = tl.sum(tl.where(before == place, k, 0))
    return cluster


@triton.jit
def _span(offsets, cluster, split, splits, positions, BR: tl.constexpr):
    """Return a cluster's first sample, a split's first row in the cluster and the row past it.

    The rows are cut into equal numbers of blocks of BR rows.
    """
    begin = tl.load(offsets + cluster).to(tl.int32)
    rows = (tl.load(offsets + cluster + 1).to(tl.int32) - begin) * positions
    share = tl.cdiv(tl.cdiv(rows, BR), splits) * BR
    first = split * share
    return begin, first, tl.minimum(first + share, rows)


@triton.jit
def _samples(order, begin, start, last, positions, BR: tl.constexpr, WHOLE: tl.constexpr):
    """Return the samples of BR rows of a cluster; WHOLE says that BR divides the positions.

    They are looked up one turn of a loop ahead. Otherwise every copy to shared memory would have to
    wait for its address, and the compiler would keep fewer copies under way.
    """
    if WHOLE:
        sample = tl.load(order + begin + start // positions, mask=start < last, other=0)
    else:
        row = start + tl.arange(0, BR)[:, None]
        sample = tl.load(order + begin + row // positions, mask=row < last, other=0)
    return sample.to(tl.int64)


@triton.jit
def _met(
    at, tap, out1, out2, in0, in1, in2, taps1, taps2, step0, step1, step2, pad0, pad1, pad2, gap0,
    gap1, gap2,
):  # fmt: skip
    """Return the input position that a tap meets from an output position, and whether it exists.

    Example: one dimension, step 2, one zero of padding: tap 0 meets -1, 1, 3, ... from 0, 1, 2, ...
    """
    high, tap_high = at // out2, tap // taps2
    i0 = high // out1 * step0 - pad0 + tap_high // taps1 * gap0
    i1 = high % out1 * step1 - pad1 + tap_high % taps1 * gap1
    i2 = at % out2 * step2 - pad2 + tap % taps2 * gap2
    exists = (i0 >= 0) & (i0 < in0) & (i1 >= 0) & (i1 < in1) & (i2 >= 0) & (i2 < in2)
    return (i0 * in1 + i1) * in2 + i2, exists


@triton.jit
def _add_splits(sums, out, ticket, to, mask, zeros, stride_split, splits):
    """Add up a tile's splits, in their order, in the program that gets here last.

    Every program of the tile calls this once, after it has written its split, and takes a number.
    Whoever takes the last one knows that all are written. It puts the ticket back to 0 for the next
    launch. No program waits for another.
    """
    tl.debug_barrier()  # what all threads wrote comes before the number
    if tl.atomic_add(ticket, 1) == splits - 1:
        tl.store(ticket, 0)
        total = zeros
        for split in range(0, splits):
            # Other programs wrote it: this multiprocessor's own cache may hold what was before.
            at = sums + tl.full((), split, tl.int64) * stride_split + to
            total += tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
        tl.store(out + to, total, mask=mask)


@triton.jit(do_not_specialize=FREE)
def weight_kernel(
    dy, x, order, offsets, sums, out, tickets, dy_sample, x_sample, outputs, inputs, stride_split,
    stride_k, stride_o, stride_i, stride_tap, positions, groups, n_clusters, splits,
    out1, out2, in0, in1, in2, taps, taps1, taps2, step0, step1, step2, pad0, pad1, pad2, gap0,
    gap1, gap2,
    BO: tl.constexpr, BI: tl.constexpr, BR: tl.constexpr, KP: tl.constexpr, WHOLE: tl.constexpr,
    TAPS: tl.constexpr, MIXED: tl.constexpr, FIRST: tl.constexpr, C_DTYPE: tl.constexpr,
    F_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write one tile of one cluster's sum of ``dy.T @ x``, or of one split of its rows.

    ``outputs`` and ``inputs`` are those of one group of channels. TAPS says that there is a window,
    FIRST that channels come before positions: then a channel's positions lie next to each other.
    With ``tickets``, one per tile and 0 when the launch begins, ``sums`` has a share of each split,
    and their total goes to ``out``. MIXED counts the columns through all taps, ``tap * inputs +
    input``, so that a tile holds several taps of few inputs. F_DTYPE is the type of the factors,
    C_DTYPE that of the sums.
    """
    width = inputs
    if MIXED:
        width = inputs * taps
    across, high = tl.cdiv(width, BI), tl.cdiv(outputs, BO)
    tile, tap = tl.program_id(0), 0
    if TAPS and not MIXED:
        # The taps of a tile read the same rows: they come one after the other.
        tap, tile = tile % taps, tile // taps
    rest, tile = tile // (across * high), tile % (across * high)
    group, rest = rest % groups, rest // groups
    split, place = rest % splits, rest // splits
    ticket = across * high * groups
    if TAPS and not MIXED:
        ticket *= taps
    ticket = place * ticket + tl.program_id(0) % ticket
    cluster = _cluster_at(offsets, place, n_clusters, KP)
    turn, within = tile // (TURN * across), tile % (TURN * across)
    height = tl.minimum(high - turn * TURN, TURN)
    o = (turn * TURN + within % height) * BO + tl.arange(0, BO)
    j = within // height * BI + tl.arange(0, BI)
    i = j
    if MIXED:
        tap, i = (j // inputs)[None, :], j % inputs
    dy_columns, x_columns = (group * outputs + o)[None, :], (group * inputs + i)[None, :]
    known_o, known_j = (o < outputs)[None, :], (j < width)[None, :]
    total = tl.zeros((BO, BI), C_DTYPE)
    begin, first, last = _span(offsets, cluster, split, splits, positions, BR)
    sample = _samples(order, begin, first, last, positions, BR, WHOLE)
    for start in range(first, last, BR):
        ahead = _samples(order, begin, start + BR, last, positions, BR, WHOLE)
        row = start + tl.arange(0, BR)[:, None]
        at, live = row % positions, row < last
        if WHOLE:
            at, live = start % positions + tl.arange(0, BR)[:, None], row >= 0
        a_at, known_a = dy + sample * dy_sample, live & known_o
        if FIRST:  # neighbouring threads read neighbouring positions
            a = tl.load((a_at + at + dy_columns * positions).T, mask=known_a.T, other=0.0)
        else:
            a = tl.load(a_at + at * (groups * outputs) + dy_columns, mask=known_a, other=0.0).T
        if TAPS:
            at, exists = _met(
                at, tap, out1, out2, in0, in1, in2, taps1, taps2, step0, step1, step2, pad0, pad1,
                pad2, gap0, gap1, gap2,
            )  # fmt: skip
            live = live & exists
        b_at, known_b = x + sample * x_sample, live & known_j
        if FIRST:
            b_at += at + x_columns * (in0 * in1 * in2)
            b = tl.load(b_at.T, mask=known_b.T, other=0.0).T
        else:
            b = tl.load(b_at + at * (groups * inputs) + x_columns, mask=known_b, other=0.0)
        a, b = a.to(F_DTYPE), b.to(F_DTYPE)
        if C_DTYPE == tl.float64 and not MULTIPLIES_FLOAT64:
            total += tl.sum(a[:, :, None] * b[None, :, :], axis=1)
        else:
            total = tl.dot(a, b, acc=total, input_precision=PRECISION, out_dtype=C_DTYPE)
        sample = ahead
    to = (group * outputs + o)[:, None].to(tl.int64) * stride_o + i[None, :] * stride_i
    to += cluster.to(tl.int64) * stride_k + tap * stride_tap
    known = (o < outputs)[:, None] & known_j
    tl.store(sums + split.to(tl.int64) * stride_split + to, total, mask=known)
    if tickets is not None:
        zeros = tl.zeros((BO, BI), C_DTYPE)
        _add_splits(sums, out, tickets + ticket, to, known, zeros, stride_split, splits)


@triton.jit(do_not_specialize=FREE)
def depthwise_kernel(
    dy, x, order, offsets, sums, out, tickets, dy_sample, x_sample, outputs, inputs, stride_split,
    stride_k, stride_o, stride_i, stride_tap, positions, groups, n_clusters, splits,
    out1, out2, in0, in1, in2, taps, taps1, taps2, step0, step1, step2, pad0, pad1, pad2, gap0,
    gap1, gap2,
    BO: tl.constexpr, BR: tl.constexpr, KP: tl.constexpr, C_DTYPE: tl.constexpr,
):  # fmt: skip
    """Write one tap of BO channels, of which each meets one channel of the input alone.

    Nothing is a matrix here: the products are added up element by element.
    """
    tap, rest = tl.program_id(0) % taps, tl.program_id(0) // taps
    across = tl.cdiv(groups * outputs, BO)
    o, rest = rest % across * BO + tl.arange(0, BO), rest // across
    split, place = rest % splits, rest // splits
    ticket = place * (across * taps) + tl.program_id(0) % (across * taps)
    cluster = _cluster_at(offsets, place, n_clusters, KP)
    known = o < groups * outputs
    total = tl.zeros((BR, BO), C_DTYPE)
    begin, first, last = _span(offsets, cluster, split, splits, positions, BR)
    for start in range(first, last, BR):
        sample = _samples(order, begin, start, last, positions, BR, False)
        row = start + tl.arange(0, BR)[:, None]
        at, live = row % positions, (row < last) & known[None, :]
        a_at = dy + sample * dy_sample + at * (groups * outputs) + o[None, :]
        a = tl.load(a_at, mask=live, other=0.0).to(C_DTYPE)
        at, exists = _met(
            at, tap, out1, out2, in0, in1, in2, taps1, taps2, step0, step1, step2, pad0, pad1, pad2,
            gap0, gap1, gap2,
        )  # fmt: skip
        b_at = x + sample * x_sample + at * groups + (o // outputs)[None, :]
        b = tl.load(b_at, mask=live & exists, other=0.0).to(C_DTYPE)
        total += a * b
    to = o.to(tl.int64) * stride_o + tap * stride_tap + cluster.to(tl.int64) * stride_k
    at = sums + split.to(tl.int64) * stride_split + to
    tl.store(at, tl.sum(total, axis=0), mask=known)
    if tickets is not None:
        zeros = tl.zeros((BO,), C_DTYPE)
        _add_splits(sums, out, tickets + ticket, to, known, zeros, stride_split, splits)
