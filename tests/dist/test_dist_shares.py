"""What each rank counts in a step of several micro-batches, or of several views of a batch."""

import dist_share_checks as checks
import pytest

from gq_triton.testing import spawn


@pytest.mark.slow
def test_two_ranks():
    spawn(2, checks.two_ranks)
