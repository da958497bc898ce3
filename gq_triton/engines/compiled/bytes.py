"""A ring in bytes as ``gq_triton.float8`` defines it: without tables, so that loops vectorise."""

import numpy as np

from gq_triton import float8
from gq_triton.engines.compiled.jit import exact

__all__ = ["open_bytes", "put_bytes", "rounded"]

_LOW, _HIGH = np.int32(float8.EXPONENT_LOW), np.int32(float8.EXPONENT_HIGH)
_TWICE, _LARGEST = np.int32(2 * float8.BIAS), np.float32(float8.LARGEST)
_DROPPED, _HALF, _KEPT = np.int32(18), np.int32(131071), np.int32(-262144)
_OFFSET, _EXPONENT = np.int32(3968), np.int32(23)
_QUARTER, _STEP = np.float32(0.25), np.float32(1 / 128)
# 2 ** 16, whose float32 step is that of the smallest numbers of a ring, and its bits.
_COUNTS, _COUNTS_BITS = np.float32(65536.0), np.int32(0x47800000)


@exact()
def rounded(x):
    """Return a float32 rounded to 6 significant bits, within the range of a ring."""
    bits = np.int32(np.float32(min(max(x, -_LARGEST), _LARGEST)).view(np.int32))
    bits = (bits + _HALF + ((bits >> _DROPPED) & np.int32(1))) & _KEPT
    return np.int32(bits).view(np.float32)


@exact()
def _power(exponent):
    """Return 2 to a biased exponent, 0 for 0."""
    return np.int32(exponent << _EXPONENT).view(np.float32)


@exact()
def _decoded(byte, scale):
    code = np.int32(byte) & np.int32(127)
    above = np.int32((code + _OFFSET) << _DROPPED).view(np.float32)
    below = np.float32(code) * _STEP
    value = (below if code < 32 else above) * scale
    return -value if byte > 127 else value


@exact()
def _encoded(x, inverse):
    scaled = np.float32(abs(x) * inverse)
    below = np.int32(np.float32(scaled + _COUNTS).view(np.int32)) - _COUNTS_BITS
    above = (np.int32(np.float32(scaled).view(np.int32)) >> _DROPPED) - _OFFSET
    code = below if scaled < _QUARTER else above
    return np.uint8(code + 128 if x < 0 else code)


@exact()
def open_bytes(ring, stride, slots, tile, end):
    """Return the gradients of a tile in float32, the stride of their rows, and where they begin."""
    count, last = end - tile, slots * stride
    rows, scale = np.empty(slots * count, np.float32), np.empty(count, np.float32)
    exponents = ring[last + tile : last + end]
    for i in range(count):
        scale[i] = _power(np.int32(exponents[i]))
    for row in range(slots):
        codes, values = ring[row * stride + tile :], rows[row * count :]
        for i in range(count):
            values[i] = _decoded(codes[i], scale[i])
    return rows, count, tile


@exact()
def put_bytes(ring, stride, slots, slot, tile, end, grad, unscale):
    """Put gradients over one row of a tile; all its rows get the exponents that they need."""
    count, last = end - tile, slots * stride
    exponents, raw = ring[last + tile : last + end], grad[tile:end]
    x, largest = np.empty(count, np.float32), np.empty(count, np.float32)
    scale, inverse = np.empty(count, np.float32), np.empty(count, np.float32)
    for i in range(count):
        scale[i] = _power(np.int32(exponents[i]))
        x[i] = rounded(raw[i] * unscale)
        largest[i] = abs(x[i])
    for row in range(slots):
        codes = ring[row * stride + tile : row * stride + end]
        for i in range(count):
            largest[i] = max(largest[i], abs(_decoded(codes[i], scale[i])))
    for i in range(count):
        exponent = np.int32(np.float32(largest[i]).view(np.int32)) >> _EXPONENT
        exponent = min(max(exponent, _LOW), _HIGH)
        exponents[i] = np.uint8(exponent)
        inverse[i] = _power(_TWICE - exponent)
    for row in range(slots):
        codes = ring[row * stride + tile : row * stride + end]
        if row == slot:
            for i in range(count):
                codes[i] = _encoded(x[i], inverse[i])
        else:
            for i in range(count):
                codes[i] = _encoded(_decoded(codes[i], scale[i]), inverse[i])
