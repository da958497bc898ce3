"""The samplers on two ranks: disjoint work, one gate, and runs that continue."""

import pytest
from dist_sampling_checks import CHECKS
from rank_checks import checks


@pytest.mark.slow
@checks(CHECKS)
def test_two_ranks(ranks, check):
    ranks(2).run(check)
