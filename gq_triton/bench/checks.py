"""Compare results on a device with the oracle, `gq_triton.reference`, and with plain float64.

Every check yields a sentence, the error and the bound that it must not exceed.
"""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gq_triton import GQSGD, GQAdamW, GradQueue, reference
from gq_triton.bench.models import GPT, Residual
from gq_triton.engines import engine
from gq_triton.grouping import Groups, KMeans
from gq_triton.options import ClusterOptions

__all__ = ["CHECKS", "Finding", "expected", "largest"]

Finding = tuple[str, float, float]
LENGTH, STEPS, CLUSTERS = 3, 5, 4
LABELS = torch.tensor([0, 2, 2, 0, 3, 2, 2, 0, 2])  # cluster 1 is empty
F64 = torch.float64


class Images(nn.Module):
    """A residual block of convolutions, one of them strided, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = Residual(3, 8, 2), nn.Linear(8, 4)
        # The oracle takes one cluster's samples alone, so statistics of the batch must not enter.
        for name in ("norm1", "norm2"):
            setattr(self.features, name, nn.GroupNorm(2, 8))
        self.features.shortcut[1] = nn.GroupNorm(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean(dim=(2, 3)))


def largest(actual: Tensor, exact: Tensor) -> float:
    """Return the largest error as a part of the largest element."""
    actual, exact = actual.detach().double().cpu(), exact.double().cpu()
    return float((actual - exact).abs().max() / exact.abs().max().clamp(min=1e-300))


def sums(device: torch.device) -> Iterator[Finding]:
    """Check the gradients of weights by cluster, in units of the rounding that is allowed."""
    options = ClusterOptions()
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLUSTERS, (33,), generator=generator)
    groups = Groups.of(labels.to(device), CLUSTERS, options)
    ops = engine(device)
    sides: dict[str, Any] = {"stride": (2, 1), "padding": (1, 1), "dilation": (1, 1)}
    shapes = {"linear": ((33, 70, 200), (33, 70, 136)), "conv": ((33, 40, 5, 9), (33, 72, 9, 9))}
    for dtype in (torch.float32, torch.bfloat16, torch.float16, F64):
        for kind, (left, right) in shapes.items():
            a, b = (torch.randn(s, generator=generator).to(dtype) for s in (left, right))
            wide = torch.promote_types(dtype, torch.float32)
            inner = (200, 136) if kind == "linear" else (40, 72, 3, 3)
            out = torch.full((CLUSTERS, *inner), math.nan, dtype=wide, device=device)
            on = a.to(device), b.to(device), groups.order, groups.offsets, out
            if kind == "linear":
                ops.product_sums(*on)
            else:
                ops.convolution_sums(*on, **sides)
            worst = 0.0
            for k in range(CLUSTERS):
                x, y = a[labels == k].double(), b[labels == k].double()
                exact, size = (
                    _gradient(kind, *pair, sides) for pair in ((x, y), (x.abs(), y.abs()))
                )
                terms = len(x) * math.prod(left[1:2] if kind == "linear" else left[2:])
                bound = torch.finfo(wide).eps * (4 + math.sqrt(terms)) * size + 1e-300
                worst = max(worst, float(((out[k].double().cpu() - exact).abs() / bound).max()))
            yield f"gradient of a {kind} weight by cluster, {str(dtype)[6:]}", worst, 1.0


def _gradient(kind: str, a: Tensor, b: Tensor, sides: dict[str, Any]) -> Tensor:
    if kind == "linear":
        return a.flatten(0, 1).T @ b.flatten(0, 1)
    weight = torch.zeros(40, 72, 3, 3, dtype=F64, requires_grad=True)
    return torch.autograd.grad(nn.functional.conv2d(b, weight, **sides), weight, a)[0]


def clusters(device: torch.device) -> Iterator[Finding]:
    """Check every gradient of some steps with clusters against one pass for each cluster."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(16, (STEPS, 9, 7), generator=generator)
    images = torch.randn(STEPS, 9, 3, 8, 8, generator=generator, dtype=F64)
    cases: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
        "GPT": (lambda: GPT(16, 8, 24, 2, 1), tokens),
        "convolutions": (Images, images),
    }
    for name, (build, batches) in cases.items():
        torch.manual_seed(0)
        model = build().to(F64)
        twin = copy.deepcopy(model)
        model = model.to(device)
        queue = GradQueue(model, n_clusters=CLUSTERS, features="features", queue_length=LENGTH,
                          clusterer=lambda features: LABELS)  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        queue.attach(optimizer)
        rings = {key: reference.Ring(LENGTH) for key, _ in twin.named_parameters()}
        worst = 0.0
        for batch in batches:
            twin.load_state_dict(model.state_dict())
            right = expected(twin, batch, rings, LABELS, CLUSTERS)
            optimizer.zero_grad()
            loss_of(model(batch.to(device))).mean().backward()
            for key, param in model.named_parameters():
                assert param.grad is not None
                worst = max(worst, largest(param.grad, right[key]))
            optimizer.step()
        yield f"weighted gradients of a step with clusters, {name}", worst, 1e-9


def loss_of(output: Tensor) -> Tensor:
    """Return the loss of each sample in these checks."""
    return output.square().flatten(1).mean(dim=1)


def expected(
    model: nn.Module, batch: Tensor, rings: dict[str, reference.Ring], labels: Tensor, count: int
) -> dict[str, Tensor]:
    """Return the weighted gradients that the law gives, and queue the raw ones.

    Args:
        model: in float64.
        batch: its inputs ``(B, ...)``.
        rings: the queue of each parameter.
        labels: ``(B,)``, the cluster of each sample.
        count: number of clusters.
    """
    losses = loss_of(model(batch))
    named = dict(model.named_parameters())
    sizes = torch.bincount(labels, minlength=count).tolist()
    means: dict[str, list[Tensor]] = {key: [] for key in named}
    for k, size in enumerate(sizes):
        grads = [torch.zeros_like(param) for param in named.values()]
        if size:
            part = losses[k == labels].mean()
            grads = torch.autograd.grad(part, list(named.values()), retain_graph=True)
        for key, grad in zip(named, grads, strict=True):
            means[key].append(grad)
    result = {}
    for key, ring in rings.items():
        values = torch.stack(means[key])
        result[key] = reference.cluster_gradient(values, sizes, ring.newest())
        ring.push(torch.tensordot(torch.tensor(sizes).double() / sum(sizes), values, dims=1))
    return result


def optimizers(device: torch.device) -> Iterator[Finding]:
    """Check some steps of both optimizers."""
    generator = torch.Generator().manual_seed(0)
    shapes = (33, 65), (70001,)
    for kind in (GQAdamW, GQSGD):
        starts = [torch.randn(s, generator=generator, dtype=F64) for s in shapes]
        params = [nn.Parameter(start.to(device)) for start in starts]
        settings: dict[str, Any] = {"momentum": 0.9} if kind is GQSGD else {}
        optimizer = kind(params, lr=0.01, queue_length=LENGTH, **settings)
        rings = [reference.Ring(LENGTH) for _ in shapes]
        moments: list[list[Any]] = [[None, None] for _ in shapes]
        for step in range(1, STEPS + 1):
            for index, param in enumerate(params):
                grad = torch.randn(shapes[index], generator=generator, dtype=F64)
                param.grad = grad.to(device)
                weighted = reference.weighted_gradient(grad, rings[index].newest())
                rings[index].push(grad)
                first, second = moments[index]
                if kind is GQSGD:
                    starts[index], moments[index][0] = reference.sgd_update(
                        starts[index], weighted, first, lr=0.01, momentum=0.9
                    )
                    continue
                zeros = torch.zeros_like(grad)
                starts[index], *moments[index] = reference.adamw_update(
                    starts[index], weighted, zeros if first is None else first,
                    zeros if second is None else second, step, lr=0.01,
                )  # fmt: skip
            optimizer.step()
        worst = max(largest(p, s) for p, s in zip(params, starts, strict=True))
        yield f"parameters after {STEPS} steps of {kind.__name__}", worst, 1e-10


def kmeans(device: torch.device) -> Iterator[Finding]:
    """Check that labels are scikit-learn's, from the same start, and those of the CPU."""
    from sklearn.cluster import KMeans as Scikit

    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 12, generator=generator, dtype=F64)
    here, there = (KMeans(7)(x) for x in (features, features.to(device)))
    yield "labels of k-means that differ from the CPU's", float((here != there.cpu()).sum()), 0.0
    # The blobs are far apart, so that the rounding of float32 decides about no label.
    blobs = 20 * torch.randn(7, 12, generator=generator)
    x = blobs[torch.arange(200) % 7] + torch.randn(200, 12, generator=generator)
    ours = KMeans(7, init=x[:7], warm_start=False, tol=0.0)(x.to(device)).cpu()
    same: dict[str, Any] = {"init": x[:7].numpy(), "n_init": 1, "max_iter": 10, "tol": 0.0}
    right = Scikit(7, **same).fit(x.numpy()).labels_
    differ = float((ours != torch.from_numpy(right)).sum())
    yield "labels of k-means that differ from scikit-learn's", differ, 0.0


CHECKS: dict[str, Callable[[torch.device], Iterator[Finding]]] = {
    "sums": sums, "clusters": clusters, "optimizers": optimizers, "kmeans": kmeans,
}  # fmt: skip
