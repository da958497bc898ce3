# Gradients exist after a backward pass, although their types allow None.
# pyright: reportOptionalMemberAccess=false
"""One model with every kind of layer, and the loop that trains it on two devices.

Every function takes the device, and none needs a GPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from optim_cases import assert_same, parameters, set_gradients
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gq_triton import GradQueue

F64 = torch.float64
LENGTH = 3
LR = 0.002  # small enough for the loss to fall: where it grows, rounding errors grow too
# Clusters 1 and 3 are empty.
LABELS = torch.tensor([0, 2, 2, 0, 4, 0, 0, 2, 2, 4])
TINY = 0.0001  # MiB: every layer becomes a bucket of its own
# Both sides are float64. One ulp in every parameter, as from sums of another order, grows to 1e-13
# in these runs.
EXACT = 1e-10
WIDTH = 300  # the weight `mix` has more elements than one program of the clustered law takes


class Everything(nn.Module):
    """Every kind of layer that one backward pass clusters; one bias has a single element."""

    def __init__(self, tables: bool = True, recomputes: bool = False) -> None:
        super().__init__()
        self.recomputes = recomputes
        # No bias here: before a BatchNorm its gradient is 0, and computed values are mere rounding.
        self.conv, self.batch_norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.group_norm = nn.Conv2d(4, 6, 3), nn.GroupNorm(2, 6)
        self.tokens = nn.Embedding(11, 6) if tables else None
        self.mix, self.features = nn.Linear(6, WIDTH), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 1)
        # Called with the gradient of an early activation, when the backward pass is almost done.
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
    """Return images and tokens of ten samples; with ``apart`` they lie around four far points."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(len(LABELS), 3, 8, 8, generator=generator, dtype=F64)
    tokens = torch.randint(0, 11, (len(LABELS), 5), generator=generator)
    if apart:
        tokens = (torch.arange(len(LABELS))[:, None] % 4).expand(-1, 5)
    return images.to(dtype).to(device), tokens.to(device)


def loss_of(module: Any, inputs: tuple[Tensor, ...]) -> Tensor:
    return (module(*inputs) - 1).square().mean()


def fixed(features: Tensor) -> Tensor:
    """Return the same labels on every device and in every step."""
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
        # The kernel returns its sums in float32, with an error of 2**-24 each.
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
        # The source of the gradients: both devices get numbers that both types can hold.
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


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raise an error where the host waits for the device."""
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
