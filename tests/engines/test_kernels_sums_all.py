# A norm's sums exist, although the types allow None.
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportArgumentType=false
"""Sums by cluster of many layers at once: `sums_all` against the float64 oracle."""

import math

import pytest
import torch
from kernel_cases import DEVICES, QUIET, Guarded
from test_kernels_segment_sums import Layer

from gq_triton.engines import eager
from gq_triton.kernels import position_sums, sums_all
from gq_triton.kernels.tickets import take_tickets
from gq_triton.layer_sums import LayerSums

pytestmark = [pytest.mark.parametrize("device", DEVICES), *QUIET]
F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


def layers_of(guarded, sizes):
    """Return layers of both layouts and several types, with all their kinds of statistics."""
    batch = sum(sizes)
    images = "channels"
    made = [
        Layer.of(guarded, "positions", sizes, (3, 144)),
        Layer.of(guarded, images, sizes, (16, 17), stats=(1, 17)),
        Layer.of(guarded, "positions", sizes, (1, 10), dtype=BF16, x_dtype=F64),
        Layer.of(guarded, images, sizes, (3, 12), dtype=BF16, stats=(batch, 4)),
        Layer.of(guarded, "positions", sizes, (2, 32)),  # an RMSNorm
        Layer.of(guarded, "positions", sizes, (2, 7)),  # a bias, as the next one
        Layer.of(guarded, images, sizes, (33, 5)),
    ]
    del made[4].norm["mean"]
    for layer in made[5:]:
        layer.norm = {}
    return made


def asked(layer):
    """Return a layer as `sums_all` takes it, its sums filled with what must not be kept."""
    types = {layer.dy.dtype} | {t.dtype for name, t in layer.norm.items() if name == "x"}
    wide = F64 if F64 in types else F32
    images = layer.layout == "channels"
    columns = layer.dy.shape[1 if images else 2]
    shape = len(layer.offsets) - 1, columns
    shifts = torch.full(shape, math.nan, dtype=wide, device=layer.dy.device)
    scales = shifts.clone() if layer.norm else None
    x, mean, rstd = (layer.norm.get(name) for name in ("x", "mean", "rstd"))
    return LayerSums(layer.dy, x, mean, rstd, shifts, scales, images)


def run(layers, ops=sums_all):
    """Return the sums of all layers, which have the same clusters."""
    made = [asked(layer) for layer in layers]
    ops(made, layers[0].order, layers[0].offsets)
    return [(one.shifts, one.scales) for one in made]


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [[3, 0, 50], [5], [1], [1, 0, 1] * 6, [1, 1, 1]],
    ids=["empty", "one cluster", "one sample", "18 clusters", "as many as samples"],
)
def test_layers_of_all_kinds(device, sizes):
    guarded = Guarded(device)
    layers = layers_of(guarded, sizes)[: 2 if len(sizes) > 3 else None]
    for layer, found in zip(layers, run(layers), strict=True):
        layer.check(found, bits=layer.norm["x"].dtype if layer.norm else None)
    guarded.check()
    assert not take_tickets(layers[0].dy.device, 1).any()


def test_plain_torch_keeps_the_same_bound(device):
    layers = layers_of(Guarded(device), [2, 0, 4])
    for layer, found in zip(layers, run(layers, eager.sums_all), strict=True):
        layer.check(found, bits=layer.norm["x"].dtype if layer.norm else None)


def test_addresses_that_are_no_multiples_of_16(device):
    guarded = Guarded(device, shift=1)
    layers = [
        Layer.of(guarded, layout, [3, 0, 9], (16, 32)) for layout in ("positions", "channels")
    ]
    for layer, found in zip(layers, run(layers), strict=True):
        layer.check(found)
    guarded.check()


@pytest.mark.slow
def test_repeats_agree_and_other_layers_do_not_matter(device):
    """A layer's sums are also those of a launch of its own."""
    layers = layers_of(Guarded(device), [4, 0, 2])
    first = run(layers)
    for again in (run(layers), [run([layer])[0] for layer in layers]):
        for both in zip(first, again, strict=True):
            for mine, theirs in zip(*both, strict=True):
                assert mine is theirs or torch.equal(mine, theirs)
    assert torch.equal(
        first[0][0], position_sums(layers[0].dy, layers[0].order, layers[0].offsets)[0]
    )


def test_what_is_not_finite_stays_in_its_layer_cluster_and_column(device):
    layers = layers_of(Guarded(device), [4, 0, 3])[:2]
    clean = run(layers)
    sample = int(layers[0].order[0])
    layers[0].dy[sample, 0, 3] = math.inf
    layers[0].norm["x"][sample, 0, 5] = math.nan
    found = run(layers)
    assert torch.equal(found[1][0], clean[1][0])
    for mine, before, columns in (
        (found[0][0], clean[0][0], {3}),
        (found[0][1], clean[0][1], {3, 5}),
    ):
        where = (~mine.isfinite()).nonzero().tolist()
        assert {tuple(place) for place in where} == {(0, column) for column in columns}
        same = mine.isfinite()
        assert torch.equal(mine[same], before[same])


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
@pytest.mark.parametrize("layout", ["positions", "channels"])
def test_nothing_to_add(device, layout, shape):
    layer = Layer.of(Guarded(device), layout, [2, 1], shape)
    for part in run([layer])[0]:
        assert torch.equal(part, torch.zeros(2, shape[1], device=device))


def test_wrong_layers_are_named(device):
    layer = Layer.of(Guarded(device), "positions", [2, 1], (4, 6))
    good = asked(layer)
    for changed, match in (
        ({"dy": layer.dy.int()}, "dy and x must have one shape"),
        ({"dy": layer.dy.transpose(1, 2), "x": layer.dy.mT, "mean": None}, "rstd must come with x"),
        ({"shifts": good.shifts[:1]}, r"shifts must be contiguous torch.float32 of shape \(2, 6\)"),
        ({"scales": None}, "scales must be given with x, got None"),
        ({"x": None, "mean": None, "rstd": None}, "scales must be given only with x"),
        ({"x": layer.norm["x"].mT.contiguous().mT}, "dy and x must be contiguous"),
    ):
        with pytest.raises(ValueError, match=match):
            sums_all([good._replace(**changed)], layer.order, layer.offsets)


@pytest.mark.parametrize("ops", [sums_all, eager.sums_all], ids=["kernels", "eager"])
@pytest.mark.parametrize("layout", ["positions", "channels"])
def test_shapes_as_layers_have_them(device, layout, ops):
    """Images of two dimensions, statistics with a dimension of one, flat memory for the sums."""
    layer = Layer.of(Guarded(device), layout, [2, 1], (4, 6))
    declared, images = asked(layer), layout == "channels"
    dy, x, mean, rstd, shifts, scales, _ = declared
    if images:  # statistics of a batch
        mean, rstd = mean[:1].expand(1, -1).contiguous(), rstd[:1].contiguous()
        declared = declared._replace(mean=mean, rstd=rstd)
        dy, x = (t.view(*t.shape[:2], 1, -1) for t in (dy, x))
        mean, rstd = mean[0], rstd[0]
    else:
        mean, rstd = mean[..., None], rstd[..., None]
    sums = [torch.full_like(t, math.nan).flatten() for t in (shifts, scales)]
    for given in (declared, LayerSums(dy, x, mean, rstd, sums[0], sums[1], images)):
        ops([given], layer.order, layer.offsets)
    assert torch.equal(sums[0], shifts.flatten())
    assert torch.equal(sums[1], scales.flatten())
