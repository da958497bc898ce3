"""A ring in bytes: floating numbers of 8 bits, and one exponent for each element.

An element's L gradients have a byte each, and one further byte holds the exponent that they share:
a ring of L gradients has L + 1 rows of ``torch.uint8``, the exponents last. So whatever divides a
ring by elements (slices, shards, rows of a table) divides this one, too.

A byte is a sign, 2 bits of exponent and 5 of fraction. With the shared exponent E it stands for

    +-(1 + fraction / 32) * 2 ** (E - 3 + exponent)    exponent 1 to 3
    +-fraction / 32 * 2 ** (E - 2)                      exponent 0

where ``2 ** E`` is at most the element's largest gradient, which is below ``2 ** (E + 1)``. A
gradient is first rounded to 6 significant bits, whatever the ring holds. Its byte loses no further
bit if it is at least ``2 ** (E - 2)``; below, it is rounded to a multiple of ``2 ** (E - 7)``.
``docs/method.md`` has the bound of the weights' error.

Shape legend: L = queue slots, n = elements.
"""

import torch
from torch import Tensor

__all__ = [
    "BYTE", "EXPONENT_HIGH", "FLOAT8", "LARGEST", "convert", "decode", "encode", "narrowed",
    "replace_", "ring_bytes", "ring_rows", "significant", "slots", "stored_type", "wire_type",
]  # fmt: skip

# The value of queue_dtype, and the type of the ring's tensor.
FLOAT8, BYTE = "float8", torch.uint8
# Shared exponents are biased as float32's. With these bounds the power of two, its reciprocal and
# the smallest step are normal numbers.
EXPONENT_LOW, EXPONENT_HIGH, BIAS = 8, 253, 127
# Largest number: 63 / 32 * 2 ** (EXPONENT_HIGH - BIAS).
LARGEST = 63 / 32 * 2.0 ** (EXPONENT_HIGH - BIAS)
# Bits of a float32's fraction that 6 significant bits leave out.
_DROPPED = 18
# The byte without its sign, of numbers in units of 2 ** E: from a quarter on it is the upper part
# of the float32 minus a constant, below it counts steps of 1 / 128. A float32 of 2 ** 16 to 2 ** 17
# has that step.
_QUARTER, _OFFSET, _COUNTS = 0.25, (125 << 5) - 32, 65536.0


def stored_type(queue_dtype: torch.dtype | str | None, own: torch.dtype) -> torch.dtype:
    """Return the type of a ring's tensor.

    Args:
        queue_dtype: the option.
        own: the type of the parameter, which None stands for.
    """
    return BYTE if isinstance(queue_dtype, str) else queue_dtype or own


def wire_type(queue_dtype: torch.dtype | str | None, own: torch.dtype) -> torch.dtype:
    """Return the type in which raw gradients that are yet to be queued go from rank to rank.

    It is the queue's, which rounds them in any case. Gradients that still carry the loss scale do
    not fit into float16, and sums of bytes with exponents of their own make no sense: there it is
    that of the gradients, ``own``.
    """
    if queue_dtype is None or isinstance(queue_dtype, str) or queue_dtype == torch.float16:
        return own
    return queue_dtype


def ring_rows(length: int, dtype: torch.dtype) -> int:
    """Return the rows of a ring's tensor for ``length`` gradients."""
    return length + 1 if dtype == BYTE else length


def ring_bytes(length: int, dtype: torch.dtype) -> int:
    """Return the bytes that a ring's tensor takes for each element of the parameter."""
    return ring_rows(length, dtype) * dtype.itemsize


def slots(ring: Tensor) -> int:
    """Return how many gradients a ring holds, L."""
    return ring.shape[0] - 1 if ring.dtype == BYTE else ring.shape[0]


def significant(x: Tensor) -> Tensor:
    """Return numbers rounded to 6 significant bits, to even where two are as near, in float32.

    Numbers beyond ``LARGEST`` become that number.
    """
    x = x.to(torch.float32).clamp(-LARGEST, LARGEST)  # float16 does not take these bounds
    bits = x.view(torch.int32)
    half = (1 << (_DROPPED - 1)) - 1
    bits = bits + half + ((bits >> _DROPPED) & 1)
    return (bits & -(1 << _DROPPED)).view(torch.float32)


def narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return numbers in a floating type, clamped to that type's finite range.

    An infinity in a ring would make every weight NaN for L steps.
    """
    largest = torch.finfo(dtype).max
    if largest < torch.finfo(x.dtype).max:
        x = x.clamp(-largest, largest)
    return x.to(dtype)


def decode(ring: Tensor) -> Tensor:
    """Return the gradients ``(L, *)`` that a ring in bytes ``(L + 1, *)`` holds, in float32."""
    codes, exponents = ring[:-1], ring[-1]
    magnitudes = torch.arange(128, dtype=torch.int32, device=ring.device)
    normal = ((magnitudes + _OFFSET) << _DROPPED).view(torch.float32)
    positive = torch.where(magnitudes < 32, magnitudes / 128, normal)
    table = torch.cat([positive, -positive])
    return table[codes.int()] * _power(exponents.int())


def encode(rows: Tensor) -> Tensor:
    """Return gradients ``(L, *)``, finite and of any floating type, as a ring in bytes."""
    rows = significant(rows)
    exponents = _exponent(rows.abs().amax(dim=0))
    codes = _codes(rows, exponents)
    return torch.cat([codes, exponents.to(BYTE)[None]])


def replace_(ring: Tensor, slot: int, row: Tensor) -> None:
    """Put a gradient over one row of a ring in bytes; all rows get the exponent that they need.

    The row that is replaced counts for that exponent once more.

    Args:
        ring: ``(L + 1, n)``, changed.
        slot: the row.
        row: the gradient ``(n,)``, as ``significant`` returns it.
    """
    rows = decode(ring)
    exponents = _exponent(torch.maximum(rows.abs().amax(dim=0), row.abs()))
    rows[slot] = row
    ring[:-1] = _codes(rows, exponents)
    ring[-1] = exponents


def convert(ring: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a ring in another type, within its range; one that has the type as it is.

    Args:
        ring: ``(L, *)``, or ``(L + 1, *)`` in bytes.
        dtype: a floating type, or ``BYTE``.
    """
    if ring.dtype == dtype:
        return ring
    rows = decode(ring) if ring.dtype == BYTE else ring
    return encode(rows) if dtype == BYTE else narrowed(rows, dtype)


def _exponent(largest: Tensor) -> Tensor:
    """Return the shared exponents for the largest magnitudes, as int32."""
    return (largest.view(torch.int32) >> 23).clamp_(EXPONENT_LOW, EXPONENT_HIGH)


def _power(exponents: Tensor) -> Tensor:
    """Return ``2 ** (exponents - BIAS)``, exponents int32 from 1; 0 for 0."""
    return (exponents << 23).view(torch.float32)


def _codes(rows: Tensor, exponents: Tensor) -> Tensor:
    """Return the bytes of numbers of 6 significant bits under given exponents."""
    scaled = rows.abs() * _power(2 * BIAS - exponents)
    above = (scaled.view(torch.int32) >> _DROPPED) - _OFFSET
    below = (scaled + _COUNTS).view(torch.int32) - _bits(_COUNTS)
    codes = torch.where(scaled < _QUARTER, below, above)
    return (codes + torch.where(rows < 0, 128, 0)).to(BYTE)


def _bits(number: float) -> int:
    return int(torch.tensor(number, dtype=torch.float32).view(torch.int32))
