# pyright: basic, reportInvalidTypeForm=false, reportArgumentType=false, reportCallIssue=false
"""The steps of k-means as device functions, for the samples of one program.

The coordinates are those of the *frame*: features are divided by ``unit``, a power of two, so that
squares are finite, and their mean is taken off. A feature that is not finite counts as 0.

One program reads what another of its threads has written only after ``tl.debug_barrier()``, and
what another program has written only if it is the last one to arrive at a ticket (`arrive`).

Shape legend: B = samples, F = features, K = clusters, KP = K padded to a power of two, P = parts of
the samples. A tile is TILE_B samples by TILE_F features. Four clusters have an accumulator of
a tile's size each: a sum over a tile is formed once per cluster, and no product needs K padded.
"""

import triton
import triton.language as tl

from gq_triton.kernels.law import divide

_EPS = tl.constexpr(1.1920928955078125e-07)
# A distant centre stays distant, and its square finite.
_FAR = tl.constexpr(2.0**40)
# Cells of a block that compares centres with each other, and centres compared with all at a time.
_PAIRS, _SOME = tl.constexpr(8192), tl.constexpr(4)
# Cells of a block that holds a piece of every centre.
_CELLS = tl.constexpr(4096)
# Samples looked through at a time for one that is far from its centre.
_MANY = tl.constexpr(1024)


@triton.jit
def arrive(ticket, n_programs):
    """Return whether this program is the last of a launch to arrive; the last one sees all stores.

    Nobody waits: the others end. The ticket is left as it was found.
    """
    tl.debug_barrier()
    before = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu")
    last = before == n_programs - 1
    if last:
        tl.store(ticket, 0)
    tl.debug_barrier()
    return last


@triton.jit
def peak_of(x, begin, end, F, TILE_B: tl.constexpr, TILE_F: tl.constexpr):
    """Return the largest finite ``|x|`` of some samples, and whether one is not finite."""
    top = tl.zeros((TILE_B, TILE_F), tl.float32)
    bad = tl.zeros((TILE_B, TILE_F), tl.int32)
    for at in range(begin, end, TILE_B):
        b = at + tl.arange(0, TILE_B)
        for first in range(0, F, TILE_F):
            f = first + tl.arange(0, TILE_F)
            inside = (b < end)[:, None] & (f < F)[None, :]
            value = tl.load(x + b.to(tl.int64)[:, None] * F + f[None, :], mask=inside, other=0.0)
            size = tl.abs(value.to(tl.float32))
            finite = size < float("inf")
            top = tl.maximum(top, tl.where(finite, size, 0.0))
            bad |= tl.where(finite, 0, 1)
    return tl.max(top), tl.max(bad)


@triton.jit
def unit_of(peak):
    """Return the largest power of two that is at most ``peak``; 1 for a peak of 0.

    Example: 1 for 1.9, 2 for 2.
    """
    unit = (peak.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(unit > 0, unit, 1.0)


@triton.jit
def scaled(x, b, f, end, F, rate):
    """Return features of samples ``b`` times ``rate``, 0 outside and where they are not finite."""
    inside = (b < end)[:, None] & (f < F)[None, :]
    value = tl.load(x + b.to(tl.int64)[:, None] * F + f[None, :], mask=inside, other=0.0)
    value = value.to(tl.float32)
    return tl.where(tl.abs(value) < float("inf"), value, 0.0) * rate


@triton.jit
def framed(x, mean, b, f, end, F, rate):
    """Return features of samples ``b`` in the frame, 0 outside."""
    inside = (b < end)[:, None] & (f < F)[None, :]
    middle = tl.load(mean + f, mask=f < F, other=0.0)
    return tl.where(inside, scaled(x, b, f, end, F, rate) - middle[None, :], 0.0)


@triton.jit
def add_features(
    x, out, begin, end, F, rate, TILE_B: tl.constexpr, TILE_F: tl.constexpr
):  # fmt: skip
    """Write the sums ``(F,)`` of scaled features over some samples."""
    for first in range(0, F, TILE_F):
        f = first + tl.arange(0, TILE_F)
        total = tl.zeros((TILE_F,), tl.float32)
        for at in range(begin, end, TILE_B):
            total += tl.sum(scaled(x, at + tl.arange(0, TILE_B), f, end, F, rate), axis=0)
        tl.store(out + f, total, mask=f < F)


@triton.jit
def find_mean(parts, mean, stride, n_parts, B, F, TILE_F: tl.constexpr):
    """Write the mean ``(F,)`` of scaled features from the sums of all parts."""
    for first in range(0, F, TILE_F):
        f = first + tl.arange(0, TILE_F)
        total = tl.zeros((TILE_F,), tl.float32)
        for part in range(0, n_parts):
            total += tl.load(parts + part * stride + f, mask=f < F, other=0.0)
        tl.store(mean + f, divide(total, tl.full((), B, tl.float32)), mask=f < F)


@triton.jit
def enter(published, cent, mean, rate, F, K, KP: tl.constexpr):
    """Write centres ``(K, F)`` of the caller's coordinates in the frame."""
    TILE: tl.constexpr = _CELLS // KP
    k = tl.arange(0, KP)
    for first in range(0, F, TILE):
        f = first + tl.arange(0, TILE)
        inside = (k < K)[:, None] & (f < F)[None, :]
        place = k[:, None] * F + f[None, :]
        c = tl.load(published + place, mask=inside, other=0.0) * rate
        c -= tl.load(mean + f, mask=f < F, other=0.0)[None, :]
        tl.store(cent + place, tl.minimum(tl.maximum(c, -_FAR), _FAR), mask=inside)


@triton.jit
def leave(cent, published, mean, unit, F, K, KP: tl.constexpr):
    """Write centres ``(K, F)`` of the frame in the caller's coordinates."""
    TILE: tl.constexpr = _CELLS // KP
    k = tl.arange(0, KP)
    for first in range(0, F, TILE):
        f = first + tl.arange(0, TILE)
        inside = (k < K)[:, None] & (f < F)[None, :]
        place = k[:, None] * F + f[None, :]
        c = tl.load(cent + place, mask=inside, other=0.0)
        c += tl.load(mean + f, mask=f < F, other=0.0)[None, :]
        tl.store(published + place, c * unit, mask=inside)


@triton.jit
def mark_distinct(cent, marks, F, K, KP: tl.constexpr):
    """Write 1 for each centre that no earlier one equals, up to the rounding of a mean, else 0.

    Without these marks equal samples could get several labels.
    """
    TILE: tl.constexpr = _PAIRS // (_SOME * KP)
    k = tl.arange(0, KP)
    near = tl.zeros((KP,), tl.int32)
    for start in range(0, K, _SOME):
        j = start + tl.arange(0, _SOME)
        gap = tl.zeros((_SOME, KP), tl.float32)
        size = tl.zeros((KP,), tl.float32)
        for first in range(0, F, TILE):
            f = first + tl.arange(0, TILE)
            real = (f < F)[None, :]
            own = tl.load(cent + k[:, None] * F + f[None, :], mask=(k < K)[:, None] & real, other=0)
            other = tl.load(
                cent + j[:, None] * F + f[None, :], mask=(j < K)[:, None] & real, other=0
            )
            apart = tl.abs(own[None, :, :] - other[:, None, :])
            gap = tl.maximum(gap, tl.max(apart, axis=2))
            size = tl.maximum(size, tl.max(tl.abs(own), axis=1))
        same = (gap <= size[None, :] * (64 * _EPS)) & (j[:, None] < k[None, :])
        near = tl.maximum(near, tl.max(same.to(tl.int32), axis=0))
    tl.store(marks + k, (1 - near).to(tl.int64), mask=k < K)


@triton.jit
def measure(
    x, mean, norms, begin, end, F, rate, TILE_B: tl.constexpr, TILE_F: tl.constexpr
):  # fmt: skip
    """Write the squared norms of some samples in the frame; return their sum."""
    total = tl.zeros((TILE_B,), tl.float32)
    for at in range(begin, end, TILE_B):
        b = at + tl.arange(0, TILE_B)
        squares = tl.zeros((TILE_B, TILE_F), tl.float32)
        for first in range(0, F, TILE_F):
            v = framed(x, mean, b, first + tl.arange(0, TILE_F), end, F, rate)
            squares += v * v
        norm = tl.sum(squares, axis=1)
        tl.store(norms + b, norm, mask=b < end)
        total += norm
    return tl.sum(total)


@triton.jit
def _squared(v, cent, k, f, F, K):
    """Return the squares of what lies between points ``v`` and centre ``k``."""
    center = tl.load(cent + k * F + f, mask=(f < F) & (k < K), other=0.0)
    apart = v - center[None, :]
    return apart * apart


@triton.jit
def _nearer(best, label, squares, marks, k, K):
    """Return distance and label of the nearest centre so far, after centre ``k``."""
    gap = tl.sum(squares, axis=1)
    closer = (gap < best) & (tl.load(marks + k, mask=k < K, other=0) > 0)
    return tl.where(closer, gap, best), tl.where(closer, k, label)


@triton.jit
def assign(
    x, mean, cent, marks, labels, owner, gaps, begin, end, F, K, rate,
    TILE_B: tl.constexpr, TILE_F: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Write the labels of some samples' nearest centres, twice, and their squared distances.

    The distances are sums of squared differences: the rounding of a product would relocate samples
    for nothing.

    Returns how many labels are others than before, the sum of the distances, and the number of
    samples by cluster ``(KP,)``.
    """
    clusters = tl.arange(0, KP)
    changed = tl.zeros((TILE_B,), tl.int32)
    total = tl.zeros((TILE_B,), tl.float32)
    sizes = tl.zeros((KP,), tl.int32)
    for at in range(begin, end, TILE_B):
        b = at + tl.arange(0, TILE_B)
        live = b < end
        best = tl.full((TILE_B,), float("inf"), tl.float32)
        label = tl.zeros((TILE_B,), tl.int32)
        for k in range(0, K, 4):
            s0 = tl.zeros((TILE_B, TILE_F), tl.float32)
            s1 = tl.zeros((TILE_B, TILE_F), tl.float32)
            s2 = tl.zeros((TILE_B, TILE_F), tl.float32)
            s3 = tl.zeros((TILE_B, TILE_F), tl.float32)
            for first in range(0, F, TILE_F):
                f = first + tl.arange(0, TILE_F)
                v = framed(x, mean, b, f, end, F, rate)
                s0 += _squared(v, cent, k, f, F, K)
                s1 += _squared(v, cent, k + 1, f, F, K)
                s2 += _squared(v, cent, k + 2, f, F, K)
                s3 += _squared(v, cent, k + 3, f, F, K)
            best, label = _nearer(best, label, s0, marks, k, K)
            best, label = _nearer(best, label, s1, marks, k + 1, K)
            best, label = _nearer(best, label, s2, marks, k + 2, K)
            best, label = _nearer(best, label, s3, marks, k + 3, K)
        before = tl.load(labels + b, mask=live, other=0)
        tl.store(labels + b, label.to(tl.int64), mask=live)
        tl.store(owner + b, label.to(tl.int64), mask=live)
        tl.store(gaps + b, best, mask=live)
        changed += tl.where(live & (before != label), 1, 0)
        total += tl.where(live, best, 0.0)
        hot = live[:, None] & (label[:, None] == clusters[None, :])
        sizes += tl.sum(hot.to(tl.int32), axis=0)
    return tl.sum(changed), tl.sum(total), sizes


@triton.jit
def relocate(owner, gaps, norms, sizes, B, K, KP: tl.constexpr):
    """Give each empty cluster a sample far from its centre; return the sizes and how many moved.

    The e-th empty cluster takes the e-th farthest sample, the first of equally far ones. A sample
    whose squared distance is below the resolution of its norm stays.
    """
    k = tl.arange(0, KP)
    empty = (sizes == 0) & (k < K)
    moved = tl.full((), 0, tl.int32)
    for e in range(0, K):
        if tl.sum(tl.where(empty & (k == e), 1, 0)) > 0:
            best = tl.full((), 0.0, tl.float32)
            where = tl.full((), -1, tl.int32)
            for at in range(0, B, _MANY):
                b = at + tl.arange(0, _MANY)
                gap = tl.load(gaps + b, mask=b < B, other=0.0)
                norm = tl.load(norms + b, mask=b < B, other=0.0)
                gap = tl.where(gap > norm * _EPS, gap, 0.0)
                most, i = tl.max(gap, axis=0, return_indices=True)
                where = tl.where(most > best, at + i, where)
                best = tl.maximum(best, most)
            if where >= 0:
                left = tl.load(owner + where)
                tl.debug_barrier()  # all threads have read the owner
                tl.store(owner + where, tl.full((), e, tl.int64))
                tl.store(gaps + where, 0.0)
                sizes += tl.where(k == e, 1, 0) - tl.where(k == left, 1, 0)
                moved += 1
            tl.debug_barrier()
    return sizes, moved


@triton.jit
def _keep(out, total, k, f, F, K):
    tl.store(out + k * F + f, tl.sum(total, axis=0), mask=(f < F) & (k < K))


@triton.jit
def add_members(
    x, mean, owner, out, begin, end, F, K, rate, TILE_B: tl.constexpr, TILE_F: tl.constexpr
):
    """Write the sums ``(K, F)`` of some samples by owner."""
    for first in range(0, F, TILE_F):
        f = first + tl.arange(0, TILE_F)
        for k in range(0, K, 4):
            s0 = tl.zeros((TILE_B, TILE_F), tl.float32)
            s1 = tl.zeros((TILE_B, TILE_F), tl.float32)
            s2 = tl.zeros((TILE_B, TILE_F), tl.float32)
            s3 = tl.zeros((TILE_B, TILE_F), tl.float32)
            for at in range(begin, end, TILE_B):
                b = at + tl.arange(0, TILE_B)
                mine = (tl.load(owner + b, mask=b < end, other=-1).to(tl.int32) - k)[:, None]
                v = framed(x, mean, b, f, end, F, rate)
                s0 += tl.where(mine == 0, v, 0.0)
                s1 += tl.where(mine == 1, v, 0.0)
                s2 += tl.where(mine == 2, v, 0.0)
                s3 += tl.where(mine == 3, v, 0.0)
            _keep(out, s0, k, f, F, K)
            _keep(out, s1, k + 1, f, F, K)
            _keep(out, s2, k + 2, f, F, K)
            _keep(out, s3, k + 3, f, F, K)


@triton.jit
def move_centers(
    parts, cent, sizes, n_parts, F, K, KP: tl.constexpr
):  # fmt: skip
    """Write the means from the sums of all parts; return the squared shift of all centres.

    An empty cluster gets the mean of the largest one.
    """
    TILE: tl.constexpr = _CELLS // KP
    k = tl.arange(0, KP)
    largest = tl.argmax(tl.where(k < K, sizes, -1), axis=0)
    count = tl.maximum(sizes, 1).to(tl.float32)
    shift = tl.zeros((KP,), tl.float32)
    for first in range(0, F, TILE):
        f = first + tl.arange(0, TILE)
        inside = (k < K)[:, None] & (f < F)[None, :]
        place = k[:, None] * F + f[None, :]
        total = tl.zeros((KP, TILE), tl.float32)
        for part in range(0, n_parts):
            total += tl.load(parts + part * K * F + place, mask=inside, other=0.0)
        center = divide(total, tl.broadcast_to(count[:, None], total.shape))
        most = tl.sum(tl.where((k == largest)[:, None], center, 0.0), axis=0)
        center = tl.where((sizes > 0)[:, None], center, most[None, :])
        gone = center - tl.load(cent + place, mask=inside, other=0.0)
        shift += tl.sum(tl.where(inside, gone * gone, 0.0), axis=1)
        tl.store(cent + place, center, mask=inside)
    return tl.sum(shift)
