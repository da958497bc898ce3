# pyright: reportOptionalMemberAccess=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false
"""The checks of the noise meter on FSDP2 and HSDP; see test_dist_noise.py."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dist_noise_checks import same_everywhere
from sharded_cluster_cases import Images, Words
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from gq_triton.variance import NoiseScale

F64 = torch.float64


def divided(kind: Any, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Return a model, and a copy that is divided."""
    torch.manual_seed(0)
    whole = kind().to(F64)
    sharded = copy.deepcopy(whole)
    names = ("copy", "shard")[-len(shape) :]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for unit in sharded.units():
        fully_shard(unit, mesh=mesh)
    return whole, sharded


def batch(kind: Any, rank: int, size: int, step: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    if kind is Words:
        return torch.randint(11, (size, 5), generator=generator)
    return torch.randn(size, 6, generator=generator, dtype=F64)


def loss_of(model: Any, x: torch.Tensor) -> torch.Tensor:
    out = model(x)
    return F.mse_loss(out, torch.ones_like(out))


def check_ranks_are_groups(rank: int, shape: tuple[int, ...], kind: Any) -> None:
    """Groups of one sample on every rank give the variance of all samples; gradients stay."""
    world = dist.get_world_size()
    whole, sharded = divided(kind, shape)
    meter = NoiseScale(sharded, 2, clusters=6)
    params = [p for p in whole.parameters() if p.requires_grad]
    for step in range(4):
        sharded.zero_grad()
        loss_of(sharded, batch(kind, rank, 6, step)).backward()
        rows = torch.cat([batch(kind, r, 6, step) for r in range(world)])
        grads = [torch.autograd.grad(loss_of(whole, row[None]), params) for row in rows]
        flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in grads])
        mean = torch.cat([
            p.grad.full_tensor().flatten() if isinstance(p.grad, DTensor) else p.grad.flatten()
            for p in sharded.parameters()
        ])  # fmt: skip
        torch.testing.assert_close(mean, flat.mean(dim=0), rtol=1e-9, atol=1e-12)
        if step % 2 == 0:
            continue
        row = meter.history[-1]
        variance = float(flat.var(dim=0).sum())
        assert row["samples"] == 6 * world
        assert row["variance"] == pytest.approx(variance, rel=1e-8)
        signal = float(flat.mean(dim=0).square().sum()) - variance / (6 * world)
        assert row["signal"] == pytest.approx(signal, rel=1e-8)
    assert len(meter.history) == 2
    assert meter.report().unmeasured == []
    same_everywhere(meter.noise_scale)


def check_accumulation_without_a_reduction(rank: int) -> None:
    _, sharded = divided(Images, (dist.get_world_size(),))
    meter = NoiseScale(sharded, 1, clusters=3)
    for step in range(6):
        sharded.set_requires_gradient_sync(step % 3 == 2)
        loss_of(sharded, batch(Images, rank, 9, step)).backward()
        if step % 3 == 2:
            sharded.zero_grad()
    assert meter.report().steps == 6
    same_everywhere(meter.noise_scale)


def check_refusals(rank: int) -> None:
    _, sharded = divided(Images, (dist.get_world_size(),))
    optimizer = torch.optim.SGD(sharded.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match="no lag share of a model that fully_shard has divided"):
        NoiseScale(sharded, optimizer=optimizer)
    part = Images().to(F64)
    fully_shard(part.mix)
    with pytest.raises(ValueError, match=r"fully_shard alone has divided, on one mesh: .* is not"):
        NoiseScale(part)
