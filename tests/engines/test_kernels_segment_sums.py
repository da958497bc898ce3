"""Sums by cluster: `position_sums` and `channel_sums` against the float64 oracle."""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICES, QUIET, Guarded
from torch import Tensor

from gq_triton import kernels
from gq_triton.engines import compiled, eager
from gq_triton.kernels import channel_sums, position_sums
from gq_triton.kernels.sums import MOST_COLUMNS, ROWS, TILE
from gq_triton.kernels.tickets import take_tickets

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OCCUPATIONS = [[5], [1, 7], [40, 0, 3], [0, 0, 1, 0], [3, 1, 4, 1, 5, 9, 0, 2, 6], [70, 130]]
# Positions and columns.
SHAPES = [
    (1, 1),
    (1, MOST_COLUMNS),
    (3, MOST_COLUMNS + 1),
    (7, 65),
    (ROWS + 1, 5),
    (49, 20),
]
# Parts that are added up at a time.
AT_ONCE = TILE // MOST_COLUMNS
LAYOUTS = ["positions", "channels"]
pytestmark = [
    pytest.mark.parametrize("device", DEVICES),
    *QUIET,
]


def grouping(device, sizes, seed=0):
    """Return labels ``(B,)`` in random order, the samples by cluster, the clusters' ends."""
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    ends = torch.tensor([0, *sizes]).cumsum(0)
    return labels, labels.argsort(stable=True).to(device), ends.to(device)


@dataclass
class Layer:
    """The gradients of one layer; for a norm also its inputs and their statistics.

    Attributes:
        layout: "positions", ``(B, T, N)``, or "channels", ``(B, N, T)``.
        labels: cluster of every sample.
        order: samples by cluster.
        offsets: ends of the clusters.
        dy: gradients.
        norm: x, mean and rstd, or nothing.
    """

    layout: str
    labels: Tensor
    order: Tensor
    offsets: Tensor
    dy: Tensor
    norm: dict[str, Tensor]

    @staticmethod
    def of(guarded, layout, sizes, shape, *, dtype=torch.float32, x_dtype=None, stats=None):
        """Return a layer; ``stats`` is the shape of mean and rstd: by default (B, T) or (B, 1)."""
        labels, order, offsets = grouping(guarded.device, sizes)
        size = (len(labels), *(shape if layout == "positions" else reversed(shape)))
        stats = stats or (size[:2] if layout == "positions" else (size[0], 1))

        def tensor(size, kind):
            return guarded.normal(math.prod(size), dtype=kind).view(size)

        wide = torch.promote_types(dtype, torch.float32)
        norm = {"x": tensor(size, x_dtype or dtype), "mean": tensor(stats, wide)}
        norm["rstd"] = tensor(stats, wide)
        return Layer(layout, labels, order, offsets, tensor(size, dtype), norm)

    def run(self):
        """Return the sums of the kernel."""
        function = position_sums if self.layout == "positions" else channel_sums
        return function(self.dy, self.order, self.offsets, **self.norm)

    def terms(self):
        """Return the terms of the sums in float64, ``(B, T, N)`` for the shift and the scale."""
        wide = {name: t.double().cpu() for name, t in (self.norm | {"dy": self.dy}).items()}
        dy = wide["dy"]
        if "x" not in wide:
            both = [dy]
        else:
            spread = {n: self._spread(t, dy) for n, t in wide.items() if n in ("mean", "rstd")}
            both = [dy, dy * ((wide["x"] - spread.get("mean", 0)) * spread["rstd"])]
        return both if self.layout == "positions" else [t.transpose(1, 2) for t in both]

    def _spread(self, statistic, like):
        if self.layout == "positions":
            return statistic[:, :, None]
        return statistic.repeat_interleave(like.shape[1] // statistic.shape[1], dim=1)[:, :, None]

    def check(self, actual, *, bits=None):
        """Check the sums, neither of which may hold a NaN.

        A sum of n terms may be off by ``4 + sqrt(n)`` eps of the sum of their sizes:
        a term has three roundings, the rest is the sum's.
        """
        clusters = len(self.offsets) - 1
        members = F.one_hot(self.labels, clusters).double()
        kind = torch.float64 if torch.float64 in (self.dy.dtype, bits) else torch.float32
        assert (actual[1] is None) == ("x" not in self.norm)
        for found, terms in zip(actual, self.terms(), strict=False):
            assert found.dtype == kind
            exact = einsum(members, terms, "b k, b t n -> k n")
            size = einsum(members, terms.abs(), "b k, b t n -> k n")
            count = members.sum(dim=0)[:, None] * terms.shape[1]
            bound = torch.finfo(kind).eps * (4 + count.sqrt()) * size + 1e-300
            ratio = (found.double().cpu() - exact).abs() / bound
            worst = float(ratio.max()) if ratio.numel() else 0.0
            assert worst <= 1, f"sums are off by {worst} times the bound"


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", OCCUPATIONS)
def test_clusters_of_all_sizes(device, sizes, dtype, layout):
    guarded = Guarded(device, shift=1)
    layer = Layer.of(guarded, layout, sizes, (3, 20), dtype=dtype)
    layer.check(layer.run())
    guarded.check()


@pytest.mark.rare
@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_all_kinds(device, shape, dtype, layout):
    guarded = Guarded(device)
    layer = Layer.of(guarded, layout, [2, 0, 5], shape, dtype=dtype)
    layer.check(layer.run())
    guarded.check()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "sizes", "shape"),
    [
        ("positions", [2 * ROWS * AT_ONCE + 7, 1], (1, 130)),
        ("positions", [10, 2], (500, 128)),
        ("channels", [2 * AT_ONCE + 7, 1], (ROWS + 2, 3)),
        *[(layout, [1, 0, 2] * 12, (2, 5)) for layout in LAYOUTS],
    ],
)
def test_many_parts_and_clusters(device, layout, sizes, shape):
    """A cluster has more parts than are added up at once; clusters are more than 16."""
    layer = Layer.of(Guarded(device), layout, sizes, shape)
    layer.check(layer.run())


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_launch_leaves_its_tickets_as_it_found_them(device, layout):
    for sizes, shape in (([3, 0, 300], (2, 3)), ([1, 7], (1, 130))):
        layer = Layer.of(Guarded(device), layout, sizes, shape)
        layer.check(layer.run())
        assert not take_tickets(torch.zeros(1, device=device).device, 1).any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tiles_of_one_column(device, layout):
    layer = Layer.of(Guarded(device), layout, [3, 4], (TILE, 1))
    layer.check(layer.run())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_inputs_and_without_mean(device, layout):
    layer = Layer.of(Guarded(device), layout, [3, 0, 9], (6, 33))
    full = layer.run()
    norm, layer.norm = layer.norm, {}
    shifts, none = layer.run()
    layer.check((shifts, none))
    assert torch.equal(shifts, full[0])
    if layout == "positions":
        layer.norm = {"x": norm["x"], "rstd": norm["rstd"]}
        layer.check(layer.run())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_types_are_independent(device, dtype, x_dtype, layout):
    layer = Layer.of(Guarded(device), layout, [3, 0, 9], (6, 33), dtype=dtype, x_dtype=x_dtype)
    layer.check(layer.run(), bits=x_dtype)


@pytest.mark.parametrize("groups", [1, 3, 12])
@pytest.mark.parametrize("each", [True, False])
def test_groups_of_channels(device, groups, each):
    """Statistics belong to each sample (GroupNorm), or to all samples together (BatchNorm)."""
    stats = (12 if each else 1, groups)
    layer = Layer.of(Guarded(device), "channels", [3, 0, 9], (10, 12), stats=stats)
    layer.check(layer.run())


@pytest.mark.slow
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    layout=st.sampled_from(LAYOUTS),
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=9).filter(any),
    shape=st.tuples(st.integers(1, 70), st.integers(1, 140)),
    seed=st.integers(0, 99),
)
def test_any_call(device, layout, sizes, shape, seed):
    layer = Layer.of(Guarded(device, seed=seed), layout, sizes, shape)
    layer.check(layer.run())


@pytest.mark.parametrize("ops", [kernels, compiled, eager], ids=lambda ops: ops.__name__)
@pytest.mark.parametrize("norm", ["layer", "rms", "group", "batch"])
def test_gradients_of_scale_and_shift(device, ops, norm):
    """The reference is torch's backward pass in float64, per cluster, over its samples alone."""
    labels, order, offsets = grouping("cpu", [4, 0, 7, 1])
    x, dy = (torch.randn(12, 8, 5, dtype=torch.float64) for _ in range(2))
    scale, shift = (torch.randn(8 if norm in ("group", "batch") else 5).double() for _ in range(2))
    scale.requires_grad_()
    shift.requires_grad_()
    statistics = {"x": x}
    if norm == "layer":
        out, mean, rstd = torch.native_layer_norm(x, (5,), scale, shift, 1e-5)
        statistics |= {"mean": mean[..., 0], "rstd": rstd[..., 0]}
    elif norm == "rms":
        out = F.rms_norm(x, (5,), scale, 1e-5) + shift
        statistics["rstd"] = (x.square().mean(dim=2) + 1e-5).rsqrt()
    elif norm == "group":
        out, mean, rstd = torch.native_group_norm(x, scale, shift, 12, 8, 5, 4, 1e-5)
        statistics |= {"mean": mean, "rstd": rstd}
    else:
        out, mean, rstd = torch.native_batch_norm(x, scale, shift, None, None, True, 0.0, 1e-5)
        statistics |= {"mean": mean[None], "rstd": rstd[None]}
    device = "cpu" if ops is compiled else device
    function = ops.channel_sums if norm in ("group", "batch") else ops.position_sums
    statistics = {name: t.detach().to(device) for name, t in statistics.items()}
    both = function(dy.to(device), order.to(device), offsets.to(device), **statistics)
    for k in range(4):
        masked = dy * rearrange(labels == k, "b -> b 1 1")
        expected = torch.autograd.grad(out, (shift, scale), masked, retain_graph=True)
        for mine, theirs in zip(both, expected, strict=True):
            assert mine is not None
            torch.testing.assert_close(mine[k].cpu(), theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_repeats_agree_and_layout_in_memory_does_not_matter(device, layout):
    layer = Layer.of(Guarded(device), layout, [30, 0, 12], (9, 40))
    first, second = layer.run(), layer.run()
    layer.dy = layer.dy.transpose(1, 2).contiguous().transpose(1, 2)
    for other in (second, layer.run()):
        for a, b in zip(first, other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_nothing_to_add(device, layout, shape):
    layer = Layer.of(Guarded(device), layout, [2, 1], shape)
    zeros = torch.zeros(2, shape[1], device=device)
    for part in layer.run():
        torch.testing.assert_close(part, zeros, rtol=0, atol=0)


def test_wrong_inputs_are_named(device):
    layer = Layer.of(Guarded(device), "positions", [2, 1], (4, 6))
    dy, order, ends, norm = layer.dy, layer.order, layer.offsets, layer.norm
    for wrong in (dy[0], dy.int()):
        with pytest.raises(ValueError, match="dy and x must have one shape of three dimensions"):
            position_sums(wrong, order, ends)
    with pytest.raises(ValueError, match="dy and x must have one shape of three dimensions"):
        position_sums(dy, order, ends, **norm | {"x": norm["x"][:2]})
    for wrong in (order[:2], order.int()):
        with pytest.raises(ValueError, match=r"order must be contiguous int64 of shape \(3,\)"):
            position_sums(dy, wrong, ends)
    with pytest.raises(ValueError, match="offsets must be contiguous int64"):
        position_sums(dy, order, ends[:1])
    with pytest.raises(ValueError, match=r"mean must come with x, .* got .* without x"):
        position_sums(dy, order, ends, mean=norm["mean"])
    with pytest.raises(ValueError, match="x needs rstd"):
        position_sums(dy, order, ends, x=norm["x"], mean=norm["mean"])
    with pytest.raises(ValueError, match=r"rstd must .* of shape \(3, 4\), got .* \(3, 1\)"):
        position_sums(dy, order, ends, **norm | {"rstd": norm["rstd"][:, :1].contiguous()})
    with pytest.raises(ValueError, match=r"mean and rstd must have one shape \(B, G\)"):
        channel_sums(dy, order, ends, x=dy, rstd=norm["rstd"])
    thirds = norm["mean"][:, :3].contiguous()
    with pytest.raises(ValueError, match="where G divides the 4 channels"):
        channel_sums(dy, order, ends, x=dy, mean=thirds, rstd=thirds)
