"""Inputs and tolerances that the tests of the kernels share.

Every tensor lies inside a larger buffer of NaN: a kernel that reads beyond a tensor gets a NaN into
its result, one that writes there is found by `Guarded.check`.
"""

import math
import os
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from gq_triton import reference

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
# An interpreted kernel takes tensors of the CPU, a compiled one those of CUDA.
DEVICE = "cpu" if INTERPRETED else "cuda"
ON_DEVICE = [] if INTERPRETED else [pytest.mark.gpu]
DEVICES = [pytest.param(DEVICE, marks=ON_DEVICE)]
QUIET = [
    # z of a constant queue is meant to overflow; numpy, which interprets, says so.
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]
# Elements before and after each view: a multiple of 16 bytes in every type.
MARGIN = 16


@dataclass
class Guarded:
    """A maker of tensors inside buffers of NaN, which checks the NaN afterwards.

    Attributes:
        device: where the buffers are.
        shift: elements from a 16-byte boundary to each tensor; 0 gives the aligned specialisation.
        seed: the seed of the values.
    """

    device: str
    shift: int = 0
    seed: int = 0
    buffers: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self):
        self.generator = torch.Generator().manual_seed(self.seed)

    def view(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``values`` ``(*, P)`` in ``dtype`` as a view with NaN around each row."""
        width = -(-values.shape[-1] // MARGIN) * MARGIN + 2 * MARGIN
        buffer = torch.full((*values.shape[:-1], width), math.nan, dtype=dtype, device=self.device)
        start = MARGIN + self.shift
        view = buffer[..., start : start + values.shape[-1]]
        view.copy_(values)
        inside = torch.zeros(buffer.shape, dtype=torch.bool, device=self.device)
        inside[..., start : start + values.shape[-1]] = True
        self.buffers.append((buffer, inside))
        return view

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        """Return normal numbers."""
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale
        return self.view(values, dtype)

    def lists(self, sizes, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Return one tensor of each size."""
        return [self.normal(n, dtype=dtype) for n in sizes]

    def rings(self, sizes, slots: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Return one ring buffer ``(slots, P)`` per size."""
        return [self.normal(slots, n, dtype=dtype) for n in sizes]

    def counters(self, sizes, value: int) -> list[Tensor]:
        """Return one queue counter per size."""
        return [torch.tensor(value, device=self.device) for _ in sizes]

    def check(self) -> None:
        """Fail if anything outside the tensors was written."""
        for buffer, inside in self.buffers:
            assert bool(buffer.isnan()[~inside].all()), "a kernel wrote outside its tensors"


def newest_first(queue: Tensor, queued: int, used: int | None = None) -> Tensor:
    """Return the newest ``used`` rows of a ring buffer that received ``queued`` gradients."""
    slots = queue.shape[0]
    rows = [(queued - 1 - age) % slots for age in range(used or slots)]
    return queue[rows]


def oracle_weights(
    grad: Tensor, queue: Tensor, queued: int, rho: float, used: int | None = None
) -> Tensor:
    """Return the weights in float64 on the CPU, before the kernel ran."""
    if queued < queue.shape[0]:
        return torch.ones(grad.shape, dtype=torch.float64)
    rows = newest_first(queue, queued, used).cpu()
    return reference.scarcity_weight(grad.cpu(), rows, rho=rho)


def truncated(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``x`` rounded to ``dtype`` as the lane under test rounds it."""
    if dtype == torch.bfloat16 and INTERPRETED:
        return (x.float().view(torch.int32) & -65536).view(torch.float32)
    return x.to(dtype)


def ulp(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the distance between neighbouring numbers of ``dtype`` at ``exact`` (float64)."""
    info = torch.finfo(dtype)
    return torch.exp2(exact.abs().clamp(min=info.tiny).log2().floor()) * info.eps


def assert_weights(actual: Tensor, exact: Tensor, *, rho: float, slots: int, dtype=torch.float32):
    """Check weights to ``8 + 4 rho sqrt(L)`` ulps of the compute type and return the worst."""
    error = (actual.double().cpu() - exact).abs() / ulp(exact, dtype)
    worst = float(error.max()) if error.numel() else 0.0
    assert worst <= 8 + 4 * rho * math.sqrt(slots), f"weights are {worst} ulps from the oracle"
    return worst


def assert_stored(actual: Tensor, exact: Tensor, *, scale: Tensor | float = 1.0, units: float = 64):
    """Check one rounding at the store, after ``units`` roundings of size ``scale`` before it.

    The interpreter truncates to bfloat16 instead of rounding: there, and in no other case, the
    store may be a whole ulp off instead of half.
    """
    dtype = actual.dtype
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    store = 1.0 if dtype == torch.bfloat16 and INTERPRETED else 0.5
    before = units * torch.finfo(compute).eps * (exact.abs() + scale)
    bound = before + (store * ulp(exact, dtype) if dtype != compute else 0.0)
    error = (actual.double().cpu() - exact).abs()
    assert bool((error <= bound).all()), f"off by {float((error / bound).max())} times the bound"


@dataclass
class Clusters:
    """K clusters of known sizes as the kernels take them, and what the oracle says about them.

    Attributes:
        device: the device of the kernels' tensors.
        sizes: samples in each cluster.
        population_power: as in `reference.cluster_gradient`.
        centroid_scale: as in `reference.cluster_gradient`.
    """

    device: str
    sizes: list[int]
    population_power: float = 1.0
    centroid_scale: str = "paper"

    def vectors(self) -> dict[str, Tensor]:
        """Return ``inverse_shares``, ``mixture`` and ``sigma_scales``, each ``(K,)`` float64."""
        sizes = torch.tensor(self.sizes, dtype=torch.float64)
        occupied, batch = sizes > 0, float(sizes.sum())
        inverse = torch.where(occupied, batch / sizes, 0.0)
        power = torch.where(occupied, sizes**self.population_power, 0.0)
        scales = torch.ones_like(sizes)
        if self.centroid_scale == "standard_error":
            scales = torch.where(occupied, (batch / sizes).sqrt(), 1.0)
        named = {"inverse_shares": inverse, "mixture": power / power.sum(), "sigma_scales": scales}
        return {name: vector.to(self.device) for name, vector in named.items()}

    def weights(self, centroids: Tensor, rows: Tensor | None, rho: float) -> Tensor:
        """Return the oracle's weights ``(K, *)``; ``rows=None`` stands for weights of 1."""
        if rows is None:
            return torch.ones(centroids.shape, dtype=torch.float64)
        scales = self.vectors()["sigma_scales"].tolist()
        pairs = zip(centroids, scales, strict=True)
        return torch.stack(
            [reference.scarcity_weight(c, rows, rho=rho, sigma_scale=s) for c, s in pairs]
        )

    def gradient(self, centroids: Tensor, rows: Tensor | None, rho: float) -> Tensor:
        """Return the oracle's gradient ``(*)`` in float64."""
        options = {"population_power": self.population_power, "centroid_scale": self.centroid_scale}
        return reference.cluster_gradient(centroids, self.sizes, rows, rho=rho, **options)

    def mix(self, parts: Tensor) -> Tensor:
        """Return ``sum_k p_k parts_k`` of ``(K, *)`` in float64."""
        return torch.tensordot(self.vectors()["mixture"].cpu(), parts.double(), dims=1)
