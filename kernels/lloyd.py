# pyright: basic, reportInvalidTypeForm=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false
"""K-means of one batch: Lloyd's iterations with relocation, which end on the device.

A small batch takes one launch of one program. A large one takes a launch per iteration: each
program works on a part of the samples, and the last one to arrive finishes the iteration in a fixed
order. Launches after convergence return at once.

Shape legend: B = samples, F = features, K = clusters, KP = K padded to a power of two, P = parts of
the samples.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gq_triton.kernels.launch import TRITON_DTYPE, device_guard
from gq_triton.kernels.law import divide
from gq_triton.kernels.lloyd_parts import (
    add_features,
    add_members,
    arrive,
    assign,
    enter,
    find_mean,
    leave,
    mark_distinct,
    measure,
    move_centers,
    peak_of,
    relocate,
    unit_of,
)

__all__ = ["lloyd_"]

# Elements of a tile of samples and features, its most features, and the warps that share it.
TILE, MOST_COLUMNS = 4096, 128
NUM_WARPS = 8
# Most clusters: more would not fit a program's registers.
MOST_CLUSTERS = 128
# Elements B * F of a batch that one program takes on. An iteration reads them twice for every four
# clusters, 4096 in about .6 us (estimated); a launch takes several.
ONE_PROGRAM = 1 << 16
# Most parts of a large batch.
MOST_PARTS = 128
# Places of ``info``: whether iterations ended, whether a feature was not finite, the ticket.
DONE, BAD, TICKET = (tl.constexpr(place) for place in range(3))
# Places of ``numbers``: the unit, its reciprocal, the shift at which iterations end.
UNIT, RATE, LIMIT = (tl.constexpr(place) for place in range(3))
_HEAD = tl.constexpr(4)


@triton.jit
def _floats(numbers, B, F, K):
    """Return where mean, centres, norms, gaps and parts are, which follow the numbers."""
    mean = numbers + _HEAD
    cent = mean + F
    norms = cent + K * F
    gaps = norms + B
    return mean, cent, norms, gaps, gaps + B


@triton.jit
def _integers(info, B, K):
    """Return where owners, marks and the parts' counts are, which follow ``info``.

    A part counts the samples of each cluster and the labels that changed.
    """
    owner = info + _HEAD
    marks = owner + B
    return owner, marks, marks + K


@triton.jit
def _begin(numbers, info, flag, n_iter, peak, bad, ZERO: tl.constexpr):
    """Write the unit and its reciprocal; note features that are not finite, which end all."""
    unit = unit_of(peak)
    tl.store(numbers + UNIT, unit)
    tl.store(numbers + RATE, divide(tl.full((), 1.0, tl.float32), unit))
    wrong = tl.full((), 0, tl.int32)
    if not ZERO:
        wrong = bad
        if bad > 0:
            tl.store(flag, tl.full((), 1, tl.uint8))
    tl.store(info + BAD, wrong.to(tl.int64))
    tl.store(info + DONE, wrong.to(tl.int64))
    tl.store(n_iter, tl.full((), 0, tl.int64))


@triton.jit
def _limit_of(spread, tol, B, F):
    """Return the squared shift of all centres at which iterations end."""
    # A launch turns an F of 1 into a constant, which has no methods.
    elements = tl.full((), B, tl.float32) * tl.full((), F, tl.float32)
    return divide(tl.full((), tol, tl.float32) * spread, elements)


@triton.jit
def _finish(
    published, n_iter, numbers, info, sizes, changed, limit, n_parts, B, F, K, max_iter,
    KP: tl.constexpr,
):  # fmt: skip
    """End an iteration whose samples are assigned and added up; publish the centres of the last."""
    mean, cent, _, _, parts = _floats(numbers, B, F, K)
    shift = move_centers(parts, cent, sizes, n_parts, F, K, KP)
    before = tl.load(n_iter)
    done = (changed == 0) | (shift <= limit) | (before + 1 >= max_iter)
    tl.debug_barrier()
    if done:
        leave(cent, published, mean, tl.load(numbers + UNIT), F, K, KP)
    tl.store(n_iter, before + 1)
    tl.store(info + DONE, done.to(tl.int64))
    tl.debug_barrier()


@triton.jit
def _settle(out_sizes, out_inertia, numbers, sizes, inertia, K, KP: tl.constexpr):
    """Write sizes and inertia."""
    k = tl.arange(0, KP)
    tl.store(out_sizes + k, sizes.to(tl.int64), mask=k < K)
    unit = tl.load(numbers + UNIT)
    tl.store(out_inertia, inertia * unit * unit)


@triton.jit
def _fill(labels, value: tl.constexpr, begin, end, TILE_B: tl.constexpr):
    """Write one label for some samples."""
    for at in range(begin, end, TILE_B):
        b = at + tl.arange(0, TILE_B)
        tl.store(labels + b, tl.full((TILE_B,), value, tl.int64), mask=b < end)


@triton.jit
def _set_aside(labels, sizes, inertia, begin, end, B, K, TILE_B: tl.constexpr, KP: tl.constexpr):
    """Give some samples label 0, in a batch with features that are not finite."""
    _fill(labels, 0, begin, end, TILE_B)
    k = tl.arange(0, KP)
    tl.store(sizes + k, tl.where(k == 0, B, 0).to(tl.int64), mask=k < K)
    tl.store(inertia, 0.0)


@triton.jit(do_not_specialize=["B", "K", "max_iter"])
def _lloyd_kernel(
    x, published, flag, labels, sizes_ptr, inertia_ptr, n_iter, numbers, info, B, F, K, max_iter,
    tol: tl.float64,
    TILE_B: tl.constexpr, TILE_F: tl.constexpr, KP: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """Run all of k-means in one program.

    Example: samples 0, 1, 8 from centres 0 and 8: labels 0, 0, 1, centres 0.5 and 8.
    """
    mean, cent, norms, gaps, parts = _floats(numbers, B, F, K)
    owner, marks, _ = _integers(info, B, K)
    peak, bad = peak_of(x, 0, B, F, TILE_B, TILE_F)
    _begin(numbers, info, flag, n_iter, peak, bad, ZERO)
    _fill(labels, -1, 0, B, TILE_B)
    tl.debug_barrier()
    if tl.load(info + BAD) > 0:
        _set_aside(labels, sizes_ptr, inertia_ptr, 0, B, B, K, TILE_B, KP)
        return
    rate = tl.load(numbers + RATE)
    add_features(x, parts, 0, B, F, rate, TILE_B, TILE_F)
    tl.debug_barrier()
    find_mean(parts, mean, F, 1, B, F, TILE_F)
    tl.debug_barrier()
    limit = _limit_of(measure(x, mean, norms, 0, B, F, rate, TILE_B, TILE_F), tol, B, F)
    # The last of these rounds labels the samples by what was published. Every function is called
    # at one place, which keeps the kernel small.
    last = tl.full((), 0, tl.int64)
    entering = tl.full((), 1, tl.int64)
    going = tl.full((), 1, tl.int64)
    while going > 0:
        if entering > 0:
            enter(published, cent, mean, rate, F, K, KP)
        tl.debug_barrier()
        mark_distinct(cent, marks, F, K, KP)
        tl.debug_barrier()
        changed, inertia, sizes = assign(
            x, mean, cent, marks, labels, owner, gaps, 0, B, F, K, rate, TILE_B, TILE_F, KP
        )
        tl.debug_barrier()
        if last > 0:
            _settle(sizes_ptr, inertia_ptr, numbers, sizes, inertia, K, KP)
        else:
            if tl.max(tl.where((sizes == 0) & (tl.arange(0, KP) < K), 1, 0)) > 0:
                sizes, _moved = relocate(owner, gaps, norms, sizes, B, K, KP)
            add_members(x, mean, owner, parts, 0, B, F, K, rate, TILE_B, TILE_F)
            tl.debug_barrier()
            _finish(
                published, n_iter, numbers, info, sizes, changed, limit, 1, B, F, K, max_iter,
                KP,
            )  # fmt: skip
        going = 1 - last
        last = tl.load(info + DONE)
        entering = last


@triton.jit
def _own_part(numbers, B, F, K, rows, n_parts):
    """Return this program's part, its first sample, the one after its last, and its places.

    The places are those of its sums ``(K, F)``, and of one number for each part.
    """
    part = tl.program_id(0)
    begin = part * rows
    _, _, _, _, parts = _floats(numbers, B, F, K)
    single = parts + n_parts.to(tl.int64) * K * F
    return part, begin, tl.minimum(begin + rows, B), parts + part.to(tl.int64) * K * F, single


@triton.jit(do_not_specialize=["B", "K", "max_iter", "rows", "n_parts"])
def _unit_kernel(
    x, published, flag, labels, sizes_ptr, inertia_ptr, n_iter, numbers, info, B, F, K, max_iter,
    rows, n_parts, tol: tl.float64,
    TILE_B: tl.constexpr, TILE_F: tl.constexpr, KP: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """Find the unit of a large batch, and whether all features are finite."""
    part, begin, end, _, single = _own_part(numbers, B, F, K, rows, n_parts)
    _, _, counts = _integers(info, B, K)
    peak, bad = peak_of(x, begin, end, F, TILE_B, TILE_F)
    _fill(labels, -1, begin, end, TILE_B)
    tl.store(single + part, peak)
    tl.store(counts + part, bad.to(tl.int64))
    if arrive(info + TICKET, n_parts):
        for other in range(0, n_parts):
            peak = tl.maximum(peak, tl.load(single + other, cache_modifier=".cg"))
            seen = tl.load(counts + other, cache_modifier=".cg")
            bad = tl.maximum(bad, seen.to(tl.int32))
        _begin(numbers, info, flag, n_iter, peak, bad, ZERO)


@triton.jit(do_not_specialize=["B", "K", "max_iter", "rows", "n_parts"])
def _mean_kernel(
    x, published, flag, labels, sizes_ptr, inertia_ptr, n_iter, numbers, info, B, F, K, max_iter,
    rows, n_parts, tol: tl.float64,
    TILE_B: tl.constexpr, TILE_F: tl.constexpr, KP: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """Find the mean of a large batch, and take the centres into its frame."""
    if tl.load(info + BAD) > 0:
        return
    _, begin, end, mine, _ = _own_part(numbers, B, F, K, rows, n_parts)
    mean, cent, _, _, parts = _floats(numbers, B, F, K)
    _, marks, _ = _integers(info, B, K)
    rate = tl.load(numbers + RATE)
    add_features(x, mine, begin, end, F, rate, TILE_B, TILE_F)
    if arrive(info + TICKET, n_parts):
        find_mean(parts, mean, K * F, n_parts, B, F, TILE_F)
        tl.debug_barrier()
        enter(published, cent, mean, rate, F, K, KP)
        tl.debug_barrier()
        mark_distinct(cent, marks, F, K, KP)


@triton.jit
def _gather(counts, single, n_parts, K, KP: tl.constexpr):
    """Return the sizes ``(KP,)``, the changed labels and the single numbers, summed over parts."""
    k = tl.arange(0, KP)
    sizes = tl.zeros((KP,), tl.int32)
    changed = tl.full((), 0, tl.int32)
    total = tl.full((), 0.0, tl.float32)
    for part in range(0, n_parts):
        own = counts + part * (K + 1)
        size = tl.load(own + k, mask=k < K, other=0, cache_modifier=".cg")
        sizes += size.to(tl.int32)
        changed += tl.load(own + K, cache_modifier=".cg").to(tl.int32)
        total += tl.load(single + part, cache_modifier=".cg")
    return sizes, changed, total


@triton.jit(do_not_specialize=["B", "K", "max_iter", "rows", "n_parts"])
def _iterate_kernel(
    x, published, flag, labels, sizes_ptr, inertia_ptr, n_iter, numbers, info, B, F, K, max_iter,
    rows, n_parts, tol: tl.float64,
    TILE_B: tl.constexpr, TILE_F: tl.constexpr, KP: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """Run one iteration on a large batch; nothing after the last one."""
    if tl.load(info + DONE) > 0:
        return
    part, begin, end, mine, single = _own_part(numbers, B, F, K, rows, n_parts)
    mean, cent, norms, gaps, parts = _floats(numbers, B, F, K)
    owner, marks, counts = _integers(info, B, K)
    k = tl.arange(0, KP)
    rate = tl.load(numbers + RATE)
    spread = tl.full((), 0.0, tl.float32)
    if tl.load(n_iter) == 0:
        spread = measure(x, mean, norms, begin, end, F, rate, TILE_B, TILE_F)
    changed, _, sizes = assign(
        x, mean, cent, marks, labels, owner, gaps, begin, end, F, K, rate, TILE_B, TILE_F, KP
    )
    tl.debug_barrier()
    add_members(x, mean, owner, mine, begin, end, F, K, rate, TILE_B, TILE_F)
    own = counts + part * (K + 1)
    tl.store(own + k, sizes.to(tl.int64), mask=k < K)
    tl.store(own + K, changed.to(tl.int64))
    tl.store(single + part, spread)
    if arrive(info + TICKET, n_parts):
        sizes, changed, spread = _gather(counts, single, n_parts, K, KP)
        limit = tl.load(numbers + LIMIT)
        if tl.load(n_iter) == 0:
            limit = _limit_of(spread, tol, B, F)
            tl.store(numbers + LIMIT, limit)
        used = tl.full((), 0, tl.int32) + n_parts
        if tl.max(tl.where((sizes == 0) & (k < K), 1, 0)) > 0:
            sizes, moved = relocate(owner, gaps, norms, sizes, B, K, KP)
            if moved > 0:
                add_members(x, mean, owner, parts, 0, B, F, K, rate, TILE_B, TILE_F)
                used = tl.full((), 1, tl.int32)
        tl.debug_barrier()
        _finish(
            published, n_iter, numbers, info, sizes, changed, limit, used, B, F, K, max_iter, KP
        )
        if tl.load(info + DONE) > 0:
            enter(published, cent, mean, rate, F, K, KP)
            tl.debug_barrier()
        mark_distinct(cent, marks, F, K, KP)


@triton.jit(do_not_specialize=["B", "K", "max_iter", "rows", "n_parts"])
def _label_kernel(
    x, published, flag, labels, sizes_ptr, inertia_ptr, n_iter, numbers, info, B, F, K, max_iter,
    rows, n_parts, tol: tl.float64,
    TILE_B: tl.constexpr, TILE_F: tl.constexpr, KP: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """Label a large batch by the centres that were published."""
    part, begin, end, _, single = _own_part(numbers, B, F, K, rows, n_parts)
    if tl.load(info + BAD) > 0:
        _set_aside(labels, sizes_ptr, inertia_ptr, begin, end, B, K, TILE_B, KP)
        return
    mean, cent, _, gaps, _ = _floats(numbers, B, F, K)
    owner, marks, counts = _integers(info, B, K)
    k = tl.arange(0, KP)
    changed, inertia, sizes = assign(
        x, mean, cent, marks, labels, owner, gaps, begin, end, F, K, tl.load(numbers + RATE),
        TILE_B, TILE_F, KP,
    )  # fmt: skip
    own = counts + part * (K + 1)
    tl.store(own + k, sizes.to(tl.int64), mask=k < K)
    tl.store(own + K, changed.to(tl.int64))
    tl.store(single + part, inertia)
    if arrive(info + TICKET, n_parts):
        sizes, changed, inertia = _gather(counts, single, n_parts, K, KP)
        _settle(sizes_ptr, inertia_ptr, numbers, sizes, inertia, K, KP)


def _check(features: Tensor, centers: Tensor, flag: Tensor) -> None:
    """Raise ValueError unless features, centres and flag fit each other."""
    (batch, columns), clusters = features.shape, len(centers)
    wide = TRITON_DTYPE.get(features.dtype) in (None, tl.float64)
    if wide or batch < 1 or columns < 1:
        raise ValueError(
            "features must be float16, bfloat16 or float32 of shape (B >= 1, F >= 1), got "
            f"{features.dtype} of shape {tuple(features.shape)}"
        )
    if not 1 <= clusters <= MOST_CLUSTERS:
        raise ValueError(f"the kernel takes 1 to {MOST_CLUSTERS} centres, got {clusters}")
    right = {
        "centers": (centers, (clusters, columns), torch.float32),
        "flag": (flag, (), torch.bool),
    }
    for name, (tensor, shape, dtype) in right.items():
        fits = tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous()
        if not fits or tensor.device != features.device:
            raise ValueError(
                f"{name} must be contiguous {dtype} of shape {shape} on {features.device}, got "
                f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
            )


def lloyd_(
    features: Tensor, centers: Tensor, flag: Tensor, *, max_iter: int, tol: float, zero: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run k-means on one batch and replace the centres; see ``engines.protocol``.

    Computed in float32; a feature below the smallest normal number counts as 0 where all are.
    Repeats agree bit for bit.

    Raises:
        ValueError: the tensors disagree in shape, dtype or device, or are not covered.
    """
    _check(features, centers, flag)
    (batch, columns), clusters, device = features.shape, len(centers), features.device
    n_parts, rows = 1, batch
    tile_f = min(MOST_COLUMNS, max(16, triton.next_power_of_2(columns)))
    padded = max(4, triton.next_power_of_2(clusters))
    tile_b = min(TILE // tile_f, 2 * TILE // padded)
    if batch * columns > ONE_PROGRAM:
        # The last program adds up as many sums as a part has features.
        n_parts = min(MOST_PARTS, max(1, math.isqrt(2 * batch // clusters)))
        rows = triton.cdiv(triton.cdiv(batch, n_parts), tile_b) * tile_b
        n_parts = triton.cdiv(batch, rows)
    each = clusters * columns
    with device_guard(device):
        labels = torch.empty(batch, dtype=torch.int64, device=device)
        sizes = torch.empty(clusters, dtype=torch.int64, device=device)
        n_iter = torch.empty((), dtype=torch.int64, device=device)
        inertia = torch.empty((), dtype=torch.float32, device=device)
        room = 4 + columns + each + 2 * batch + n_parts * (each + 1)
        numbers = torch.empty(room, dtype=torch.float32, device=device)
        room = 4 + batch + clusters + n_parts * (clusters + 1)
        info = torch.empty(room, dtype=torch.int64, device=device)
        given = (
            features.contiguous(), centers, flag.view(torch.uint8), labels, sizes, inertia, n_iter,
            numbers, info, batch, columns, clusters, max_iter,
        )  # fmt: skip
        constants = {
            "TILE_B": tile_b, "TILE_F": tile_f, "ZERO": zero, "num_warps": NUM_WARPS,
            "KP": padded,
        }  # fmt: skip
        if n_parts == 1:
            _lloyd_kernel[(1,)](*given, float(tol), **constants)
        else:
            info[:4].zero_()  # the ticket
            kernels = _unit_kernel, _mean_kernel, *[_iterate_kernel] * max_iter, _label_kernel
            for kernel in kernels:
                kernel[(n_parts,)](*given, rows, n_parts, float(tol), **constants)
    return labels, sizes, inertia, n_iter
