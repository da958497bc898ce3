"""What the package really holds and sends, to compare with the plan: real or pretended ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from gq_triton import GQSGD, GradQueue
from gq_triton.dist import register
from gq_triton.dist.routes.clustered_sliced import ClusteredSlices
from gq_triton.plan.formulas import Queue
from gq_triton.plan.machine import Machine
from gq_triton.plan.shapes import shapes_of
from gq_triton.plan.ways import WAYS, Cost, Setup, Way, cost
from gq_triton.ring import local

LENGTH, CLUSTERS, PER_NODE = 3, 2, 4
TRIPS = {
    "allreduce_": 2, "alltoall_base_": 1, "_allgather_base_": 1, "_reduce_scatter_base_": 1,
}  # fmt: skip


class Net(nn.Module):
    """Blocks and a head of sizes that no number of ranks divides; two buckets if it is wide."""

    def __init__(self, wide: bool) -> None:
        super().__init__()
        a, b = (701, 401) if wide else (43, 29)
        self.blocks = nn.Sequential(nn.Linear(30, a), nn.Tanh(), nn.Linear(a, b))
        self.features = nn.Tanh()
        self.head = nn.Linear(b, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(self.blocks(x)))


class Sent(TorchDispatchMode):
    """A count of the bytes that a rank sends on a ring, group by group."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.__name__.split(".")[0]
            whole = args[1] if name == "_reduce_scatter_base_" else args[0]
            nbytes = sum(t.nbytes for t in (whole if isinstance(whole, list) else [whole]))
            objects = [arg for arg in args if isinstance(arg, torch.ScriptObject)]
            (group,) = [one for one in objects if "ProcessGroup" in str(one._type())]
            ranks = dist.ProcessGroup.unbox(group).size()
            self.bytes += TRIPS[name] * (ranks - 1) / ranks * nbytes
        return func(*args, **(kwargs or {}))


@contextmanager
def pretended(world: int, rank: int = 0) -> Iterator[None]:
    """Be a rank of a group that exists on no machine: collectives leave tensors as they are."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def in_turn(features: Tensor) -> Tensor:
    """Return labels that no value decides: pretended ranks of torch 2.8 gather no numbers."""
    return torch.arange(len(features)) % CLUSTERS


def counted(
    way: Way | None, wrap: str, per_node: int, queue_dtype: Queue = None
) -> tuple[int, int, float]:
    """Return the bytes of queue and statistics on this rank, and those that it sends in a step.

    Args:
        way: the way; None is plain training.
        wrap: that of the way.
        per_node: ranks of a node.
        queue_dtype: the queue's type.
    """
    torch.manual_seed(0)
    model = Net(wrap == "ddp")
    wrapped: nn.Module = model
    world = dist.get_world_size()
    if wrap == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        shape = (world,) if wrap == "fsdp2" else (world // per_node, per_node)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "shards")[-len(shape) :])
        for module in (model.blocks[0], model.blocks[2], model):
            fully_shard(module, mesh=mesh)
    options: dict[str, Any] = {
        "queue_length": LENGTH,
        "queue_dtype": queue_dtype,
        "backend": "torch",
    }
    clusters = (
        {"n_clusters": CLUSTERS, "features": "features", "clusterer": in_turn}
        if way and way.clusters
        else {}
    )
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    queues: Any = None
    if way is not None and way.law == "optimizer":
        optimizer = GQSGD(model.parameters(), 0.01, momentum=0.9, **options)
    elif way is not None and way.law == "hook":
        given = {"shard_queue": way.sliced, **clusters, **options}
        queues = register(wrapped, **given).queues
    elif way is not None:
        plug_in = GradQueue(model, **clusters, **options)
        plug_in.attach(optimizer)
        queues = plug_in._queues
    inputs = torch.randn(4, 30, generator=torch.Generator().manual_seed(1))

    def step() -> None:
        optimizer.zero_grad()
        wrapped(inputs).square().mean().backward()
        optimizer.step()

    for _ in range(3):  # in the first ones DDP cuts its buckets, and rings are allocated
        step()
    with Sent() as sent:
        step()
    rings = [state["queue"] for state in optimizer.state.values() if "queue" in state]
    beside: list[Tensor] = []
    if queues is not None:
        rings += list(queues._queue.values())
    if isinstance(queues, ClusteredSlices):
        beside += queues._buffers.held.values()
    return _bytes(rings), _bytes(beside), sent.bytes


def _bytes(tensors: list[Tensor]) -> int:
    return sum(local(tensor).untyped_storage().nbytes() for tensor in tensors)


MACHINE = Machine(1e12, 1e11, 1e11, 1e-6, PER_NODE, 0.1, 2**36)
BY_NAME = {way.name: way for way in WAYS}


def planned(name: str, world: int, queue_dtype: Queue = None) -> Cost:
    way = BY_NAME[name]
    with torch.device("meta"):
        shapes = shapes_of("net", Net(way.wrap == "ddp"))
    clusters = CLUSTERS if way.clusters else 0
    found = cost(way, Setup(shapes, "sgd", LENGTH, clusters), MACHINE, world, queue_dtype)
    assert found is not None
    return found


def check_as_planned(rank: int, name: str, queue_dtype: Queue = None) -> None:
    plan = planned(name, dist.get_world_size(), queue_dtype)
    held, beside, sent = counted(plan.way, plan.way.wrap, PER_NODE, queue_dtype)
    # The shards and slices of later ranks may be smaller.
    assert held == plan.queue or (rank > 0 and held < plan.queue)
    assert beside == (plan.beside if plan.way.wrap == "ddp" else 0)
    assert sent == pytest.approx(plan.sent, rel=1e-12)
    if rank == 0 and dist.get_backend() != "gloo" and plan.way.wrap == "ddp":
        return  # DDP's own reduction needs ranks that answer
    assert counted(None, plan.way.wrap, PER_NODE)[2] == pytest.approx(plan.sent_plain, rel=1e-12)
