"""The law of one element, and the arguments of the loops over elements.

Shape legend: L = queue slots, E = effective length, P = elements of one parameter, N = tensors.
"""

import math
from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from gq_triton.engines.eager.law import Turn
from gq_triton.law import VARIANCE_FLOOR

__all__ = [
    "DTYPES", "TILE", "exact", "exact_scale", "fuses", "law_arguments", "ring_arguments",
    "spread_of", "sums", "typed", "weight_of",
]  # fmt: skip

# Elements of one tile: all are updated, then all are queued while their gradients are still in L1.
TILE = 2048
DTYPES = {torch.float32: np.float32, torch.float64: np.float64}

# No reassociation: (q - b) - s must be computed as written for a constant queue to be constant.
exact = partial(numba.njit, nogil=True, error_model="numpy", fastmath={"contract", "nsz"})
sums = partial(numba.njit, nogil=True, error_model="numpy", fastmath=True)


@cache
def spread_of(used: int) -> Callable[..., Any]:
    """Return ``law.Spread.of`` for one element and an effective length the compiler unrolls."""

    @exact()
    def spread(ring, stride, slots, slot, j, law):
        _, _, one, share, tiny, floor = law
        newest = slot - 1
        newest = newest + slots if newest < 0 else newest
        base = ring[np.uint64(newest * stride) + j]
        total = base - base
        largest = tiny
        for age in range(1, used):
            row = slot - 1 - age
            row = row + slots if row < 0 else row
            deviation = ring[np.uint64(row * stride) + j] - base
            total += deviation
            largest = max(largest, abs(deviation))
        mean = total * share
        inverse = one / largest
        scaled = mean * inverse
        squares = scaled * scaled
        for age in range(1, used):
            row = slot - 1 - age
            row = row + slots if row < 0 else row
            scaled = ((ring[np.uint64(row * stride) + j] - base) - mean) * inverse
            squares += scaled * scaled
        return base, mean, inverse, np.sqrt(max(squares * share, floor))

    return spread


@cache
def weight_of(used: int) -> Callable[..., Any]:
    """Return the compiled weight of one element for an effective length."""
    spread = spread_of(used)

    @exact()
    def weight(ring, stride, slots, slot, j, x, law):
        low, high = law[0], law[1]
        base, mean, inverse, sigma = spread(ring, stride, slots, slot, j, law)
        z = (abs((x - base) - mean) * inverse) / sigma
        return min(max(z, low), high)

    return weight


def fuses(turn: Turn, unscale: float, *tensors: Tensor) -> bool:
    """Return whether the compiled pass takes these tensors: the law acts, one known type."""
    dtype = tensors[0].dtype
    known = dtype in DTYPES and all(tensor.dtype == dtype for tensor in tensors)
    dense = all(tensor.is_contiguous() for tensor in tensors)
    return known and dense and exact_scale(unscale) and bool(turn.rows) and tensors[0].numel() > 0


def exact_scale(unscale: float) -> bool:
    """Return whether a loss scale is a power of two, so that products with it round nothing.

    With any other scale the compiler may fuse the product with the difference that follows. The
    compared number would then be rounded otherwise than the queued one, so ``eager`` takes over.
    """
    return abs(math.frexp(unscale)[0]) == 0.5


def ring_arguments(turn: Turn, queue: Tensor) -> tuple[Any, ...]:
    """Return a ring as one dimension, the stride of its rows, their number, and the slot."""
    slots, stride = queue.shape
    return queue.view(-1).numpy(), stride, slots, turn.slot


@lru_cache(maxsize=64)
def law_arguments(kind: type, rho: float, used: int) -> tuple[Any, ...]:
    """Return low, high, 1, 1/E, the smallest normal number and the variance floor in one type."""
    tiny = np.finfo(kind).tiny
    return typed(kind, (1.0 / rho, rho, 1.0, 1.0 / used, float(tiny), VARIANCE_FLOOR))


@lru_cache(maxsize=64)
def typed(kind: type, values: tuple[float, ...]) -> tuple[Any, ...]:
    """Return numbers in the type of a kernel's tensors."""
    return tuple(kind(value) for value in values)
