"""The queue in slices (``shard_queue=True``): the same result, each rank its share of the memory.

Everything that needs ranks runs in one spawn each of two, three and four; a failure names the
check.
"""

import pytest
from dist_shard_saved_checks import four_ranks, three_ranks, two_ranks
from hypothesis import given
from hypothesis import strategies as st

from gq_triton.dist.placement import cut
from gq_triton.testing import spawn


@given(numels=st.lists(st.integers(0, 20), min_size=1, max_size=8), world=st.integers(1, 7))
def test_cuts_divide_a_bucket_into_equal_runs(numels: list[int], world: int):
    cuts = cut(tuple(numels), world)
    size = -(-sum(numels) // world)
    owner = [
        next(rank for rank in range(world) if edges[rank] <= element < edges[rank + 1])
        for numel, edges in zip(numels, cuts, strict=True)
        for element in range(numel)
    ]
    assert owner == [element // size for element in range(sum(numels))]
    assert all((edges[0], edges[-1]) == (0, n) for n, edges in zip(numels, cuts, strict=True))


@pytest.mark.slow
def test_two_ranks(tmp_path):
    spawn(2, two_ranks, str(tmp_path), timeout=240)


@pytest.mark.slow
def test_three_ranks():
    spawn(3, three_ranks, timeout=240)


@pytest.mark.slow
def test_four_ranks():
    spawn(4, four_ranks, timeout=240)
