"""Gradients of weights by cluster: `product_sums` and `convolution_sums` against float64."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import DEVICES, Guarded
from test_kernels_segment_sums import DTYPES, grouping
from torch import Tensor

from gq_triton import kernels
from gq_triton.cluster_grad.layers.rows import rounds_to_tf32
from gq_triton.engines import eager
from gq_triton.kernels import weight_grad
from gq_triton.kernels.tickets import take_tickets
from gq_triton.kernels.tiles import LARGEST, Device, Tile, stages_of, tile_of
from gq_triton.kernels.weight_kernels import MULTIPLIES_FLOAT64

ENGINES = {"kernels": kernels, "eager": eager}
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
pytestmark = pytest.mark.parametrize("device", DEVICES)


def check(actual: Tensor, terms: "list[Tensor]", sizes: "list[Tensor]", counts: "list[int]"):
    """Check sums by cluster: of n terms, off by ``(4 + sqrt(n)) eps`` of the sum of their sizes.

    Args:
        actual: ``(K, ...)``.
        terms: the exact sum of each cluster.
        sizes: the sum of the terms' sizes.
        counts: the number of terms.
    """
    eps = torch.finfo(actual.dtype).eps
    for found, exact, size, count in zip(actual, terms, sizes, counts, strict=True):
        bound = eps * (4 + math.sqrt(count)) * size + 1e-300
        worst = float(((found.double().cpu() - exact).abs() / bound).max())
        assert worst <= 1, f"sums are off by {worst} times the bound"


def check_products(actual, left, right, labels):
    """Check the sums of ``left.T @ right`` by cluster."""
    assert actual.dtype == torch.promote_types(left.dtype, torch.float32)
    left, right, exact, sizes, counts = left.double().cpu(), right.double().cpu(), [], [], []
    for k in range(len(actual)):
        a, b = (t[labels == k].flatten(0, 1) for t in (left, right))
        exact.append(a.T @ b)
        sizes.append(a.abs().T @ b.abs())
        counts.append(len(a))
    check(actual, exact, sizes, counts)


def empty(guarded, size, dtype):
    """Return memory for sums that holds NaN."""
    wide = torch.promote_types(dtype, torch.float32)
    return guarded.view(torch.full((math.prod(size),), math.nan), wide).view(size)


def factors(guarded, batch, rows, columns, dtype):
    """Return two factors ``(B, T, columns)``."""
    sizes = [(batch, rows, n) for n in columns]
    return [guarded.normal(math.prod(size), dtype=dtype).view(size) for size in sizes]


# Sizes of clusters, rows per sample, columns of the factors.
PRODUCTS = {
    "one sample": ([1], 5, (3, 4)),
    "one cluster": ([6], 7, (20, 17)),
    "uneven and empty": ([0, 9, 1, 0, 4], 7, (33, 20)),
    "a cluster per sample": ([1] * 19, 3, (5, 18)),
    "more than are ranked": ([2, 0, 1] * 11, 1, (16, 16)),
    "rows of one sample": ([3, 0, 2], 64, (20, 40)),
    "several tiles": ([2, 5], 33, (150, 70)),
}


# All types meet rows that are looked up one by one, and rows of one sample.
TYPED = [(name, torch.float32) for name in PRODUCTS]
TYPED += [
    (name, dtype) for name in ("uneven and empty", "rows of one sample") for dtype in DTYPES[1:]
]


@pytest.mark.parametrize(("name", "dtype"), TYPED)
@pytest.mark.parametrize("engine", ENGINES)
def test_products_of_clusters(device, engine, name, dtype):
    sizes, rows, columns = PRODUCTS[name]
    guarded = Guarded(device, shift=1)
    labels, order, offsets = grouping(device, sizes)
    left, right = factors(guarded, len(labels), rows, columns, dtype)
    out = empty(guarded, (len(sizes), *columns), dtype)
    ENGINES[engine].product_sums(left, right, order, offsets, out)
    check_products(out, left, right, labels)
    guarded.check()


@pytest.mark.parametrize("engine", ENGINES)
def test_products_of_any_layout(device, engine):
    """Samples apart from each other, expanded ones, strided columns; a transposed parameter."""
    labels, order, offsets = grouping(device, [4, 0, 5])
    wide = torch.randn(9, 6, 40, device=device)
    cases = {
        "class token": (wide[:, :1], wide[:, 3:4]),
        "all but one": (wide[:, 1:], wide[:, :-1]),
        "expanded": (wide[:1].expand(9, -1, -1), wide),
        "one gradient": (wide[0, 0, 0].expand(9, 6, 7), wide),
        "columns": (wide[..., ::2], wide[..., 20:]),
        "batch second": (wide.transpose(0, 1).contiguous().transpose(0, 1), wide),
    }
    for name, (left, right) in cases.items():
        columns = left.shape[2], right.shape[2]
        out = torch.full((3, *reversed(columns)), math.nan, device=device).transpose(1, 2)
        ENGINES[engine].product_sums(left, right, order.int(), offsets.int(), out)
        assert not out.isnan().any(), name
        check_products(out, left, right, labels)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [3, 64])
def test_rows_of_a_cluster_are_split(device, rows, dtype, monkeypatch):
    """Few tiles: several programs share the rows of a cluster, and their sums are added up."""
    shares = []

    def small(*args, **kwargs):
        shares.append(
            tile_of(*args, **kwargs | {"device": Device(40, 96 * 1024)})._replace(splits=3)
        )
        return shares[-1]

    monkeypatch.setattr(weight_grad, "tile_of", small)
    guarded = Guarded(device)
    labels, order, offsets = grouping(device, [1, 30, 0, 9])
    left, right = factors(guarded, 40, rows, (20, 24), dtype)
    out = empty(guarded, (4, 20, 24), dtype)
    results = []
    for _ in range(2):
        kernels.product_sums(left, right, order, offsets, out)
        results.append(out.clone())
    assert shares[0].splits == 3
    assert torch.equal(*results)
    check_products(out, left, right, labels)
    assert not take_tickets(out.device, 1).any()  # as the next launch has to find them


# Sizes of clusters, channels of output and input, groups, sizes of input and taps, and stride,
# padding and dilation.
CONVOLVED: dict[str, tuple[Any, ...]] = {
    "one dimension": ([2, 0, 3], 6, 4, 1, (11,), (3,), (2,), (1,), (2,)),
    "two dimensions": ([1, 4], 6, 4, 1, (9, 8), (3, 3), (1, 1), (1, 1), (1, 1)),
    "uneven sides": ([3, 1], 5, 3, 1, (8, 9), (2, 3), (2, 1), (0, 2), (1, 2)),
    "three dimensions": ([2, 2], 5, 3, 1, (4, 5, 6), (2, 3, 1), (1, 2, 3), (1, 1, 0), (1, 1, 1)),
    "one tap": ([2, 3], 8, 20, 1, (4, 4), (1, 1), (1, 1), (0, 0), (1, 1)),
    "one tap with steps": ([2, 3], 8, 20, 1, (5, 5), (1, 1), (2, 2), (0, 0), (1, 1)),
    "inputs for a tile": ([1, 2], 17, 70, 1, (4, 5), (2, 3), (1, 1), (1, 1), (1, 1)),
    "groups": ([2, 1, 2], 6, 4, 2, (7, 5), (3, 3), (2, 1), (1, 1), (1, 1)),
    "depthwise": ([4, 0, 2], 8, 8, 8, (9, 7), (3, 2), (2, 1), (1, 0), (1, 2)),
    "depthwise, two outputs each": ([4, 2], 8, 4, 4, (9,), (3,), (1,), (1,), (1,)),
    "a cluster per sample": ([1] * 17, 3, 1, 1, (6, 6), (3, 3), (1, 1), (0, 0), (1, 1)),
    "one sample": ([1], 3, 5, 1, (6, 6), (3, 3), (1, 1), (1, 1), (1, 1)),
}


def convolution(guarded, sizes, outputs, inputs, taps, side, options, dtype):
    """Return gradients at the output, inputs, and the cluster of each sample."""
    labels, order, offsets = grouping(guarded.device, sizes)
    moves = zip(side, taps, options["stride"], options["padding"], options["dilation"], strict=True)
    ends = [(n + 2 * pad - gap * (tap - 1) - 1) // step + 1 for n, tap, step, pad, gap in moves]
    sizes = (len(labels), outputs, *ends), (len(labels), inputs, *side)
    dy, x = (guarded.normal(math.prod(size), dtype=dtype).view(size) for size in sizes)
    return dy, x, labels, order, offsets


def check_convolutions(actual, dy, x, labels, options):
    """Check against torch's own backward pass in float64, over each cluster's samples alone."""

    def gradient(dy, x):
        weight = torch.zeros(actual.shape[1:], dtype=torch.float64, requires_grad=True)
        out = CONVOLUTIONS[weight.dim() - 2](x, weight, **options)
        return torch.autograd.grad(out, weight, dy)[0]

    assert actual.dtype == torch.promote_types(dy.dtype, torch.float32)
    dy, x, exact, sizes, counts = dy.double().cpu(), x.double().cpu(), [], [], []
    for k in range(len(actual)):
        mine = labels == k
        exact.append(gradient(dy[mine], x[mine]))
        sizes.append(gradient(dy[mine].abs(), x[mine].abs()))
        counts.append(int(mine.sum()) * math.prod(dy.shape[2:]))
    check(actual, exact, sizes, counts)


@pytest.mark.slow
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", CONVOLVED)
@pytest.mark.parametrize("engine", ENGINES)
def test_convolutions_of_clusters(device, engine, name, last):
    sizes, outputs, inputs, groups, side, taps, *moves = CONVOLVED[name]
    options = dict(zip(("stride", "padding", "dilation"), moves, strict=True), groups=groups)
    guarded, dtype = Guarded(device, shift=1), torch.float64 if last else torch.float32
    dy, x, labels, order, ends = convolution(
        guarded, sizes, outputs, inputs, taps, side, options, dtype
    )
    out = empty(guarded, (len(sizes), outputs, inputs // groups, *taps), dtype)
    if last:
        dy, x = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (dy, x))
        out = out.view(len(out), outputs, *taps, -1).movedim(-1, 2)
    ENGINES[engine].convolution_sums(dy, x, order, ends, out, **options)
    check_convolutions(out, dy, x, labels, options)
    guarded.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["uneven sides", "groups"])
def test_images_are_read_in_either_order(device, name, dtype, monkeypatch):
    """Small images are read as they are, others in ``channels_last``: the sums are the same bits.

    What is not finite stays in its cluster.
    """
    sizes, outputs, inputs, groups, side, taps, *moves = CONVOLVED[name]
    options = dict(zip(("stride", "padding", "dilation"), moves, strict=True), groups=groups)
    guarded = Guarded(device)
    dy, x, labels, order, ends = convolution(
        guarded, sizes, outputs, inputs, taps, side, options, dtype
    )
    x[int((labels == 0).nonzero()[0])] = math.nan
    found = []
    for most in (weight_grad.MOST_NARROW, 0):
        monkeypatch.setattr(weight_grad, "MOST_NARROW", most)
        found.append(empty(guarded, (len(sizes), outputs, inputs // groups, *taps), dtype))
        kernels.convolution_sums(dy, x, order, ends, found[-1], **options)
    assert found[0][0].isnan().any()
    for k in range(1, len(sizes)):
        assert found[0][k].isfinite().all()
        if dtype == torch.float64 and not MULTIPLIES_FLOAT64:  # sums whose order follows the memory
            torch.testing.assert_close(found[0][k], found[1][k], rtol=1e-12, atol=1e-12)
        else:
            assert torch.equal(found[0][k], found[1][k])
    guarded.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["two dimensions", "inputs for a tile", "depthwise"])
def test_convolutions_of_narrow_types(device, name, dtype):
    sizes, outputs, inputs, groups, side, taps, *moves = CONVOLVED[name]
    options = dict(zip(("stride", "padding", "dilation"), moves, strict=True), groups=groups)
    guarded = Guarded(device)
    dy, x, labels, order, ends = convolution(
        guarded, sizes, outputs, inputs, taps, side, options, dtype
    )
    out = empty(guarded, (len(sizes), outputs, inputs // groups, *taps), dtype)
    kernels.convolution_sums(dy, x, order, ends, out, **options)
    check_convolutions(out, dy, x, labels, options)


@pytest.mark.parametrize("name", ["uneven sides", "depthwise"])
def test_taps_apart_split_and_in_a_permuted_kernel(device, name, monkeypatch):
    """Few inputs, one tap for each tile; shared rows; taps whose strides do not follow."""
    sizes, outputs, inputs, groups, side, taps, *moves = CONVOLVED[name]
    options = dict(zip(("stride", "padding", "dilation"), moves, strict=True), groups=groups)
    monkeypatch.setattr(weight_grad, "MIXED_BELOW", 0)
    for rule in ("tile_of", "strip_of"):
        choose = getattr(weight_grad, rule)

        def shared(*args, choose=choose, **kwargs):
            return choose(*args, **kwargs)._replace(splits=2)

        monkeypatch.setattr(weight_grad, rule, shared)
    guarded = Guarded(device)
    dy, x, labels, order, ends = convolution(
        guarded, sizes, outputs, inputs, taps, side, options, torch.float32
    )
    out = empty(guarded, (len(sizes), outputs, inputs // groups, *reversed(taps)), dy.dtype)
    out = out.transpose(-1, -2)
    kernels.convolution_sums(dy, x, order, ends, out, **options)
    check_convolutions(out, dy, x, labels, options)


@pytest.mark.parametrize("engine", ENGINES)
def test_inputs_beyond_the_last_window(device, engine):
    """A transposed convolution may add more to its output than one step of its window."""
    torch.manual_seed(0)
    labels, order, offsets = grouping(device, [3, 2])
    x = torch.randn(5, 4, 6, dtype=torch.float64)
    weight = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    sides: dict[str, Any] = {"stride": (1,), "padding": (2,), "dilation": (3,)}
    dy = torch.randn(5, 2, 9 + 2 - 4 + 1, dtype=torch.float64)
    made = F.conv_transpose1d(x, weight, output_padding=2, **sides)
    dy = torch.randn_like(made)
    out = torch.full((2, *weight.shape), math.nan, dtype=torch.float64, device=device)
    run = ENGINES[engine].convolution_sums
    run(x.to(device), dy.to(device), order, offsets, out, **sides)
    for k in range(2):
        mine = dy * (labels == k)[:, None, None]
        exact = torch.autograd.grad(made, weight, mine, retain_graph=True)[0]
        torch.testing.assert_close(out[k].cpu(), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_to_multiply(device, engine):
    _, order, offsets = grouping(device, [2, 1])
    run = ENGINES[engine].product_sums
    for rows, columns in ((0, (3, 4)), (2, (0, 4)), (2, (3, 0))):
        left, right = (torch.randn(3, rows, n, device=device) for n in columns)
        out = torch.full((2, *columns), math.nan, device=device)
        run(left, right, order, offsets, out)
        assert torch.equal(out, torch.zeros_like(out))


def test_wrong_inputs_are_named(device):
    _, order, offsets = grouping(device, [2, 1])
    left, right = torch.randn(3, 4, 5, device=device), torch.randn(3, 4, 6, device=device)
    out = torch.empty(2, 5, 6, device=device)
    run = kernels.product_sums
    with pytest.raises(
        ValueError, match=r"left \(B, T, M\), right .* got \(3, 4, 5\), \(2, 4, 6\)"
    ):
        run(left, right[:2], order, offsets, out)
    with pytest.raises(ValueError, match=r"must fit, got .* and \(2, 6, 5\)"):
        run(left, right, order, offsets, out.mT)
    with pytest.raises(ValueError, match=r"out must be torch.float32, got .*bfloat16"):
        run(left, right.bfloat16(), order, offsets, out)
    with pytest.raises(ValueError, match=r"out must be torch.float64"):
        run(left.double(), right.double(), order, offsets, out)
    with pytest.raises(ValueError, match=r"order must be .* int32 or int64 of shape \(3,\)"):
        run(left, right, order[:2], offsets, out)
    with pytest.raises(ValueError, match=r"offsets must be .* of shape \(3,\) .* torch.float32"):
        run(left, right, order, offsets.float(), out)
    images, sums = torch.randn(3, 4, 5, device=device), torch.empty(2, 4, 4, 3, device=device)
    sides: dict[str, Any] = {"stride": (1,), "padding": (1,), "dilation": (1,)}
    with pytest.raises(ValueError, match=r"one to three dimensions \*, .* with 2 groups"):
        kernels.convolution_sums(images, images, order, offsets, sums, groups=2, **sides)
    sides["stride"] = (1, 1)
    with pytest.raises(ValueError, match="one to three dimensions"):
        kernels.convolution_sums(images, images, order, offsets, sums, **sides)


H100, A100, RTX, MI300 = (
    Device(132, 232448), Device(108, 166912), Device(128, 101376), Device(304, 65536, amd=True)
)  # fmt: skip


def test_the_tile_follows_from_shapes_and_device(device):
    def tile(height, width, dtype=torch.bfloat16, precision="ieee", on=H100, rows=16384):
        return tile_of(dtype, precision, height, width, 8, rows, 8, on)

    assert tile(4096, 4096) == Tile(128, 256, 64, 8, 4, 1)
    assert tile(4096, 4096, on=A100) == Tile(128, 128, 64, 8, 4, 1)
    assert tile(4096, 4096, on=RTX) == Tile(128, 128, 64, 8, 3, 1)
    assert tile(4096, 4096, on=MI300) == Tile(128, 128, 64, 8, 2, 1)
    # GPT-2 small: 144 tiles of the largest size would leave most multiprocessors one.
    assert tile(768, 768)[:2] == (128, 128)
    assert tile(3072, 768)[:2] == (128, 256)
    # No tile is much larger than the product; few tiles are split by rows instead.
    assert tile(64, 40, rows=10**6) == Tile(64, 64, 64, 4, 4, 33)
    assert tile(10, 3, rows=100) == Tile(16, 16, 64, 4, 4, 1)
    for precision in ("tf32", "ieee"):
        for on in (H100, A100, RTX, MI300):
            for dtype in DTYPES:
                found = tile(4096, 4096, dtype=dtype, precision=precision, on=on)
                each = (found.outputs + found.inputs) * found.rows * dtype.itemsize
                assert each * (found.stages - on.amd) <= on.shared
    assert all(stages_of(tile, torch.float64, MI300) >= 1 for tile in LARGEST.values())


def test_the_setting_of_tf32_is_torchs(device):
    before = torch.get_float32_matmul_precision()
    try:
        for name, expected in (("highest", False), ("high", True)):
            torch.set_float32_matmul_precision(name)
            assert rounds_to_tf32("matmul") is expected
    finally:
        torch.set_float32_matmul_precision(before)
    assert rounds_to_tf32("conv") is torch.backends.cudnn.allow_tf32
