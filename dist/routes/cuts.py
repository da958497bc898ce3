"""The positions at which parameters are cut when a bucket is divided among the ranks."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from gq_triton.dist.collectives import slice_size

__all__ = ["common", "copy_where_held", "cut", "holders"]


@lru_cache(maxsize=4096)
def cut(numels: tuple[int, ...], world: int) -> list[tuple[int, ...]]:
    """Return where the parameters of a bucket are cut when it is divided into ``world`` slices.

    Args:
        numels: elements of each parameter, in the order of the bucket.
        world: W, the number of ranks.

    Returns:
        For each parameter W + 1 positions among its own elements, in memory order: rank r holds
        those from position r up to position r + 1, possibly none.
    """
    size = slice_size(sum(numels), world)
    edges = torch.arange(world + 1) * size
    return [
        tuple((edges - (end - numel)).clamp(0, numel).tolist())
        for numel, end in zip(numels, accumulate(numels), strict=True)
    ]


def holders(cuts: tuple[int, ...]) -> int:
    """Return how many ranks hold a part of a parameter."""
    return sum(a < b for a, b in pairwise(cuts))


def common(
    old: tuple[int, ...], giver: int, new: tuple[int, ...], taker: int
) -> list[tuple[int, int]]:
    """Return the range of elements that ``giver`` held and ``taker`` is to hold, as a list.

    Args:
        old: the cuts so far.
        giver: the rank that held the elements.
        new: the cuts to come.
        taker: the rank that is to hold them.

    Returns:
        One pair, the first element and the one after the last; an empty list where there is none.
    """
    a, b = max(old[giver], new[taker]), min(old[giver + 1], new[taker + 1])
    return [(a, b)] if a < b else []


def copy_where_held(
    all_rows: Tensor, held_rows: Tensor, places: Sequence[int | None], *, to_held: bool
) -> None:
    """Copy rows between the table of all cut parameters and the table of those held here.

    Args:
        all_rows: a row for each parameter that is cut.
        held_rows: a row for each parameter of which this rank holds a part.
        places: for each row of ``all_rows`` its row in ``held_rows``, or None.
        to_held: the direction.
    """
    for row, place in enumerate(places):
        if place is not None and to_held:
            held_rows[place].copy_(all_rows[row])
        elif place is not None:
            all_rows[row].copy_(held_rows[place])
