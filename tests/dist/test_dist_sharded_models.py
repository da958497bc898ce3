# DTensors are what these parameters are, whatever their types say.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
"""Doors without clusters on FSDP2, HSDP and tensor parallelism: what one process does."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from gq_triton import GQSGD, GQAdamW, GradQueue

pytestmark = pytest.mark.slow

MESHES = {"fsdp": {"shard": 4}, "hsdp": {"copy": 2, "shard": 2}}


class PlugIn:
    """SGD with the plug-in, in the shape of an optimizer."""

    def __init__(self, model, **options):
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        self.queue = GradQueue(model, **options)
        self.queue.attach(self.optimizer)
        self.step, self.metrics = self.optimizer.step, self.queue.metrics
        self.record_loss = self.queue.record_loss


DOORS = {
    "plug-in": PlugIn,
    "GQSGD": lambda model, **options: GQSGD(model.parameters(), lr=0.1, momentum=0.9, **options),
    "GQAdamW": lambda model, **options: GQAdamW(model.parameters(), lr=0.01, **options),
}


def whole_model():
    """Sizes that no mesh divides, so that the ranks hold different numbers of elements."""
    torch.manual_seed(0)
    layers = torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 5)
    return torch.nn.Sequential(*layers).double()


def assert_same(one, other):
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        a = a.full_tensor() if isinstance(a, DTensor) else a
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def batch(step, rank):
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(4, 6, generator=generator).double()


def check_door(rank, sizes, door, match_norm):
    whole = whole_model()
    sharded = copy.deepcopy(whole)
    mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    for layer in (sharded[0], sharded[2], sharded):
        fully_shard(layer, mesh=mesh)
    options = {"queue_length": 3, "backend": "torch", "match_norm": match_norm}
    mine, plain = (DOORS[door](model, **options) for model in (sharded, whole))
    for step in range(6):
        everything = torch.cat([batch(step, r) for r in range(dist.get_world_size())])
        for model, one, x in ((sharded, mine, batch(step, rank)), (whole, plain, everything)):
            model.zero_grad()
            model(x).square().mean().backward()
            one.step()
        assert_same(sharded, whole)
    if door != "plug-in":
        return
    results = mine.metrics(), plain.metrics()
    assert all(result.pop("cluster_sizes") is None for result in results)
    assert results[0] == pytest.approx(results[1], rel=1e-9)
    assert results[1]["mean_weight"] != 1
    assert 0 < results[1]["saturated_high"] < 1


@pytest.mark.parametrize("match_norm", [False, True], ids=["law", "match_norm"])
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_ranks_are_one_process(ranks, sizes, door, match_norm):
    ranks(4).run(check_door, sizes, door, match_norm)


def check_losses(rank, door):
    """Ranks with different losses: the effective length is that of their mean."""
    whole = whole_model()
    sharded = copy.deepcopy(whole)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    options = {"queue_length": 4, "loss_window": 1, "min_queue_length": 1, "backend": "torch"}
    mine, plain = (DOORS[door](model, **options) for model in (sharded, whole))
    for step in range(9):
        losses = [(7 * step + 3 * r) % 5 + r for r in range(2)]
        for model, one, loss, x in (
            (sharded, mine, losses[rank], batch(step, rank)),
            (whole, plain, sum(losses) / 2, torch.cat([batch(step, r) for r in range(2)])),
        ):
            model.zero_grad()
            model(x).square().mean().backward()
            one.record_loss(loss)
            one.step()
        assert_same(sharded, whole)


@pytest.mark.parametrize("door", DOORS)
def test_the_effective_length_follows_the_mean_loss_of_all_ranks(ranks, door):
    ranks(2).run(check_losses, door)


def check_tensor_parallel(rank, door):
    """The gradient of LayerNorm's parameters is a sum whose terms the ranks hold apart."""
    torch.manual_seed(0)
    layers = torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 6), torch.nn.LayerNorm(6)
    whole = torch.nn.Sequential(*layers).double()
    divided = copy.deepcopy(whole)
    plan = {
        "0": ColwiseParallel(),
        "2": RowwiseParallel(output_layouts=Shard(0)),
        "3": SequenceParallel(sequence_dim=0),
    }
    parallelize_module(divided, init_device_mesh("cpu", (2,)), plan)
    options = {"queue_length": 3, "backend": "torch"}
    mine, plain = (DOORS[door](model, **options) for model in (divided, whole))
    for step in range(6):
        for model, one in ((divided, mine), (whole, plain)):
            model.zero_grad()
            output = model(batch(step, 0))
            output = output.full_tensor() if isinstance(output, DTensor) else output
            (output.square() * batch(step, 1)).mean().backward()
            one.step()
        assert_same(divided, whole)


@pytest.mark.parametrize("door", DOORS)
def test_tensor_parallel_parameters_are_those_of_one_process(ranks, door):
    ranks(2).run(check_tensor_parallel, door)
