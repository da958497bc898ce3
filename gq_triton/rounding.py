"""Stochastic rounding of weights to bfloat16, with random bits that a step can repeat.

A weight of bfloat16 has 8 significant bits, and an update below half of its last place is lost when
the sum is rounded to the nearest number. Rounded up or down at random, with the odds that make the
mean right, small updates arrive in the mean.

The random bits are a hash of three numbers: the element's place in its tensor, the gradients that
the tensor's queue has taken, and the place of the tensor in the step. A rank's part of a DTensor
counts as a tensor of its own. So every engine has the same bits, every rank that holds the same
weights rounds them alike, and a resumed run repeats them. No generator is asked. The hash is the
32-bit finaliser of MurmurHash3, applied twice.

Shape legend: n = elements.
"""

import torch
from torch import Tensor

__all__ = ["FACTORS", "key_of", "random_bits", "stochastic_bfloat16"]

# The multipliers of MurmurHash3's finaliser.
FACTORS = 0x85EBCA6B, 0xC2B2AE35
_LOW32 = 0xFFFFFFFF


def key_of(queued: int, index: int) -> int:
    """Return the key of a tensor's step, below 2**32.

    Args:
        queued: gradients that the tensor's queue had taken before.
        index: the place of the tensor, or of a part of it; no other of the step has it.
    """
    return int(_hash(torch.tensor((queued + int(_hash(torch.tensor(index + 1)))) & _LOW32)))


def random_bits(key: int, first: int, count: int, device: torch.device) -> Tensor:
    """Return 16 random bits for each of some elements: ``(count,)`` int32 below 2**16.

    Args:
        key: as ``key_of`` returns it.
        first: the first element's place in the tensor.
        count: the number of elements.
        device: where the bits are needed.
    """
    places = torch.arange(first, first + count, dtype=torch.int64, device=device)
    return (_hash(_hash(places & _LOW32) ^ key) >> 16).to(torch.int32)


def stochastic_bfloat16(x: Tensor, bits: Tensor) -> Tensor:
    """Return finite numbers rounded to one of their two neighbours in bfloat16.

    Args:
        x: ``(n,)`` float32. NaN and infinity are kept.
        bits: ``(n,)`` int32 below 2**16; the share of them that leads away from zero is the part of
            the way to that neighbour.
    """
    raw = x.view(torch.int32)
    rounded = ((raw + bits) & -(1 << 16)).view(torch.float32)
    return torch.where(torch.isfinite(x), rounded, x).to(torch.bfloat16)


def _hash(x: Tensor) -> Tensor:
    """Return the hash of integers below 2**32, int64: products wrap around and keep their end."""
    x = x ^ (x >> 16)
    for factor, shift in zip(FACTORS, (13, 16), strict=True):
        x = (x * factor) & _LOW32
        x = x ^ (x >> shift)
    return x
