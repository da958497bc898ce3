"""The noise meter under DDP: ranks are groups, and one message tells of them."""

import pytest
from dist_noise_checks import CHECKS, check_join_is_refused
from rank_checks import checks
from sharded_cluster_cases import Images, Words
from sharded_noise_checks import (
    check_accumulation_without_a_reduction,
    check_refusals,
)
from sharded_noise_checks import check_ranks_are_groups as check_ranks_are_divided


@pytest.mark.slow
@checks(CHECKS)
def test_two_ranks(ranks, check):
    ranks(2).run(check)


@pytest.mark.slow
@checks([check_join_is_refused])
def test_two_ranks_that_end(ranks, check):
    ranks(2).run(check)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Images, Words])
def test_divided_models(ranks, kind):
    ranks(2).run(check_ranks_are_divided, (2,), kind)


@pytest.mark.slow
@pytest.mark.rare
def test_divided_models_with_copies(ranks):
    ranks(4).run(check_ranks_are_divided, (2, 2), Words)


@pytest.mark.slow
@checks([check_accumulation_without_a_reduction, check_refusals])
def test_divided_models_in_other_loops(ranks, check):
    ranks(2).run(check)
