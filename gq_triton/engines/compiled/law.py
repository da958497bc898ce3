"""The law of one element, and its numbers.

Shape legend: L = queue slots, E = effective length, P = elements of one parameter.
"""

import math
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch

from gq_triton.engines.compiled.bytes import open_bytes, put_bytes, rounded
from gq_triton.engines.compiled.jit import exact, sums
from gq_triton.law import VARIANCE_FLOOR

__all__ = [
    "DTYPES", "TILE", "exact", "exact_scale", "law_arguments", "ring_of", "spread_of", "sums",
    "typed", "weight_of",
]  # fmt: skip

DTYPES = {torch.float32: np.float32, torch.float64: np.float64}


# Elements of one tile: what a loop keeps beside its tensors stays in L1.
TILE = 2048


@exact()
def _open(ring, stride, slots, tile, end):
    return ring, stride, 0


@exact()
def _put(ring, stride, slots, slot, tile, end, grad, unscale):
    pass


@exact()
def _as_it_is(x):
    return x


def ring_of(in_bytes: bool) -> tuple[Callable[..., Any], ...]:
    """Return how loops read, compare with and write a ring of a wide type, or one in bytes.

    Returns:
        ``rows, stride, origin = open(ring, stride, slots, tile, end)``: the gradients of a tile,
        and the element with which they begin; ``compared(x)``, a gradient as it is compared;
        ``put(ring, stride, slots, slot, tile, end, grad, unscale)``, which does nothing for a wide
        ring: the loop over the tile has written it.
    """
    return (open_bytes, rounded, put_bytes) if in_bytes else (_open, _as_it_is, _put)


@cache
def spread_of(used: int, whole: bool = False) -> Callable[..., Any]:
    """Return ``law.Spread.of`` for one element and an effective length the compiler unrolls.

    Args:
        used: E.
        whole: E is L, and the caller passes the number in ``slot``, which is the oldest. A loop
            that overwrites it is compiled to vectors only if it reads and writes it in one place.
    """

    @exact()
    def spread(ring, stride, slots, slot, j, oldest, law):
        _, _, one, share, tiny, floor = law
        newest = slot - 1
        newest = newest + slots if newest < 0 else newest
        base = oldest if whole and used == 1 else ring[np.uint64(newest * stride) + j]
        total = base - base
        largest = tiny
        for age in range(1, used):
            row = slot - 1 - age
            row = row + slots if row < 0 else row
            last = whole and age == used - 1
            deviation = (oldest if last else ring[np.uint64(row * stride) + j]) - base
            total += deviation
            largest = max(largest, abs(deviation))
        mean = total * share
        inverse = one / largest
        scaled = mean * inverse
        squares = scaled * scaled
        for age in range(1, used):
            row = slot - 1 - age
            row = row + slots if row < 0 else row
            last = whole and age == used - 1
            value = oldest if last else ring[np.uint64(row * stride) + j]
            scaled = ((value - base) - mean) * inverse
            squares += scaled * scaled
        return base, mean, inverse, np.sqrt(max(squares * share, floor))

    return spread


@cache
def weight_of(used: int, whole: bool) -> Callable[..., Any]:
    """Return the compiled weight of one element; see `spread_of`."""
    spread = spread_of(used, whole)

    @exact()
    def weight(ring, stride, slots, slot, j, oldest, x, law):
        low, high = law[0], law[1]
        base, mean, inverse, sigma = spread(ring, stride, slots, slot, j, oldest, law)
        z = (abs((x - base) - mean) * inverse) / sigma
        return min(max(z, low), high)

    return weight


def exact_scale(unscale: float) -> bool:
    """Return whether a loss scale is a power of two, so that products with it round nothing.

    With any other scale the compiler may fuse the product with the difference that follows. The
    compared number would then be rounded otherwise than the queued one, so ``eager`` takes over.
    """
    return abs(math.frexp(unscale)[0]) == 0.5


@lru_cache(maxsize=64)
def law_arguments(kind: type, rho: float, used: int) -> tuple[Any, ...]:
    """Return low, high, 1, 1/E, the smallest normal number and the variance floor in one type."""
    tiny = np.finfo(kind).tiny
    return typed(kind, (1.0 / rho, rho, 1.0, 1.0 / used, float(tiny), VARIANCE_FLOOR))


@lru_cache(maxsize=64)
def typed(kind: type, values: tuple[float, ...]) -> tuple[Any, ...]:
    """Return numbers in the type of a kernel's tensors."""
    return tuple(kind(value) for value in values)
