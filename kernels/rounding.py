# pyright: basic, reportArgumentType=false
"""Stochastic rounding to bfloat16 as device functions; the hash is that of ``gq_triton.rounding``.

Shape legend: BLOCK = elements of one block.
"""

import triton
import triton.language as tl

from gq_triton import rounding
from gq_triton.kernels.law import narrow, store

_FACTOR1, _FACTOR2 = tl.constexpr(rounding.FACTORS[0]), tl.constexpr(rounding.FACTORS[1])
_EXPONENT = tl.constexpr(0x7F800000)
_KEPT = tl.constexpr(-(1 << 16))


@triton.jit
def hashed(x):
    """Return the hash of uint32 numbers.

    Example: 1 gives 0x514e28b7.
    """
    x = x ^ (x >> 16)
    x = x * _FACTOR1
    x = x ^ (x >> 13)
    x = x * _FACTOR2
    return x ^ (x >> 16)


@triton.jit
def key_of(queued, index):
    """Return the key of a tensor's step, uint32, of its counter and its place in the step."""
    return hashed(queued.to(tl.uint32) + hashed((index + 1).to(tl.uint32)))


@triton.jit
def store_weight(pointer, x, mask, places, key, STOCHASTIC: tl.constexpr):
    """Store a block of a parameter, to the nearest or at random to bfloat16.

    Args:
        pointer: ``(BLOCK,)``.
        x: ``(BLOCK,)`` in the compute type.
        mask: ``(BLOCK,)`` or True.
        places: ``(BLOCK,)`` int64, the elements' places in the tensor.
        key: as `key_of` returns it.
        STOCHASTIC: whether to round at random.
    """
    if STOCHASTIC:
        x = x.to(tl.float32)
        raw = x.to(tl.int32, bitcast=True)
        bits = (hashed(hashed(places.to(tl.uint32)) ^ key) >> 16).to(tl.int32)
        rounded = ((raw + bits) & _KEPT).to(tl.float32, bitcast=True)
        x = tl.where((raw & _EXPONENT) == _EXPONENT, x, rounded)
        tl.store(pointer, narrow(x, tl.bfloat16), mask=mask)
    else:
        store(pointer, x, mask)
