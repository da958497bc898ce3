"""The plug-in on FSDP2 and HSDP: what it reports is what one process reports."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from gq_triton import GradQueue

MESHES = {"fsdp": {"shard": 4}, "hsdp": {"copy": 2, "shard": 2}}


def check_metrics(rank, sizes):
    """Sizes that no mesh divides, so that the ranks hold different numbers of elements."""
    torch.manual_seed(0)
    whole = torch.nn.Sequential(
        torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 5)
    ).double()
    sharded = copy.deepcopy(whole)
    mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    for layer in (sharded[0], sharded[2], sharded):
        fully_shard(layer, mesh=mesh)
    results = []
    for model, ranks in ((sharded, [rank]), (whole, range(dist.get_world_size()))):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        queue = GradQueue(model, queue_length=3, backend="torch")
        queue.attach(optimizer)
        for step in range(6):
            batches = [
                torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + r))
                for r in ranks
            ]
            optimizer.zero_grad()
            model(torch.cat(batches).double()).square().mean().backward()
            optimizer.step()
        metrics = queue.metrics()
        assert metrics.pop("cluster_sizes") is None
        results.append(metrics)
    assert results[0] == pytest.approx(results[1], rel=1e-9)
    assert results[1]["mean_weight"] != 1
    assert 0 < results[1]["saturated_high"] < 1


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_metrics_of_sharded_models_are_those_of_one_process(ranks, sizes):
    ranks(4).run(check_metrics, sizes)
