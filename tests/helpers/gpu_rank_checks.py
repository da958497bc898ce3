# Gradients exist after a backward pass, although their types allow None.
# pyright: reportOptionalMemberAccess=false
"""The checks that spawned ranks run on the model of gpu_checks.py; see test_gpu.py.

Every function takes the device, and none needs a GPU.
"""

import copy
import io
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from gpu_checks import (
    EXACT,
    F64,
    LABELS,
    LENGTH,
    LR,
    TINY,
    Everything,
    assert_near,
    batch,
    fixed,
    gradients,
    loss_of,
    model,
    no_waiting,
    parameters_of,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP

from gq_triton import GQSGD, GQAdamW, GradQueue
from gq_triton.dist import register


class Litter:
    """Delays and NaN that make a race between streams visible.

    In every step the hook's stream starts late. Late in the backward pass the other stream fills
    free memory with NaN, which shows where memory was freed too early.
    """

    def __init__(self, state: Any, module: Everything, device: str) -> None:
        self.state, self.device = state, torch.device(device, 0)
        shapes = [p.shape for p in module.parameters()]
        self.sizes = [shape.numel() * k for shape in shapes for k in (1, LENGTH)] + [5, 10, 20]
        module.late = lambda grad: self.drop()

    def drop(self) -> None:
        _ = [torch.full((n,), torch.nan, dtype=F64, device=self.device) for n in self.sizes * 4]

    def delay(self) -> None:
        with torch.cuda.stream(self.state.route.context.streams.of(self.device)):
            torch.cuda._sleep(20_000_000)  # about 10 ms


def check_hook(device: str, options: dict[str, Any], **ddp_options: Any) -> None:
    """Assert that one rank does what the plug-in does on the CPU, whatever the streams do."""
    module, twin = model(device), model("cpu")
    ddp = DDP(module, **{"bucket_cap_mb": TINY, **ddp_options})
    state = register(ddp, queue_length=LENGTH, loss_window=2, min_queue_length=2, **options)
    single = {name: value for name, value in options.items() if name != "shard_queue"}
    queue = GradQueue(twin, queue_length=LENGTH, loss_window=2, min_queue_length=2, **single)
    optimizers = [torch.optim.SGD(m.parameters(), lr=LR) for m in (module, twin)]
    queue.attach(optimizers[1])
    litter = Litter(state, module, device)
    # With clusters the hook's effective length is that of the losses before the step.
    losses: list[Tensor] = []
    clustered = "n_clusters" in options
    for step in range(2 * LENGTH + 4):
        if step == LENGTH + 3:
            # On the device, where nothing waits for the copy into new rings.
            state.load_state_dict(copy.deepcopy(state.state_dict()))
        litter.delay()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = loss_of(ddp, batch(step, device))
        state.record_loss(loss.detach())
        loss.backward()
        loss = loss_of(twin, batch(step, "cpu"))
        losses.append(loss.detach())
        if step or not clustered:
            queue.record_loss(losses[-2 if clustered else -1])
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        assert_near(gradients(module), gradients(twin), EXACT)
        here, there = state.metrics(), queue.metrics()
        for name in ("mean_weight", "norm_ratio", "effective_length"):
            # The kernel returns its sums in float32, with an error of 2**-24 each.
            assert abs(here[name] - there[name]) <= 1e-6 * abs(there[name]), name
    check_saved(state, ddp, device, options, ddp_options)


def check_saved(
    state: Any, ddp: DDP, device: str, options: dict[str, Any], ddp_options: dict[str, Any]
) -> None:
    """Save the state to a file and load it into a new run; compare at once and two steps later."""
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    file.seek(0)
    module = copy.deepcopy(ddp.module)
    again = DDP(module, **{"bucket_cap_mb": TINY, **ddp_options})
    # The copy needs a new state: a deep copy of a clustered model has no clusters.
    other = register(again, queue_length=LENGTH, loss_window=2, min_queue_length=2, **options)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.digest() == state.digest()
    for step in (50, 51):
        for either, recorder in ((ddp, state), (again, other)):
            either.zero_grad()
            loss = loss_of(either, batch(step, device))
            recorder.record_loss(loss.detach())
            loss.backward()
        assert_near(gradients(module), gradients(ddp.module), EXACT)


def check_scaled(device: str, options: dict[str, Any]) -> None:
    """A loss scale of a power of two changes no number, and an overflow changes nothing at all."""
    runs = []
    for scaled in (True, False):
        scaler = torch.amp.GradScaler(device, init_scale=2.0**10, enabled=scaled)
        ddp = DDP(model(device, tables=False), bucket_cap_mb=TINY)
        state = register(ddp, queue_length=LENGTH, grad_scaler=scaler, **options)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=LR)
        for step in range(LENGTH + 3):
            if step == LENGTH + 1 and scaled:
                before = state.digest(), parameters_of(ddp)
                scaler.scale(loss_of(ddp, batch(step, device)) * torch.inf).backward()
                scaler.step(optimizer)
                scaler.update()
                assert state.digest() == before[0]
                assert_near(parameters_of(ddp), before[1], 0.0)
                assert scaler.get_scale() == 2.0**9
            optimizer.zero_grad()
            scaler.scale(loss_of(ddp, batch(step, device))).backward()
            scaler.step(optimizer)
            scaler.update()
        runs.append(parameters_of(ddp))
    # Not bit for bit: convolutions may add in another order on a GPU.
    assert_near(runs[0], runs[1], EXACT)


def check_hook_waits_for_nothing(device: str, options: dict[str, Any]) -> None:
    ddp = DDP(model(device, tables=False), bucket_cap_mb=TINY)
    state = register(ddp, queue_length=LENGTH, loss_window=2, min_queue_length=2, **options)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=LR)
    batches = [batch(step, device) for step in range(LENGTH + 5)]

    def step(inputs: tuple[Tensor, ...]) -> None:
        optimizer.zero_grad()
        loss = loss_of(ddp, inputs)
        state.record_loss(loss.detach())
        loss.backward()
        optimizer.step()

    for inputs in batches[:3]:  # the buckets are cut anew after the first step
        step(inputs)
    with no_waiting():
        for inputs in batches[3:]:
            step(inputs)
    assert set(map(int, state.state_dict()["queued"].values())) == {len(batches)}


def check_sharded(device: str, kind: Any, **options: Any) -> None:
    """Parameters in FSDP2's shards give what whole ones give."""
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(6, 50), nn.Tanh(), nn.Linear(50, 1)).to(device).to(F64)
    sharded = copy.deepcopy(whole)
    mesh = init_device_mesh(device, (1,))
    for layer in (sharded[0], sharded[2], sharded):
        fully_shard(layer, mesh=mesh)
    options |= {"lr": 0.01, "queue_length": LENGTH, "loss_window": 2, "min_queue_length": 2}
    pairs = [(m, kind(m.parameters(), **options)) for m in (sharded, whole)]
    for step in range(LENGTH + 4):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step), dtype=F64).to(device)
        for module, optimizer in pairs:
            optimizer.zero_grad()
            loss = (module(x) - 1).square().mean()
            optimizer.record_loss(loss.detach())
            loss.backward()
            optimizer.step()
        for shard, param in zip(sharded.parameters(), whole.parameters(), strict=True):
            assert isinstance(shard, DTensor)
            torch.testing.assert_close(shard.full_tensor(), param.detach(), rtol=1e-12, atol=1e-12)


HOOKS: dict[str, dict[str, Any]] = {
    "one cluster": {},
    "one cluster, in slices": {"shard_queue": True},
    "clusters": {"n_clusters": 4, "features": "features", "clusterer": fixed},
    "clusters of the output's gradient, in slices": {
        "n_clusters": 4, "features": "output_gradient", "clusterer": fixed, "shard_queue": True,
    },
}  # fmt: skip


# The checks that one rank can run, with the backend that GPUs use.
ONE_RANK: dict[str, Callable[[str], None]] = {
    "hook, large buckets": lambda device: check_hook(
        device, {}, gradient_as_bucket_view=True, bucket_cap_mb=25
    ),
    "FSDP2, GQAdamW": lambda device: check_sharded(device, GQAdamW),
    "FSDP2, GQSGD": lambda device: check_sharded(device, GQSGD, momentum=0.9),
}
for _name, _options in HOOKS.items():
    ONE_RANK[f"hook, {_name}"] = lambda device, o=_options: check_hook(device, dict(o))
    ONE_RANK[f"scaler, {_name}"] = lambda device, o=_options: check_scaled(device, dict(o))
for _name in ("one cluster", "one cluster, in slices"):
    ONE_RANK[f"waits, {_name}"] = lambda device, o=HOOKS[_name]: check_hook_waits_for_nothing(
        device, o
    )


def run_one(rank: int, name: str, device: str) -> None:
    """Run a check of ``ONE_RANK`` with NCCL where the device is a GPU."""
    if device == "cuda" and dist.get_backend() != "nccl":
        torch.cuda.set_device(0)
        dist.destroy_process_group()
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    ONE_RANK[name](device)


def halves(features: Tensor) -> Tensor:
    """Return the rank that each sample of the whole batch is on."""
    return torch.arange(2).repeat_interleave(len(features) // 2)


def two_ranks_on_one_device(rank: int, device: str) -> None:
    """Compare two ranks that share a device, over gloo, with one process on the CPU."""
    both = {"n_clusters": 2, "features": "features", "clusterer": halves}
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = [({}, {}), ({"n_clusters": 1}, both)]
    for options, single in pairs:
        ddp = DDP(model(device, tables=False), bucket_cap_mb=TINY, broadcast_buffers=False)
        state = register(ddp, queue_length=LENGTH, **options)
        twin = model("cpu", tables=False)
        for either in (ddp.module, twin):
            either.eval()  # statistics of the batch would be those of half of it
        queue = GradQueue(twin, queue_length=LENGTH, **single)
        optimizers = [torch.optim.SGD(m.parameters(), lr=LR) for m in (ddp, twin)]
        queue.attach(optimizers[1])
        for step in range(LENGTH + 3):
            for optimizer in optimizers:
                optimizer.zero_grad()
            whole = batch(step, "cpu")
            size = len(LABELS) // 2
            mine = tuple(part[rank * size :][:size].to(device) for part in whole)
            loss_of(ddp, mine).backward()
            loss_of(twin, whole).backward()
            for optimizer in optimizers:
                optimizer.step()
            assert_near(gradients(ddp.module), gradients(twin), EXACT)
        digests = [None, None]
        dist.all_gather_object(digests, state.digest())
        assert digests[0] == digests[1]
