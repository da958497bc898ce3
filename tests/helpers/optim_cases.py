"""The table of optimizers that every common rule is tested on, and how to drive them."""

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from gq_triton import GQSGD, GQAdamW, reference

BACKENDS = ("torch", "numba")


@dataclass(frozen=True)
class Variant:
    """One optimizer with options, and the optimizer of torch that it extends."""

    ours: Any
    torchs: Any
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, params, **changes):
        return self.ours(params, **{**self.options, **changes})

    def plain(self, params, **changes):
        return self.torchs(params, **{**self.options, **changes})


def sgd(**options):
    return Variant(GQSGD, torch.optim.SGD, {"lr": 0.1, **options})


def adamw(**options):
    return Variant(GQAdamW, torch.optim.AdamW, {"lr": 0.01, **options})


VARIANTS = {
    "sgd": sgd(),
    "sgd-momentum": sgd(momentum=0.9),
    "sgd-nesterov": sgd(momentum=0.9, nesterov=True, weight_decay=0.01),
    "sgd-dampening": sgd(momentum=0.8, dampening=0.3, weight_decay=0.1, maximize=True),
    "adamw": adamw(),
    "adamw-all": adamw(betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, maximize=True),
    "adamw-no-decay": adamw(weight_decay=0.0),
}
# Where one of each is enough.
PAIR = {"sgd": VARIANTS["sgd-momentum"], "adamw": VARIANTS["adamw"]}

all_variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
both_optimizers = pytest.mark.parametrize("variant", PAIR.values(), ids=PAIR)
all_backends = pytest.mark.parametrize("backend", BACKENDS)


def parameters(dtype=torch.float32, seed=0):
    """Return leaves of every shape and memory order."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    tensors = [
        randn(),
        randn(0, 3),
        randn(300),
        randn(17, 9),
        randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        randn(5, 7).T,
        randn(6, 8)[:, ::2],
        randn(9, 4, 6)[::2, :, 1::2].permute(2, 0, 1),
        randn(4, 1, 6, 1).permute(2, 1, 3, 0),
    ]
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    assert not leaves[6].is_contiguous()
    assert leaves[4].is_contiguous(memory_format=torch.channels_last)
    return leaves


def small_parameters(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (40,), (3, 5)
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for s in shapes
    ]


def copies(params):
    """Return new leaves with the same values in the same memory order."""
    twins = []
    for param in params:
        twin = torch.empty_strided(param.shape, param.stride(), dtype=param.dtype)
        twins.append(twin.copy_(param.detach()).requires_grad_())
    return twins


def set_gradients(params, step, scale=1.0, mixed=True):
    """Set and return gradients that depend on the step and the position only.

    Every other gradient lies in memory as its parameter does, the rest in row-major order; all of
    them as their parameters with ``mixed=False``.
    """
    for index, param in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * step + index)
        gradient = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        gradient = (gradient * scale).to(param.dtype)
        moved = index % 2 or not mixed
        param.grad = torch.empty_like(param).copy_(gradient) if moved else gradient
    return gradients_of(params)


def gradients_of(params) -> list[torch.Tensor]:
    return [param.grad for param in params]


def train(optimizer, params, steps, start=0, **options):
    for step in range(start, start + steps):
        set_gradients(params, step, **options)
        optimizer.step()


def train_on_losses(optimizer, params, steps):
    """Take steps with a loss that falls by one each time."""
    for step in steps:
        optimizer.record_loss(50.0 - step)
        train(optimizer, params, 1, start=step)


def save(params, optimizer, path):
    torch.save({"params": values(params), "optimizer": optimizer.state_dict()}, path)


def resume(folder):
    """Continue in a new process the runs that test_optim_state.py saved."""
    for name, variant in PAIR.items():
        saved = torch.load(f"{folder}/{name}.pt", weights_only=True)
        params = parameters(seed=1)
        with torch.no_grad():
            for param, value in zip(params, saved["params"], strict=True):
                param.copy_(value)
        optimizer = variant.build(params)
        optimizer.load_state_dict(saved["optimizer"])
        train_on_losses(optimizer, params, range(6, 9))
        save(params, optimizer, f"{folder}/{name}-there.pt")


def values(params):
    return [param.detach().clone() for param in params]


def snapshot(optimizer):
    """Return copies of parameters, state and losses, to be compared with a later snapshot."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        index: {key: value.clone() for key, value in optimizer.state[p].items()}
        for index, p in enumerate(params)
        if p in optimizer.state
    }
    losses = [copy.deepcopy(group.get("losses")) for group in optimizer.param_groups]
    return values(params), state, losses


def assert_same(left, right):
    """Assert equality bit for bit, through lists, dicts and tensors."""
    torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)


class Oracle:
    """One parameter in float64, stepped by ``reference``."""

    def __init__(self, param, variant, *, length, rho, queue_dtype=None, match_norm=False):
        self.param = param.detach().clone().double()
        self.variant, self.rho = variant, rho
        self.queue_dtype, self.match_norm = queue_dtype or param.dtype, match_norm
        self.ring = reference.Ring(length)
        self.momentum = None
        self.exp_avg = self.exp_avg_sq = torch.zeros_like(self.param)
        self.steps, self.scale = 0, self.param

    def step(self, grad, length=None):
        queue = self.ring.newest(length)
        weighted = reference.weighted_gradient(
            grad, queue, rho=self.rho, match_norm=self.match_norm, queue_dtype=self.queue_dtype
        )
        self.ring.push(grad, self.queue_dtype)
        self.steps += 1
        options = self.variant.options
        if self.variant.ours is GQSGD:
            self.param, self.momentum = reference.sgd_update(
                self.param, weighted, self.momentum, **options
            )
        else:
            self.param, self.exp_avg, self.exp_avg_sq = reference.adamw_update(
                self.param, weighted, self.exp_avg, self.exp_avg_sq, self.steps, **options
            )
        return weighted
