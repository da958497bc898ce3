"""The noise meter under DDP: ranks are groups, and one message tells of them."""

import pytest
from dist_noise_checks import CHECKS, check_join_is_refused
from rank_checks import checks


@pytest.mark.slow
@checks(CHECKS)
def test_two_ranks(ranks, check):
    ranks(2).run(check)


@pytest.mark.slow
@checks([check_join_is_refused])
def test_two_ranks_that_end(ranks, check):
    ranks(2).run(check)
