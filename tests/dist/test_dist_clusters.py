"""Local clusters under DDP: W ranks with K clusters are one process with W * K clusters."""

import pytest
from dist_cluster_checks import FOUR_RANKS, THREE_RANKS, run_with
from dist_cluster_loops import TWO_RANKS
from dist_cluster_slices_checks import CHECKS as SLICES
from rank_checks import checks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gq_triton import GradQueue
from gq_triton.dist import GradQueueState

# With the queue whole on every rank, and in slices: the same checks.
QUEUES = pytest.mark.parametrize("shard_queue", [False, True], ids=["whole", "slices"])


@pytest.mark.slow
@QUEUES
@checks(TWO_RANKS)
def test_two_ranks(ranks, check, shard_queue):
    ranks(2).run(run_with, shard_queue, check)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shard_queue",
    [pytest.param(False, marks=pytest.mark.rare), True],
    ids=["whole", "slices"],
)
@checks(THREE_RANKS)
def test_three_ranks(ranks, check, shard_queue):
    ranks(3).run(run_with, shard_queue, check)


@pytest.mark.slow
@checks(FOUR_RANKS)
def test_four_ranks(ranks, check):
    ranks(4).run(run_with, False, check)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
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
