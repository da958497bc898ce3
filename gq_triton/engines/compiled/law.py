"""The law of one element, and the arguments of the loops over elements.

Shape legend: L = queue slots, E = effective length, P = elements of one parameter, N = tensors.
"""

import math
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gq_triton.engines.compiled.bytes import open_bytes, put_bytes, rounded
from gq_triton.engines.compiled.jit import exact, sums
from gq_triton.engines.eager.law import Turn
from gq_triton.float8 import BYTE, slots
from gq_triton.law import VARIANCE_FLOOR

__all__ = [
    "DTYPES", "TILE", "exact", "exact_scale", "fuses", "in_bytes", "law_arguments",
    "ring_arguments", "ring_of", "spread_of", "sums", "typed", "weight_of",
]  # fmt: skip

# Elements of one tile: all are updated, then all are queued while their gradients are still in L1.
TILE = 2048
DTYPES = {torch.float32: np.float32, torch.float64: np.float64}


@exact()
def _open(ring, stride, slots, tile, end):
    return ring, stride, 0


@exact()
def _put(ring, stride, slots, slot, tile, end, grad, unscale):
    for i in range(tile, end):
        j = np.uint64(i)
        ring[np.uint64(slot * stride) + j] = grad[j] * unscale


@exact()
def _as_it_is(x):
    return x


def ring_of(narrow: bool) -> tuple[Callable[..., Any], ...]:
    """Return how loops read, compare with and write a ring of a wide type, or one in bytes.

    Returns:
        ``rows, stride, origin = open(ring, stride, slots, tile, end)``: the gradients of a tile,
        and the element with which they begin; ``compared(x)``, a gradient as it is compared;
        ``put(ring, stride, slots, slot, tile, end, grad, unscale)``.
    """
    return (open_bytes, rounded, put_bytes) if narrow else (_open, _as_it_is, _put)


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


def fuses(turn: Turn, unscale: float, queue: Tensor, *tensors: Tensor) -> bool:
    """Return whether the compiled pass takes these tensors: the law acts, one known type.

    A queue in bytes fits tensors of float32.
    """
    dtype = tensors[0].dtype
    known = dtype in DTYPES and all(tensor.dtype == dtype for tensor in tensors)
    known &= queue.dtype == dtype or (in_bytes(queue) and dtype == torch.float32)
    dense = all(tensor.is_contiguous() for tensor in (queue, *tensors))
    return known and dense and exact_scale(unscale) and bool(turn.rows) and tensors[0].numel() > 0


def in_bytes(queue: Tensor) -> bool:
    """Return whether a ring is in bytes."""
    return queue.dtype == BYTE


def exact_scale(unscale: float) -> bool:
    """Return whether a loss scale is a power of two, so that products with it round nothing.

    With any other scale the compiler may fuse the product with the difference that follows. The
    compared number would then be rounded otherwise than the queued one, so ``eager`` takes over.
    """
    return abs(math.frexp(unscale)[0]) == 0.5


def ring_arguments(turn: Turn, queue: Tensor) -> tuple[Any, ...]:
    """Return a ring as one dimension, the stride of its rows, their number, and the slot."""
    return queue.view(-1).numpy(), queue.shape[1], slots(queue), turn.slot


@lru_cache(maxsize=64)
def law_arguments(kind: type, rho: float, used: int) -> tuple[Any, ...]:
    """Return low, high, 1, 1/E, the smallest normal number and the variance floor in one type."""
    tiny = np.finfo(kind).tiny
    return typed(kind, (1.0 / rho, rho, 1.0, 1.0 / used, float(tiny), VARIANCE_FLOOR))


@lru_cache(maxsize=64)
def typed(kind: type, values: tuple[float, ...]) -> tuple[Any, ...]:
    """Return numbers in the type of a kernel's tensors."""
    return tuple(kind(value) for value in values)
