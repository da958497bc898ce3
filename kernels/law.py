# pyright: basic
"""The law of Grad Queue (arXiv 2404.16917, equations 1 and 2) as device functions.

    z = |x - mu| / sigma,   w = clip(z, 1/rho, rho)

``mu`` and ``sigma`` are the mean and the population standard deviation of the ring buffer, which
does not hold ``x``. Everything is relative to the newest row ``b`` and to the largest deviation
``m``: ``d_a = q_a - b``, ``s = sum(d_a) / E``, ``ss = sum(((d_a - s) / m)^2)`` and
``z = |(x - b) - s| / m / sqrt(ss / E)``. A constant queue then has ``d_a = 0`` exactly: z is 0
where x equals it and huge where it does not, without a branch or a NaN.

Shape legend: L = queue slots, E = effective length, BLOCK = elements of one block.
"""

import triton
import triton.language as tl

from gq_triton.kernels.bytes import decode, replace_row, row_at, scale_of, significant

# Smallest normal numbers: 1 / m stays finite for a constant queue.
_TINY32 = tl.constexpr(1.1754943508222875e-38)
_TINY64 = tl.constexpr(2.2250738585072014e-308)
# Above zero and below ss / E of any queue that is not constant; a normal number in float32.
_VARIANCE_FLOOR = tl.constexpr(1e-36)
# Rings of up to this many rows stay in registers; longer ones are read twice, then mostly from L1.
_UNROLL = tl.constexpr(16)


@triton.jit
def divide(x, y):
    """Return x / y rounded to nearest; ``/`` alone is an approximation in float32 on a GPU."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def reciprocal(x):
    """Return 1 / x rounded to nearest."""
    return divide(tl.full((), 1.0, x.dtype), x)


@triton.jit
def product(x, factor):
    """Return ``x`` times a scalar, rounded before anything else is done with it.

    The compiler may fuse ``x * factor - base`` into one rounding. A mean that equals its constant
    queue would then differ from that queue by the rounding that was skipped.
    """
    return tl.fma(x, tl.full(x.shape, factor, x.dtype), tl.zeros_like(x))


@triton.jit
def square_root(x):
    """Return sqrt(x) rounded to nearest."""
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def widen(x, DTYPE: tl.constexpr):
    """Return ``x`` in the compute type; the interpreter converts bfloat16 to float32 only."""
    if x.dtype == tl.bfloat16:
        x = x.to(tl.float32)
    return x.to(DTYPE)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """Return ``x`` rounded to a storage type; the interpreter gets bfloat16 from float32 only."""
    if DTYPE == tl.bfloat16:
        x = x.to(tl.float32)
    return x.to(DTYPE)


@triton.jit
def load(pointer, mask, DTYPE: tl.constexpr):
    """Load a block and return it in the compute type, 0 where masked."""
    return widen(tl.load(pointer, mask=mask, other=0.0), DTYPE)


@triton.jit
def load_row(pointer, scale, mask, DTYPE: tl.constexpr):
    """Load a block of a ring's row in the compute type; ``scale`` is that of a ring in bytes."""
    if pointer.dtype.element_ty == tl.uint8:
        return decode(tl.load(pointer, mask=mask, other=0), scale).to(DTYPE)
    else:
        return load(pointer, mask, DTYPE)


@triton.jit
def store(pointer, x, mask):
    """Store a block with one rounding to the tensor's type."""
    tl.store(pointer, narrow(x, pointer.dtype.element_ty), mask=mask)


@triton.jit
def fold(x, size: tl.constexpr):
    """Return neighbours added up, ``(BLOCK,)`` to ``(size,)``: in one thread, to save registers."""
    return tl.sum(tl.reshape(x, (size, x.shape[0] // size)), axis=1)


@triton.jit
def to_queue(x, DTYPE: tl.constexpr):
    """Return ``x`` rounded to the queue's type, clamped to that type's finite range.

    An infinity in the ring would make every weight NaN for L steps.

    For a ring in bytes the result is float32.

    Example: 1e5 becomes 65504 in a float16 queue.
    """
    if DTYPE == tl.uint8:
        x = significant(x)
    elif DTYPE == tl.float16:
        x = tl.minimum(tl.maximum(x, -65504.0), 65504.0)
    elif DTYPE == tl.bfloat16:
        x = tl.minimum(tl.maximum(x, -3.3895313892515355e38), 3.3895313892515355e38)
    elif DTYPE == tl.float32 and x.dtype == tl.float64:
        x = tl.minimum(tl.maximum(x, -3.4028234663852886e38), 3.4028234663852886e38)
    if DTYPE != tl.uint8:
        x = narrow(x, DTYPE)
    return x


@triton.jit
def ring_row(ring, stride, slot, age, L: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the pointer to the row of ``age`` (0 = newest): row ``(slot - 1 - age) mod L``."""
    row = slot - 1 - age
    return row_at(ring, stride, tl.where(row < 0, row + L, row), ALIGNED)


@triton.jit
def spread(
    ring,
    stride,
    slot,
    offsets,
    mask,
    length,
    DTYPE: tl.constexpr,
    L: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Return ``b``, ``s``, ``1 / m`` and ``sqrt(ss / E)`` of one block in the compute type.

    Args:
        ring: pointer to row 0 of the ring buffer at the block's chunk.
        stride: elements from one row to the next, int64.
        slot: the row that is overwritten next, int64.
        offsets: ``(BLOCK,)`` int32 within the chunk, or of any other shape.
        mask: in the shape of ``offsets``, or True.
        length: effective length, a scalar int32, or None for L.
        DTYPE: the compute type.
        L: queue slots.
        ALIGNED: whether rows start at multiples of 16 bytes.

    Example: rows 1, 1, 1, 5 (newest) give b = 5, s = -3, 1 / m = 1 / 4 and sqrt(3) / 4.
    """
    newest = ring_row(ring, stride, slot, 0, L, ALIGNED)
    scale = None
    if ring.dtype.element_ty == tl.uint8:
        scale = scale_of(ring, stride, offsets, mask, L, ALIGNED)
    base = load_row(newest + offsets, scale, mask, DTYPE)
    total = tl.zeros_like(base)
    largest = tl.zeros_like(base)
    squares = tl.zeros_like(base)
    if length is None:
        used = tl.full((), L, tl.int32)
    else:
        used = tl.minimum(tl.maximum(length, 1), L)
    share = divide(tl.full((), 1.0, DTYPE), used.to(DTYPE))
    tiny: tl.constexpr = _TINY64 if DTYPE == tl.float64 else _TINY32
    if L <= _UNROLL:
        deviations = ()
        for age in tl.static_range(1, L):
            row = ring_row(ring, stride, slot, age, L, ALIGNED)
            if length is None:
                d = load_row(row + offsets, scale, mask, DTYPE) - base
            else:
                live = age < used
                d = load_row(row + offsets, scale, mask & live, DTYPE) - base
                d = tl.where(live, d, 0.0)
            total += d
            largest = tl.maximum(largest, tl.abs(d))
            deviations = deviations + (d,)
        mean = total * share
        inverse = divide(tl.full((), 1.0, DTYPE), tl.maximum(largest, tiny))
        for age in tl.static_range(1, L):
            d = (deviations[age - 1] - mean) * inverse
            if length is not None:
                d = tl.where(age < used, d, 0.0)
            squares += d * d
    else:
        for age in range(1, used):
            row = ring_row(ring, stride, slot, age, L, ALIGNED)
            d = load_row(row + offsets, scale, mask, DTYPE) - base
            total += d
            largest = tl.maximum(largest, tl.abs(d))
        mean = total * share
        inverse = divide(tl.full((), 1.0, DTYPE), tl.maximum(largest, tiny))
        for age in range(1, used):
            row = ring_row(ring, stride, slot, age, L, ALIGNED)
            d = load_row(row + offsets, scale, mask, DTYPE) - base
            d = (d - mean) * inverse
            squares += d * d
    squares += (mean * inverse) * (mean * inverse)
    sigma = square_root(tl.maximum(squares * share, _VARIANCE_FLOOR))
    return base, mean, inverse, sigma


@triton.jit
def scarcity_weight(
    x,
    ring,
    stride,
    slot,
    offsets,
    mask,
    length,
    low,
    high,
    L: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Return ``clip(z, low, high)`` for one block.

    Args:
        x: ``(BLOCK,)`` in the compute type, already rounded to the queue's type.
        ring: pointer to row 0 of the ring buffer at the block's chunk.
        stride: elements from one row to the next, int64.
        slot: the row that is overwritten next, int64.
        offsets: ``(BLOCK,)`` int32 within the chunk.
        mask: ``(BLOCK,)`` or True.
        length: effective length, a scalar int32, or None for L.
        low: ``1 / rho`` in the compute type.
        high: ``rho`` in the compute type.
        L: queue slots.
        ALIGNED: whether rows start at multiples of 16 bytes.

    Example: rows 1, 1, 1, 5 give mu = 2, sigma = sqrt(3); x = 5 gives z = 3 / sqrt(3) = 1.73.
    """
    base, mean, inverse, sigma = spread(  # pyright: ignore[reportGeneralTypeIssues]
        ring, stride, slot, offsets, mask, length, x.dtype, L, ALIGNED
    )
    z = divide(tl.abs((x - base) - mean) * inverse, sigma)
    return tl.minimum(tl.maximum(z, low), high)


@triton.jit
def weigh_and_queue(
    g,
    ring,
    stride,
    slot,
    offsets,
    mask,
    active,
    queue_it,
    length,
    low,
    high,
    L: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Return the weights of one block of unscaled gradients ``g`` and queue the block.

    Where the scalar ``active`` is False every weight is exactly 1. The scalar ``queue_it`` says
    whether ``g`` is written to row ``slot``. All other arguments are those of `scarcity_weight`.

    Example: L = 1, row 2, g = 2: w = 1 / rho, and 2 is written over row 2.
    """
    stored = to_queue(g, ring.dtype.element_ty)
    x = widen(stored, g.dtype)
    w = scarcity_weight(x, ring, stride, slot, offsets, mask, length, low, high, L, ALIGNED)
    # The store follows the loads: with E = L the statistics include the row it overwrites.
    put_row(ring, stride, slot, stored, offsets, mask & queue_it, L, ALIGNED)
    return tl.where(active, w, 1.0)


@triton.jit
def put_row(
    ring, stride, slot, stored, offsets, mask, L: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """Write a block, as `to_queue` returns it, over the oldest row of a ring."""
    if ring.dtype.element_ty == tl.uint8:
        replace_row(ring, stride, slot, stored, offsets, mask, L, ALIGNED)
    else:
        oldest = ring_row(ring, stride, slot, L - 1, L, ALIGNED)
        tl.store(oldest + offsets, stored, mask=mask)


@triton.jit
def inverse_scale(grad_scale_ptr, DTYPE: tl.constexpr):
    """Return ``1 / grad_scale``, or 1 where gradients are not scaled."""
    one = tl.full((), 1.0, DTYPE)
    if grad_scale_ptr is None:
        return one
    else:
        return divide(one, tl.load(grad_scale_ptr).to(DTYPE))
