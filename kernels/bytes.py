# pyright: basic, reportArgumentType=false
"""A ring in bytes as device functions; ``gq_triton.float8`` says what a byte stands for.

Shape legend: L = queue slots, BLOCK = elements of one block.
"""

import triton
import triton.language as tl

from gq_triton import float8

# float8's constants, as a kernel takes them.
_LARGEST = tl.constexpr(float8.LARGEST)
_LOW, _HIGH = tl.constexpr(float8.EXPONENT_LOW), tl.constexpr(float8.EXPONENT_HIGH)
_TWICE_BIAS = tl.constexpr(2 * float8.BIAS)
_DROPPED = tl.constexpr(18)
_HALF = tl.constexpr((1 << 17) - 1)
_KEPT = tl.constexpr(-(1 << 18))
_OFFSET = tl.constexpr(3968)
# 2 ** 16, whose float32 step is that of the smallest numbers of a ring, and its bits.
_COUNTS, _COUNTS_BITS = tl.constexpr(65536.0), tl.constexpr(0x47800000)


@triton.jit
def significant(x):
    """Return ``x`` rounded to 6 significant bits, clamped to the range of a ring, in float32.

    Example: 0.1 becomes 51 / 512.
    """
    x = tl.minimum(tl.maximum(x, -_LARGEST), _LARGEST).to(tl.float32)
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + _HALF + ((bits >> _DROPPED) & 1)) & _KEPT
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def power(exponent):
    """Return 2 to a biased exponent (int32), 0 for 0."""
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def decode(byte, scale):
    """Return the float32 that a byte stands for under the power of two ``scale``.

    Example: byte 97 (exponent 3, fraction 1) is 33 / 32 of the scale.
    """
    magnitude = byte.to(tl.int32) & 127
    above = ((magnitude + _OFFSET) << _DROPPED).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 32, magnitude.to(tl.float32) * 0.0078125, above) * scale
    return tl.where(byte.to(tl.int32) > 127, -value, value)


@triton.jit
def encode(x, inverse):
    """Return the byte of ``x``, of 6 significant bits, under the scale ``1 / inverse``."""
    scaled = tl.abs(x) * inverse
    above = (scaled.to(tl.int32, bitcast=True) >> _DROPPED) - _OFFSET
    below = (scaled + _COUNTS).to(tl.int32, bitcast=True) - _COUNTS_BITS
    return (tl.where(scaled < 0.25, below, above) + tl.where(x < 0, 128, 0)).to(tl.uint8)


@triton.jit
def row_at(ring, stride, row, ALIGNED: tl.constexpr):
    """Return the pointer to a row of a ring of any type; vector loads need ALIGNED's hint."""
    start = row * stride
    if ALIGNED:
        start = tl.multiple_of(start, 128 // ring.dtype.element_ty.primitive_bitwidth)
    return ring + start


@triton.jit
def scale_of(ring, stride, offsets, mask, L: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the powers of two that the elements of a block share, from row L of their ring."""
    at = row_at(ring, stride, L, ALIGNED) + offsets
    return power(tl.load(at, mask=mask, other=0).to(tl.int32))


@triton.jit
def replace_row(
    ring, stride, slot, x, offsets, mask, L: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """Put ``x``, as `significant` returns it, over one row; all rows get the exponent they need.

    Args:
        ring: pointer to row 0 of the ring at the block's chunk.
        stride: elements from one row to the next, int64.
        slot: the row that is overwritten, int64.
        x: ``(BLOCK,)`` float32.
        offsets: ``(BLOCK,)`` int32 within the chunk.
        mask: ``(BLOCK,)`` or a scalar.
        L: queue slots.
        ALIGNED: whether rows start at multiples of 16 bytes.
    """
    scale = scale_of(ring, stride, offsets, mask, L, ALIGNED)
    largest = tl.abs(x)
    for row in range(L):
        byte = tl.load(row_at(ring, stride, row, ALIGNED) + offsets, mask=mask, other=0)
        largest = tl.maximum(largest, tl.abs(decode(byte, scale)))
    exponent = tl.minimum(tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, _LOW), _HIGH)
    inverse = power(-exponent + _TWICE_BIAS)
    for row in range(L):
        at = row_at(ring, stride, row, ALIGNED) + offsets
        value = decode(tl.load(at, mask=mask, other=0), scale)
        value = tl.where(row == slot, x, value)
        tl.store(at, encode(value, inverse), mask=mask)
    at = row_at(ring, stride, L, ALIGNED) + offsets
    tl.store(at, exponent.to(tl.uint8), mask=mask)
