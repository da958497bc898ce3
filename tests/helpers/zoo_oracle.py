"""The oracle of the zoo: plain backward passes, one per cluster, and the law in plain torch."""

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from zoo import TINY, Case, Size, batch_of, losses_of, prepared

from gq_triton import GradQueue, reference

QUEUE_LENGTH = 3
# Gradients of a parameter below this part of the whole gradient's norm are rounding, such as that
# of a key's bias, which attention cancels.
FLOOR = 1e-6
NATIVE, EXPANDED, FALLBACK, WHOLE = "native", "expanded", "fallback", "one cluster"
TIERS = (NATIVE, EXPANDED, FALLBACK, WHOLE)


class Double(TorchFunctionMode):
    """Makes models compute in float64 where their code asks for float32, as many norms do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {n: torch.float64 if v is torch.float32 else v for n, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


def backward(loss: Tensor) -> None:
    """Run ``loss.backward()``; torch's own would leave ``Double`` before it begins."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True,
        accumulate_grad=True,
    )  # fmt: skip


@dataclass
class Verdict:
    """How the gradients of one case compare with the oracle's.

    Attributes:
        errors: by parameter name, the largest error of a step, relative to the gradient's norm.
        tiers: by parameter name, one of ``TIERS``.
        elements: by parameter name, its number of elements.
        changed: the names of buffers that plain training leaves with other values.
        warned: the warnings of the run.
    """

    errors: dict[str, float] = field(default_factory=dict)
    tiers: dict[str, str] = field(default_factory=dict)
    elements: dict[str, int] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)

    @property
    def worst(self) -> tuple[str, float]:
        """The parameter with the largest error, and the error."""
        return max(self.errors.items(), key=lambda item: item[1])

    def shares(self) -> dict[str, float]:
        """Return, by tier, the share of the model's trainable elements."""
        total = sum(self.elements.values())
        shares: dict[str, float] = dict.fromkeys(TIERS, 0.0)
        for name, tier in self.tiers.items():
            shares[tier] += self.elements[name] / total
        return shares

    def problems(self, tolerance: float = 1e-8) -> list[str]:
        """Return a line for each parameter that is further from the oracle than ``tolerance``.

        A buffer that differs from the oracle's has a line too.
        """
        lines = [f"{name} differs" for name in self.changed]
        return lines + [f"{name} ({self.tiers[name]}): relative error {error:.1e}"
                for name, error in self.errors.items() if not error <= tolerance]  # fmt: skip


def tier_of(how: str) -> str:
    """Return the tier that an entry of ``GradQueue.report()`` stands for."""
    if not how.startswith("clusters"):
        return WHOLE
    if "expanded" in how:
        return EXPANDED
    return FALLBACK if "run again" in how else NATIVE


def feature_layer(case: Case, model: nn.Module, batch: Mapping[str, Tensor]) -> str:
    """Return the first submodule that gives one row or more for each sample, with a gradient."""
    samples, found = len(next(iter(batch.values()))), []

    def see(name: str, output: Any) -> None:
        fits = isinstance(output, Tensor) and output.dim() > 1 and len(output) == samples
        if fits and output.requires_grad:
            found.append(name)

    handles = [
        module.register_forward_hook(lambda _, args, output, name=name: see(name, output))
        for name, module in model.named_modules()
        if name and not list(module.children())
    ]
    losses_of(case, model, batch)
    for handle in handles:
        handle.remove()
    return found[0]


def cluster_means(
    model: nn.Module, losses: Tensor, labels: Tensor, clusters: int
) -> dict[str, Tensor]:
    """Return each cluster's mean gradient ``(K, *shape)`` of the parameters that have one."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    means: dict[str, list[Tensor | None]] = {name: [] for name, _ in named}
    for k in range(clusters):
        part = losses[labels == k].mean()
        grads = torch.autograd.grad(
            part, [p for _, p in named], retain_graph=True, allow_unused=True
        )
        for (name, _), grad in zip(named, grads, strict=True):
            means[name].append(grad)
    used = {name: [g for g in found if g is not None] for name, found in means.items()}
    return {name: torch.stack(found) for name, found in used.items() if found}


def judge(
    case: Case, samples: int = 4, *, clusters: int = 3, size: Size = TINY, steps: int = 4,
    mode: str = "one_backward", **options: Any,
) -> Verdict:  # fmt: skip
    """Compare every gradient of a case with the oracle's in float64, for several steps.

    The queue is full after three of the steps. Sample i is in cluster i modulo K, so that rows of
    one cluster do not lie together. The weights do not change; every step has a batch of its own.

    Args:
        case: the architecture.
        samples: B.
        clusters: K.
        size: how large the model is.
        steps: how many are compared.
        mode: that of ``GradQueue``.
        **options: further options of ``GradQueue``.
    """
    model = prepared(case, size, torch.float64)
    batches = [batch_of(case, size, samples, torch.float64, 100 + n) for n in range(steps)]
    layer = case.features or feature_layer(case, copy.deepcopy(model), batches[0])
    twin = copy.deepcopy(model)
    clusters = min(clusters, samples)
    labels = torch.arange(samples) % clusters
    sizes = [int((labels == k).sum()) for k in range(clusters)]
    rings: dict[str, reference.Ring] = {}
    verdict = Verdict()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with warnings.catch_warnings(record=True) as caught, Double():
        warnings.simplefilter("always")
        queue = GradQueue(
            model, n_clusters=clusters, features=layer, clusterer=lambda features: labels,
            queue_length=QUEUE_LENGTH, mode=mode, **options,
        )  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        handle = queue.attach(optimizer)
        for batch in batches:
            means = cluster_means(twin, losses_of(case, twin, batch), labels, clusters)
            optimizer.zero_grad()
            losses = losses_of(case, model, batch)
            if mode == "microbatch":
                queue.backward(losses)
            else:
                backward(losses.mean())
            optimizer.step()  # it weights what the backward pass left raw, and moves nothing
            verdict.tiers = {name: tier_of(how) for name, how in queue.report().items()}
            _compare(verdict, named, means, sizes, rings)
        handle.remove()
    buffers = dict(twin.named_buffers())
    verdict.changed = [
        name
        for name, buffer in model.named_buffers()
        if not torch.allclose(buffer.double(), buffers[name].double(), equal_nan=True)
    ]
    verdict.elements = {name: p.numel() for name, p in named.items()}
    verdict.tiers = {name: tier for name, tier in verdict.tiers.items() if name in named}
    verdict.warned = [str(w.message) for w in caught if "gq" in w.filename or "cluster" in
                      str(w.message)]  # fmt: skip
    return verdict


def _compare(
    verdict: Verdict,
    named: Mapping[str, Tensor],
    means: Mapping[str, Tensor],
    sizes: list[int],
    rings: dict[str, reference.Ring],
) -> None:
    """Compare the gradients of one step, and queue the oracle's raw ones."""
    shares = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
    raw = {name: torch.tensordot(shares, values, dims=1) for name, values in means.items()}
    scale = torch.stack([grad.norm() for grad in raw.values()]).norm()
    for name, param in named.items():
        if name not in means:
            verdict.errors.setdefault(name, 0.0)
            if param.grad is not None and float(param.grad.abs().max()) > 0:
                verdict.errors[name] = float("inf")
            continue
        ring = rings.setdefault(name, reference.Ring(QUEUE_LENGTH))
        values, counts = means[name], sizes
        if verdict.tiers[name] == WHOLE:
            values, counts = raw[name][None], [sum(sizes)]
        expected = reference.cluster_gradient(values, counts, ring.newest())
        ring.push(raw[name])
        grad = torch.zeros_like(expected) if param.grad is None else param.grad
        error = (grad - expected).norm() / torch.maximum(expected.norm(), FLOOR * scale)
        verdict.errors[name] = max(verdict.errors.get(name, 0.0), float(error))
