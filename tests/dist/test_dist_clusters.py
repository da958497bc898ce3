"""Local clusters under DDP: W ranks with K clusters are one process with W * K clusters."""

import pytest
from dist_cluster_checks import (
    THREE_RANKS,
    check_a_resumed_run_goes_on_bit_for_bit,
    check_ranks_are_one_process,
    run_with,
)
from dist_cluster_loops import TWO_RANKS, check_compiled_models
from dist_cluster_slices_checks import CHECKS as SLICES
from rank_checks import checks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gq_triton import GradQueue
from gq_triton.dist import GradQueueState

# Seconds each. In the gate three ranks make the first two in slices; a single process compiles, and
# so do shards.
RARE_IN_SLICES = (
    check_ranks_are_one_process,
    check_a_resumed_run_goes_on_bit_for_bit,
    check_compiled_models,
)


# With the queue whole on every rank, and in slices: the same checks.
@pytest.mark.slow
@checks([check for check in TWO_RANKS if check is not check_compiled_models])
def test_two_ranks(ranks, check):
    ranks(2).run(run_with, False, check)


@pytest.mark.slow
@checks([check for check in TWO_RANKS if check not in RARE_IN_SLICES])
def test_two_ranks_in_slices(ranks, check):
    ranks(2).run(run_with, True, check)


@pytest.mark.rare
@checks(RARE_IN_SLICES)
def test_rare_cases_in_slices(ranks, check):
    ranks(2).run(run_with, True, check)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shard_queue",
    [pytest.param(False, marks=pytest.mark.rare), True],
    ids=["whole", "slices"],
)
@checks(THREE_RANKS)
def test_three_ranks(ranks, check, shard_queue):
    ranks(3).run(run_with, shard_queue, check)


@pytest.mark.rare
def test_a_compiled_model_on_two_ranks(ranks):
    ranks(2).run(run_with, False, check_compiled_models)


@pytest.mark.rare
def test_four_ranks(ranks):
    ranks(4).run(run_with, False, check_ranks_are_one_process)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.rare), 3])
@checks(SLICES)
def test_slices(ranks, check, world_size):
    ranks(world_size).run(check)


def test_options_that_cannot_hold():
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="needs n_clusters"):
        GradQueueState(model, features="0")
    with pytest.raises(ValueError, match="needs features"):
        GradQueueState(model, n_clusters=2)


def test_the_plug_in_refuses_a_ddp_module(monkeypatch):
    class Wrapped(DistributedDataParallel):
        def __init__(self, module):
            nn.Module.__init__(self)
            self.module = module

        def __getattr__(self, name):
            return nn.Module.__getattr__(self, name)

    with pytest.raises(ValueError, match=r"gq_triton\.dist\.register"):
        GradQueue(Wrapped(nn.Linear(3, 3)), n_clusters=2, features="")
