"""The queue in slices (``shard_queue=True``): the same result, each rank its share of the memory.

A check runs on every rank; all checks of a number of ranks share one spawn.
"""

import pytest
from dist_shard_checks import check_not_finite_in_one_slice, check_same_as_whole
from dist_shard_saved_checks import FOUR_RANKS, THREE_RANKS, TWO_RANKS
from hypothesis import given
from hypothesis import strategies as st
from plan_counts import check_as_planned
from rank_checks import checks, folder_for

from gq_triton.dist.routes.cuts import cut


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
@checks(TWO_RANKS)
def test_two_ranks(ranks, check, tmp_path):
    ranks(2).run(check, *folder_for(check, tmp_path))


@pytest.mark.slow
def test_two_ranks_hold_and_send_what_is_planned(ranks):
    ranks(2).run(check_as_planned, "DDP hook, slices")


# Rare: what two ranks, or two and three, do in the gate.
@pytest.mark.slow
@checks(THREE_RANKS, rare=[check_not_finite_in_one_slice])
def test_three_ranks(ranks, check):
    ranks(3).run(check)


@pytest.mark.slow
@checks(FOUR_RANKS, rare=[check_same_as_whole])
def test_four_ranks(ranks, check):
    ranks(4).run(check)
