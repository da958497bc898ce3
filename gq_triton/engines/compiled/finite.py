"""The search for gradients that hold a NaN or an infinity.

Shape legend: N = tensors, P = elements of one tensor, M = pieces of work.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gq_triton.engines import eager
from gq_triton.engines.compiled.jit import exact, vector
from gq_triton.engines.compiled.table import addresses, pieces_of, run_pieces

__all__ = ["all_finite"]

# The integer of a type's size, and the bits of its infinity: without their signs, as integers,
# exactly the numbers that are not finite are at least that large.
_BITS = {
    torch.float16: (np.int16, 0x7C00),
    torch.bfloat16: (np.int16, 0x7F80),
    torch.float32: (np.int32, 0x7F800000),
    torch.float64: (np.int64, 0x7FF0000000000000),
}


@cache
def _kernel(kind: Any) -> Callable[..., Any]:
    magnitude = np.iinfo(kind).max

    @exact()
    def size(bits):
        return kind(bits & magnitude)

    @exact()
    def kernel(pieces, finite, starts, infinity):
        for n in range(len(pieces)):
            index, start, stop = pieces[n, 0], pieces[n, 1], pieces[n, 2]
            bits = vector(starts[index], stop, infinity)[start:]
            # Four streams: memory answers several at once faster than one.
            quarter = bits.size // 4
            b, c, d = bits[quarter:], bits[2 * quarter :], bits[3 * quarter :]
            largest = kind(0)
            for i in range(quarter):
                j = np.uint64(i)
                largest = max(
                    largest,
                    max(max(size(bits[j]), size(b[j])), max(size(c[j]), size(d[j]))),
                )
            for i in range(4 * quarter, bits.size):
                largest = max(largest, size(bits[i]))
            finite[n] = largest < infinity

    return kernel


def all_finite(grads: Sequence[Tensor]) -> Tensor:
    """Return for each gradient whether all of its elements are finite; see ``protocol``."""
    if not grads:
        return eager.all_finite(grads)
    memo: dict[Any, Any] | None = getattr(grads, "memo", None)
    memo = {} if memo is None else memo
    if "numba finite" not in memo:
        dtype = grads[0].dtype
        known = all(grad.dtype == dtype and grad.is_contiguous() for grad in grads)
        memo["numba finite"] = _BITS.get(dtype) if known else None, pieces_of(grads)
    bits, pieces = memo["numba finite"]
    if bits is None:
        return eager.all_finite(grads)
    kind, infinity = bits
    finite = np.empty(len(pieces), np.bool_)
    run_pieces(_kernel(kind), pieces, finite, np.array(addresses(grads)), kind(infinity))
    flags = np.ones(len(grads), np.bool_)
    flags[pieces[~finite, 0]] = False
    return torch.from_numpy(flags)
