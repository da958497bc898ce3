"""Calls that every rank must make, when one rank has to wait for the others."""

import pytest
from dist_together_checks import CHECKS
from rank_checks import checks


@pytest.mark.slow
@checks(CHECKS)
def test_two_ranks(ranks, check):
    ranks(2).run(check)
