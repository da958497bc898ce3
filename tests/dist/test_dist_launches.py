"""What steps of several ranks launch, and what the host waits for: pretended ranks on meta."""

import inspect
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from kernel_cases import INTERPRETED
from meta_steps import watched
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.testing._internal.distributed import fake_pg

from gq_triton import GradQueue
from gq_triton.dist import GradQueueState, grad_queue_hook

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="Kernels are compiled here, for CUDA."),
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]
# Launches of the package in a step of six parameters in two buckets. They may only become fewer.
CLUSTERS = {"n_clusters": 2, "features": "1"}
BUDGET: list[tuple[dict[str, Any], int]] = [
    ({"match_norm": True}, 52),
    ({"shard_queue": True}, 34),
    (CLUSTERS, 166),
    (CLUSTERS | {"shard_queue": True}, 187),
]


def small():
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)).to("meta")


def checked(step, most):
    """Check what a step launches, apart from the model, and that it reads and sends nothing."""
    seen = watched(step, settle=1)
    own = {place: n for place, n in seen.launches.items() if place != "the model"}
    assert sum(own.values()) <= most, own
    assert not seen.reads
    assert not seen.copies


class Bucket:
    """A bucket as DDP gives it to its hook; DDP's own reducer does not run on the meta device."""

    def __init__(self, params):
        self._params = params
        self._buffer = torch.cat([param.grad.flatten() for param in params])

    def parameters(self):
        return self._params

    def buffer(self):
        return self._buffer


@pytest.fixture
def two_ranks(monkeypatch):
    """Make this process one of two, whose collectives do nothing."""
    if "metafake" not in dist.Backend.backend_list:
        make: Any = fake_pg._create_fake_pg  # torch 2.8 gives it other arguments
        extended = len(inspect.signature(make).parameters) == 2
        devices = ["meta", "cpu"]
        dist.Backend.register_backend("metafake", make, extended_api=extended, devices=devices)
    dist.init_process_group("metafake", store=fake_pg.FakeStore(), rank=0, world_size=2)
    # Only the first step compares the ranks' options.
    monkeypatch.setattr("gq_triton.dist.state.check_same", lambda *args: None)
    # There is no DDP module: each call would look for it through all objects of the test process.
    monkeypatch.setattr("gq_triton.dist.state.ddp_carrying", lambda state, owned: None)
    try:
        dist.all_gather_into_tensor(torch.empty(2, device="meta"), torch.empty(1, device="meta"))
    except NotImplementedError:
        # torch 2.8 has no meta kernels for collectives, so no step can be pretended there; what the
        # step launches does not depend on torch's version, and newer ones check it.
        dist.destroy_process_group()
        pytest.skip("Collectives of this torch do not know the meta device.")
    yield
    dist.destroy_process_group()


def test_launches_reads_and_copies_of_the_hook(two_ranks):
    for options, most in BUDGET:
        model = small()
        params, x = list(model.parameters()), torch.empty(8, 6, device="meta")
        state = GradQueueState(model, backend="triton", **options)

        def step(model=model, params=params, x=x, state=state):
            model.zero_grad()
            model(x).square().mean().backward()
            for part in (params[3:], params[:3]):
                grad_queue_hook(state, Bucket(part)).wait()

        checked(step, most)


def test_launches_reads_and_copies_under_fully_shard(two_ranks, monkeypatch):
    """FSDP2 takes the devices that it knows; here its parameters are on the meta device."""
    meta = torch.device("meta")
    for name, module in list(sys.modules.items()):
        if name.startswith("torch.distributed.fsdp._fully_shard"):
            if hasattr(module, "_get_device_from_mesh"):
                monkeypatch.setattr(module, "_get_device_from_mesh", lambda mesh: meta)
            if hasattr(module, "_get_device_handle"):
                monkeypatch.setattr(module, "_get_device_handle", lambda *args: torch.cpu)
    monkeypatch.setattr(FSDPParamGroup, "_validate_no_meta_params", lambda group: None)
    mesh, x = init_device_mesh("cpu", (2,)), torch.empty(8, 6, device="meta")
    model: Any = fully_shard(small(), mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=True)
    queue = GradQueue(model, backend="triton", **CLUSTERS)
    queue.attach(optimizer)

    def step():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    checked(step, 186)
