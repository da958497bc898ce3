"""How much each rank counts in a step of several micro-batches or views of a batch."""

import pytest
from dist_share_checks import CHECKS, run_strictly
from rank_checks import checks


@pytest.mark.slow
@checks(CHECKS)
def test_two_ranks(ranks, check):
    ranks(2).run(run_strictly, check)
