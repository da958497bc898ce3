"""Local clusters under DDP: W ranks with K clusters are one process with W * K clusters."""

import dist_cluster_checks as checks
import dist_cluster_loops as loops
import dist_cluster_slices_checks as slices
import pytest
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gq_triton import GradQueue
from gq_triton.dist import GradQueueState
from gq_triton.testing import spawn

# With the queue whole on every rank, and in slices: the same checks.
QUEUES = pytest.mark.parametrize("shard_queue", [False, True], ids=["whole", "slices"])


@pytest.mark.slow
@QUEUES
def test_two_ranks(shard_queue):
    spawn(2, loops.run_all, shard_queue, timeout=300.0)


@pytest.mark.slow
@QUEUES
def test_three_ranks(shard_queue):
    spawn(3, checks.run_shared, shard_queue, timeout=300.0)


@pytest.mark.slow
def test_four_ranks():
    spawn(4, checks.check_ranks_are_one_process, timeout=300.0)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_slices(world_size):
    spawn(world_size, slices.run_all, timeout=300.0)


def test_options_that_cannot_hold():
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="need n_clusters"):
        GradQueueState(model, features="0")
    with pytest.raises(ValueError, match="needs features"):
        GradQueueState(model, n_clusters=2)
    with pytest.raises(ValueError, match="cannot cluster these trainable layers"):
        GradQueueState(nn.Sequential(nn.GRU(3, 3)), n_clusters=2, features="0")


def test_the_plug_in_refuses_a_ddp_module(monkeypatch):
    class Wrapped(DistributedDataParallel):
        def __init__(self, module):
            nn.Module.__init__(self)
            self.module = module

        def __getattr__(self, name):
            return nn.Module.__getattr__(self, name)

    with pytest.raises(ValueError, match=r"gq_triton\.dist\.register"):
        GradQueue(Wrapped(nn.Linear(3, 3)), n_clusters=2, features="")
