# Gradients are there after a backward pass, whatever their types say.
# pyright: reportOptionalMemberAccess=false
"""One model with every kind of layer, the loop that trains it, and what spawned ranks check of it.

Nothing here needs a GPU: everything takes the device.
"""

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from optim_cases import assert_same, parameters, set_gradients
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

from gq_triton import GQSGD, GQAdamW, GradQueue
from gq_triton.dist import register

F64 = torch.float64
LENGTH = 3
LR = 0.002  # the loss falls: where it grows, rounding does too
# Clusters 1 and 3 are empty.
LABELS = torch.tensor([0, 2, 2, 0, 4, 0, 0, 2, 2, 4])
TINY = 0.0001  # MiB: every layer becomes a bucket of its own
# Float64 on both sides: an ulp in every parameter, as from sums of another order, comes to 1e-13 in
# these runs.
EXACT = 1e-10
WIDTH = 300  # the weight `mix` has more elements than one program of the clustered law takes


class Everything(nn.Module):
    """Every kind of layer that one backward pass clusters; one bias has a single element."""

    def __init__(self, tables: bool = True, recomputes: bool = False) -> None:
        super().__init__()
        self.recomputes = recomputes
        # No bias here: before a BatchNorm its gradient is 0, and what is computed mere rounding.
        self.conv, self.batch_norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.group_norm = nn.Conv2d(4, 6, 3), nn.GroupNorm(2, 6)
        self.tokens = nn.Embedding(11, 6) if tables else None
        self.mix, self.features = nn.Linear(6, WIDTH), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 1)
        # Called with the gradient of an early activation: when the backward pass is almost done.
        self.late: Callable[[Tensor], None] | None = None

    def seen(self, images: Tensor) -> Tensor:
        x = torch.tanh(self.batch_norm(self.conv(images)))
        return torch.tanh(self.group_norm(self.conv2(x))).mean(dim=(2, 3))

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        recomputes = self.recomputes and torch.is_grad_enabled()
        x = checkpoint(self.seen, images, use_reentrant=False) if recomputes else self.seen(images)
        if self.late is not None:
            x.register_hook(self.late)
        if self.tokens is not None:
            x = x + self.tokens(tokens).mean(dim=1)
        return self.head(torch.tanh(self.features(self.mix(x))))


def model(device: str, dtype: torch.dtype = F64, **options: Any) -> Everything:
    torch.manual_seed(0)
    return Everything(**options).to(dtype).to(device)


def batch(
    step: int, device: str, dtype: torch.dtype = F64, apart: bool = False
) -> tuple[Tensor, Tensor]:
    """Return images and tokens of ten samples; ``apart`` has them lie around four far points."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(len(LABELS), 3, 8, 8, generator=generator, dtype=F64)
    tokens = torch.randint(0, 11, (len(LABELS), 5), generator=generator)
    if apart:
        tokens = (torch.arange(len(LABELS))[:, None] % 4).expand(-1, 5)
    return images.to(dtype).to(device), tokens.to(device)


def loss_of(module: Any, inputs: tuple[Tensor, ...]) -> Tensor:
    return (module(*inputs) - 1).square().mean()


def fixed(features: Tensor) -> Tensor:
    """Return the same clusters on every device, with other samples in them every time."""
    return LABELS.to(features.device)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    named = module.named_parameters()
    return {name: p.grad.detach().cpu().clone() for name, p in named if p.grad is not None}


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    """Compare by name, relative to the largest element of each tensor."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.double().abs().max()) or 1.0
        error = float((actual[name].double().cpu() - value.double().cpu()).abs().max()) / scale
        assert error <= rtol, f"{name}: relative error {error:.2e} > {rtol:.0e}"


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().cpu().clone() for name, p in module.named_parameters()}


def trained(device: str, options: dict[str, Any], **changes: Any) -> list[Any]:
    """Return labels, metrics and weighted gradients of every step; parameters last."""
    channels_last, compiles = changes.pop("channels_last", False), changes.pop("compiles", False)
    dtype, model_options = changes.pop("dtype", F64), changes
    module = model(device, dtype, **model_options)
    if channels_last:
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    queue = GradQueue(module, queue_length=LENGTH, **options)
    optimizer = torch.optim.SGD(module.parameters(), lr=LR)
    queue.attach(optimizer)
    run = torch.compile(module, fullgraph=True) if compiles else module
    seen: list[Any] = []
    for step in range(LENGTH + 3):
        images, tokens = batch(step, device, dtype, apart="clusterer" not in options)
        if channels_last:
            images = images.to(memory_format=torch.channels_last)
        optimizer.zero_grad()
        loss = loss_of(run, (images, tokens))
        queue.record_loss(loss.detach())
        loss.backward()
        optimizer.step()
        labels = None if queue.labels_ is None else queue.labels_.cpu()
        seen.append((labels, queue.metrics(), gradients(module)))
    return [*seen, parameters_of(module)]


def compare_runs(runs: tuple[list[Any], list[Any]], rtol: float) -> None:
    for (labels, metrics, grads), (labels_, metrics_, grads_) in zip(
        runs[0][:-1], runs[1][:-1], strict=True
    ):
        assert_same(labels, labels_)
        assert_near(grads, grads_, rtol)
        # The kernel hands its sums over in float32: 2**-24 each.
        assert metrics.pop("cluster_sizes") == metrics_.pop("cluster_sizes")
        assert metrics == pytest.approx(metrics_, rel=1e-6)
    assert_near(runs[0][-1], runs[1][-1], rtol)
    assert runs[0][-2][1]["mean_weight"] != 1, "the law changed nothing"


def in_bfloat16(module: nn.Module, part: tuple[Tensor, Tensor], inside: bool) -> dict[str, Tensor]:
    module.zero_grad()
    with torch.autocast(part[0].device.type, dtype=torch.bfloat16):
        loss = loss_of(module, part)
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    return gradients(module)


def leaves(dtype: torch.dtype) -> list[Tensor]:
    """Return leaves of every shape and memory order, of several chunks, and of odd addresses."""
    generator = torch.Generator().manual_seed(9)
    sizes = 40_000, 16_385, 1, 3, 1001
    more = [torch.randn(n, generator=generator, dtype=F64).to(dtype) for n in sizes]
    return parameters(dtype) + [leaf.requires_grad_() for leaf in more]


def moved(leaf: Tensor, device: str, dtype: torch.dtype, shift: int = 0) -> Tensor:
    """Return the leaf in the same memory order, ``shift`` elements from an aligned address."""
    room = torch.zeros(2 * leaf.numel() + 300, dtype=dtype, device=device)
    twin = room.as_strided(leaf.shape, leaf.stride(), shift)
    return twin.copy_(leaf.detach()).requires_grad_()


class Twins:
    """The same parameters on two devices, with an optimizer on each; gradients are equal."""

    def __init__(
        self, variant: Any, dtypes: tuple[torch.dtype, ...], devices: tuple[str, ...],
        **options: Any,
    ) -> None:  # fmt: skip
        # The source of the gradients: both get numbers that both types hold.
        self.source = leaves(torch.float32)
        self.params = [
            [moved(leaf, device, dtype, shift=index % 2) for index, leaf in enumerate(self.source)]
            for device, dtype in zip(devices, dtypes, strict=True)
        ]
        self.optimizers = [variant.build(params, **options) for params in self.params]

    def run(self, steps: range) -> None:
        for step in steps:
            set_gradients(self.source, step)
            for params, optimizer in zip(self.params, self.optimizers, strict=True):
                for param, leaf in zip(params, self.source, strict=True):
                    param.grad = leaf.grad.to(param)
                optimizer.record_loss(torch.tensor(50.0 - step, device=params[0].device))
                optimizer.step()

    def compare(self, tolerance: float) -> None:
        for left, right in zip(*self.params, strict=True):
            left, right = left.detach().cpu().double(), right.detach().cpu().double()
            torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raise where the host waits for the device."""
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Litter:
    """Makes a race between streams visible.

    The stream of the hook starts late in every step, and late in the backward pass the other one
    fills memory that was given back too early with NaN.
    """

    def __init__(self, state: Any, module: Everything, device: str) -> None:
        self.state, self.device = state, torch.device(device, 0)
        shapes = [p.shape for p in module.parameters()]
        self.sizes = [shape.numel() * k for shape in shapes for k in (1, LENGTH)] + [5, 10, 20]
        module.late = lambda grad: self.drop()

    def drop(self) -> None:
        _ = [torch.full((n,), torch.nan, dtype=F64, device=self.device) for n in self.sizes * 4]

    def delay(self) -> None:
        with torch.cuda.stream(self.state.streams.of(self.device)):
            torch.cuda._sleep(20_000_000)  # about 10 ms


def check_hook(device: str, options: dict[str, Any], **ddp_options: Any) -> None:
    """One rank: what the plug-in does on the CPU, whatever the streams do; saved state included."""
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
            # The kernel hands its sums over in float32: 2**-24 each.
            assert abs(here[name] - there[name]) <= 1e-6 * abs(there[name]), name
    check_saved(state, ddp, device, options, ddp_options)


def check_saved(
    state: Any, ddp: DDP, device: str, options: dict[str, Any], ddp_options: dict[str, Any]
) -> None:
    """Through a file into a new run: the same digest, then and two steps later."""
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    file.seek(0)
    module = copy.deepcopy(ddp.module)
    again = DDP(module, **{"bucket_cap_mb": TINY, **ddp_options})
    # Every other module has a state of its own: a deep copy of a clustered model has none.
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
    """A scaler that is a power of two changes no number; an overflow queues and changes nothing."""
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


CLUSTERS: dict[str, dict[str, Any]] = {
    "one cluster": {},
    "layer": {"n_clusters": 4, "features": "features", "clusterer": fixed},
    "output gradient": {"n_clusters": 4, "features": "output_gradient", "clusterer": fixed},
    "variant": {
        "n_clusters": 4, "features": "mix", "clusterer": fixed, "loss_window": 2,
        "min_queue_length": 2, "centroid_scale": "standard_error", "population_power": 0.5,
        "queue_dtype": torch.bfloat16,
    },
    "k-means": {"n_clusters": 4, "features": "features"},
    "k-means, output gradient": {"n_clusters": 2, "features": "output_gradient"},
}  # fmt: skip
HOOKS: dict[str, dict[str, Any]] = {
    "one cluster": {},
    "one cluster, in slices": {"shard_queue": True},
    "clusters": {"n_clusters": 4, "features": "features", "clusterer": fixed},
    "clusters of the output's gradient, in slices": {
        "n_clusters": 4, "features": "output_gradient", "clusterer": fixed, "shard_queue": True,
    },
}  # fmt: skip


def one_rank(rank: int, device: str) -> None:
    """Everything that one rank can show, with the backend that GPUs use."""
    if device == "cuda":
        torch.cuda.set_device(0)
        dist.destroy_process_group()
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    failed = []
    checks: list[tuple[str, Callable[[], None]]] = []
    for name, options in HOOKS.items():
        checks.append((f"hook, {name}", lambda o=options: check_hook(device, dict(o))))
        checks.append((f"scaler, {name}", lambda o=options: check_scaled(device, dict(o))))
    for name in ("one cluster", "one cluster, in slices"):
        options = HOOKS[name]
        checks.append((f"waits, {name}", lambda o=options: check_hook_waits_for_nothing(device, o)))
    view = {"gradient_as_bucket_view": True, "bucket_cap_mb": 25}
    checks.append(("hook, large buckets", lambda: check_hook(device, {}, **view)))
    checks.append(("FSDP2, GQAdamW", lambda: check_sharded(device, GQAdamW)))
    checks.append(("FSDP2, GQSGD", lambda: check_sharded(device, GQSGD, momentum=0.9)))
    for name, check in checks:
        try:
            check()
        except Exception as error:  # noqa: BLE001  all that fail are named, not the first alone
            failed.append(f"{name}: {type(error).__name__}: {error}")
    assert not failed, "\n".join(failed)


def halves(features: Tensor) -> Tensor:
    """Return the rank that each sample of the whole batch is on."""
    return torch.arange(2).repeat_interleave(len(features) // 2)


def two_ranks_on_one_device(rank: int, device: str) -> None:
    """Over gloo, which takes tensors of a GPU that two ranks share; the judge is one process."""
    both = {"n_clusters": 2, "features": "features", "clusterer": halves}
    for options, single in ({}, {}), ({"n_clusters": 1}, both):
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
