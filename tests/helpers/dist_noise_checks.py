# pyright: reportOptionalMemberAccess=false
"""The checks of the noise meter under DDP that every rank runs; see test_dist_noise.py."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cluster_cases import MLP
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel as DDP

from gq_triton.dist import register
from gq_triton.variance import NoiseScale

F64 = torch.float64


def batch(rank: int, size: int, step: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(size, 6, generator=generator, dtype=F64)


def loss_of(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (module(x) - 0.3).square().mean(dim=1).mean()


def made(**options: Any) -> tuple[nn.Module, DDP, NoiseScale]:
    """Return a twin of the model, the model in DDP, and its meter."""
    torch.manual_seed(0)
    model = MLP().to(F64)
    twin, ddp = copy.deepcopy(model), DDP(model, bucket_cap_mb=1e-4)
    return twin, ddp, NoiseScale(ddp, 1, seed=dist.get_rank(), **options)


def samples(twin: nn.Module, rank: int, size: int, step: int = 0) -> torch.Tensor:
    """Return the gradients of a rank's samples, ``(B, P)``."""
    params = list(twin.parameters())
    rows = [
        torch.autograd.grad(loss_of(twin, row[None]), params) for row in batch(rank, size, step)
    ]  # fmt: skip
    return torch.stack([torch.cat([grad.flatten() for grad in row]) for row in rows])


def same_everywhere(value: float) -> None:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    assert len(set(values)) == 1


def check_ranks_are_groups(rank: int) -> None:
    """Groups of one sample on every rank give the variance of all samples."""
    world = dist.get_world_size()
    twin, ddp, meter = made(clusters=5)
    loss_of(ddp, batch(rank, 5)).backward()
    grads = torch.cat([samples(twin, r, 5) for r in range(world)])
    (row,) = meter.history
    variance = float(grads.var(dim=0).sum())
    assert row["samples"] == 5 * world
    assert row["variance"] == pytest.approx(variance, rel=1e-9)
    signal = float(grads.mean(dim=0).square().sum()) - variance / (5 * world)
    assert row["signal"] == pytest.approx(signal, rel=1e-9)
    same_everywhere(meter.noise_scale)


def check_one_group_per_rank(rank: int) -> None:
    world = dist.get_world_size()
    twin, ddp, meter = made(clusters=1)
    loss_of(ddp, batch(rank, 5)).backward()
    means = torch.stack([samples(twin, r, 5).mean(dim=0) for r in range(world)])
    assert meter.history[0]["variance"] == pytest.approx(5 * float(means.var(dim=0).sum()))


def check_uneven_batches_stay_unbiased(rank: int) -> None:
    """The expectation over all ways to give samples to ranks is not known; the formula's parts are.

    ``sum_r (n_r - 1) S_r + sum_r n_r |g_r|**2 - B |g|**2`` over its degrees of freedom.
    """
    world, sizes = dist.get_world_size(), [4 + 3 * r for r in range(dist.get_world_size())]
    twin, ddp, meter = made(clusters=100)
    loss_of(ddp, batch(rank, sizes[rank])).backward()
    parts = [samples(twin, r, size) for r, size in enumerate(sizes)]
    total = sum(sizes)
    mean = torch.stack([part.mean(dim=0) for part in parts]).mean(dim=0)
    share = sum(1 / size for size in sizes) / world**2
    within = sum(float((part - part.mean(dim=0)).square().sum()) for part in parts)
    apart = sum(len(part) * float(part.mean(dim=0).square().sum()) for part in parts)
    apart -= total * float(mean.square().sum())
    variance = (within + apart) / (total - total * share)
    assert meter.history[0]["variance"] == pytest.approx(variance, rel=1e-9)
    signal = float(mean.square().sum()) - share * variance
    assert meter.history[0]["signal"] == pytest.approx(signal, rel=1e-9)


def check_planted_noise(rank: int) -> None:
    """Every way to know the mean over ranks, and every batch size, has the same expectation."""
    for kind in ("plain", "uneven", "zeroed", "hook", "no_sync"):
        model = nn.Linear(20, 1, bias=False).to(F64)
        ddp = DDP(model)
        if kind == "hook":
            ddp.register_comm_hook(None, fp16_compress_hook)
        meter = NoiseScale(ddp, 1, clusters=3, window=30)
        generator = torch.Generator().manual_seed(rank)
        for _ in range(30):
            ddp.zero_grad(set_to_none=kind != "zeroed")
            size = 6 + (6 * rank if kind == "uneven" else 0)
            z = 1 + 2 * torch.randn(size, 20, generator=generator, dtype=F64)
            if kind == "no_sync":
                with ddp.no_sync():
                    ddp(z).mean().backward()
            else:
                ddp(z).mean().backward()
        report = meter.report()
        assert report.steps == 30
        assert report.total.variance == pytest.approx(80, rel=0.15), kind
        assert report.total.signal == pytest.approx(20, rel=0.3), kind
        same_everywhere(meter.noise_scale)


def check_one_message_and_the_gradients_of_plain_ddp(rank: int) -> None:
    twin, ddp, meter = made(clusters=2)
    other = DDP(twin, bucket_cap_mb=1e-4)
    sent: list[int] = []
    original = dist.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    dist.all_reduce = counted
    try:
        for step in range(3):
            for module in (ddp, other):
                module.zero_grad()
                loss_of(module, batch(rank, 6, step)).backward()
            for a, b in zip(ddp.parameters(), other.parameters(), strict=True):
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-13)
    finally:
        dist.all_reduce = original
    params = len(list(ddp.parameters()))
    assert sent == [2 * params + 5] * 3
    assert meter.report().steps == 3


def check_features_on_every_rank(rank: int) -> None:
    _, ddp, meter = made(clusters=2, features="features")
    for step in range(4):
        ddp.zero_grad()
        loss_of(ddp, batch(rank, 12, step)).backward()
    found = meter.report().total.between_to_within
    assert found.value > 0
    same_everywhere(found.value)


def check_clusters_of_the_hook(rank: int) -> None:
    """The meter listens to the hook's clusters, and the weighted gradients stay as they are."""
    world = dist.get_world_size()
    torch.manual_seed(0)
    model = MLP().to(F64)
    bare = copy.deepcopy(model)
    ddps = [DDP(copy.deepcopy(model), bucket_cap_mb=1e-4) for _ in range(2)]
    labels = torch.tensor([0, 0, 1, 1, 2])
    options = {"n_clusters": 3, "features": "features", "queue_length": 3, "backend": "torch"}
    states = [register(ddp, clusterer=lambda _: labels, **options) for ddp in ddps]
    meter = NoiseScale(ddps[0], 2)
    for step in range(6):
        for ddp in ddps:
            ddp.zero_grad()
            loss_of(ddp, batch(rank, 5, step)).backward()
        for a, b in zip(ddps[0].parameters(), ddps[1].parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)
    assert [row["step"] for row in meter.history] == [2, 4, 6]
    parts = [samples(bare, r, 5, 5) for r in range(world)]
    variance = sum(float(part.var(dim=0).sum()) for part in parts) / world
    assert meter.history[-1]["variance"] == pytest.approx(variance, rel=1e-9)
    assert states[0].cluster_sizes_ == [2, 2, 1]


def check_join_is_refused(rank: int) -> None:
    _, ddp, _ = made()
    with ddp.join(), pytest.raises(RuntimeError, match=r"cannot measure under join"):
        ddp(batch(rank, 6))


CHECKS = [
    check_ranks_are_groups,
    check_one_group_per_rank,
    check_uneven_batches_stay_unbiased,
    check_planted_noise,
    check_one_message_and_the_gradients_of_plain_ddp,
    check_features_on_every_rank,
    check_clusters_of_the_hook,
]
