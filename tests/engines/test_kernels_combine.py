"""The weighted sum of cluster means: `combine` against the float64 oracle."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICES, QUIET, Clusters, Guarded, newest_first, truncated

from gq_triton.engines import eager
from gq_triton.kernels import combine, weigh_
from gq_triton.kernels.combine import CHUNK
from gq_triton.kernels.launch import block_size
from gq_triton.law import Law

BLOCK = block_size(torch.float32)
SIZES = [1, BLOCK - 1, BLOCK, BLOCK + 1, CHUNK - 1, CHUNK, CHUNK + 1]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OCCUPATIONS = [[5], [1, 7], [4, 0, 3], [0, 0, 1, 0], [3, 1, 4, 1, 5, 9, 0, 2, 6]]
pytestmark = [
    pytest.mark.parametrize("device", DEVICES),
    *QUIET,
]


def sums_of(guarded, clusters, n, dtype=torch.float32, scale=1.0):
    """Return sums ``(K, n)`` inside NaN whose means are about normal; 0 for an empty cluster."""
    sizes = torch.tensor(clusters.sizes, dtype=torch.float64)
    values = torch.randn(len(sizes), n, generator=guarded.generator, dtype=torch.float64)
    return guarded.view(values * (scale * sizes / sizes.sum())[:, None], dtype)


def centroids_of(sums, clusters, unscale=1.0):
    """Return the clusters' means, rounded once to the type of the sums as in the kernel."""
    inverse = clusters.vectors()["inverse_shares"].cpu().to(sums.dtype)
    return sums.cpu() * inverse[:, None] * unscale


def assert_combined(actual, sums, clusters, rows, *, rho, unscale=1.0, seen=None):
    """Check weighted and raw gradient; return the worst error in units of the bound.

    A weight may be off by ``8 + 4 rho sqrt(L)`` ulps, as in `assert_weights`; products and the sum
    over clusters add ``2 + K`` roundings. ``seen`` holds the means rounded to the queue's type.
    """
    weighted, raw = (part.double().cpu() for part in actual[:2])
    centroids = centroids_of(sums, clusters)
    seen = centroids * unscale if seen is None else seen
    weights = clusters.weights(seen, rows, rho)
    exact = clusters.mix(weights * centroids.double())
    if torch.equal(seen, centroids):
        torch.testing.assert_close(
            exact, clusters.gradient(centroids, rows, rho), rtol=1e-12, atol=1e-300
        )
    compute = torch.float64 if torch.float64 in (sums.dtype, *_types(rows)) else torch.float32
    slots = 0 if rows is None else len(rows)
    units = (8 + 4 * rho * math.sqrt(slots) if slots else 0) + 2 + len(sums)
    # A store to float32 rounds once more where the arithmetic is float64.
    eps = units * torch.finfo(compute).eps + torch.finfo(sums.dtype).eps
    bound = eps * clusters.mix(weights * centroids.double().abs()) + torch.finfo(sums.dtype).tiny
    ratio = (weighted - exact).abs() / bound
    worst = float(ratio.max()) if ratio.numel() else 0.0
    assert worst <= 1, f"weighted gradient is off by {worst} times the bound"
    total, size = sums.double().cpu().sum(dim=0), sums.double().cpu().abs().sum(dim=0)
    assert bool(((raw - total).abs() <= len(sums) * torch.finfo(sums.dtype).eps * size).all())
    assert actual[0].dtype == actual[1].dtype == sums.dtype
    assert actual[2].dtype == torch.float64
    return worst


def _types(rows):
    return () if rows is None else (rows.dtype,)


def run(sums, queue, count, clusters, *, rho=3.0, **options):
    """Run the kernel on clusters of known sizes; return the statistics added up."""
    queued, law = torch.tensor(count, device=sums.device), Law(rho, **options)
    actual = combine(sums, queue, queued, law, **clusters.vectors())
    return *actual[:2], actual[2].sum(dim=0)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("n", SIZES)
def test_all_sizes(device, n, shift):
    guarded, clusters = Guarded(device, shift), Clusters(device, [2, 0, 6])
    sums, queue = sums_of(guarded, clusters, n), guarded.normal(5, n)
    actual = run(sums, queue, 7, clusters)
    assert_combined(actual, sums, clusters, newest_first(queue, 7).cpu(), rho=3.0)
    guarded.check()


@pytest.mark.parametrize("sizes", OCCUPATIONS)
@pytest.mark.parametrize("scale", ["paper", "standard_error"])
@pytest.mark.parametrize("power", [1.0, 0.0, 0.5])
def test_populations(device, sizes, scale, power):
    guarded, clusters = Guarded(device), Clusters(device, sizes, power, scale)
    sums, queue = sums_of(guarded, clusters, 301), guarded.normal(4, 301)
    actual = run(sums, queue, 9, clusters)
    assert_combined(actual, sums, clusters, newest_first(queue, 9).cpu(), rho=3.0)


@pytest.mark.parametrize("k", range(1, 10))
def test_any_number_of_clusters(device, k):
    guarded, clusters = Guarded(device, seed=k), Clusters(device, list(range(k, 0, -1)))
    sums, queue = sums_of(guarded, clusters, BLOCK + 3), guarded.normal(5, BLOCK + 3)
    actual = run(sums, queue, 5, clusters)
    assert_combined(actual, sums, clusters, queue.cpu(), rho=3.0)


@pytest.mark.parametrize("slots", [*range(1, 9), 16, 17, 20])
@pytest.mark.parametrize("rho", [1.5, 3.0, 10.0])
def test_all_queue_lengths(device, slots, rho):
    guarded, clusters = Guarded(device, seed=slots), Clusters(device, [3, 5])
    sums, queue = sums_of(guarded, clusters, 203), guarded.normal(slots, 203)
    count = 3 * slots + 1
    actual = run(sums, queue, count, clusters, rho=rho)
    assert_combined(actual, sums, clusters, newest_first(queue, count).cpu(), rho=rho)


@pytest.mark.parametrize(("slots", "used"), [(5, 1), (5, 3), (5, 5), (5, 9), (20, 2), (20, 19)])
@pytest.mark.parametrize("turn", [0, 1, 3])
def test_effective_length_uses_the_newest_rows(device, slots, used, turn):
    guarded, clusters = Guarded(device), Clusters(device, [3, 5])
    sums, queue = sums_of(guarded, clusters, 203), guarded.normal(slots, 203)
    length = torch.tensor(used, device=device)
    actual = run(sums, queue, slots + turn, clusters, length=length)
    rows = newest_first(queue, slots + turn, min(used, slots)).cpu()
    assert_combined(actual, sums, clusters, rows, rho=3.0)


@pytest.mark.parametrize("bounds", [(0, 40), (16, 80), (7, 100)])
def test_columns_of_a_larger_ring(device, bounds):
    guarded, clusters = Guarded(device), Clusters(device, [3, 5])
    ring = guarded.normal(5, 100)
    before, queue = ring.clone(), ring[:, slice(*bounds)]
    sums = sums_of(guarded, clusters, queue.shape[1])
    actual = run(sums, queue, 8, clusters)
    assert_combined(actual, sums, clusters, newest_first(queue, 8).cpu(), rho=3.0)
    assert torch.equal(ring, before)


@pytest.mark.parametrize("queue_dtype", DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_types_are_independent(device, dtype, queue_dtype):
    guarded, clusters = Guarded(device), Clusters(device, [2, 3, 0])
    sums = sums_of(guarded, clusters, 300, dtype)
    queue = guarded.normal(5, 300, dtype=queue_dtype)
    actual = run(sums, queue, 8, clusters)
    # The mean of float32 sums and a float64 queue is formed in float64.
    wide = torch.promote_types(dtype, torch.promote_types(queue_dtype, torch.float32))
    # The interpreter truncates to bfloat16, so the oracle gets the means that the kernel compared.
    seen = truncated(centroids_of(sums.to(wide), clusters), queue_dtype)
    rows = newest_first(queue, 8).cpu()
    assert_combined(actual, sums, clusters, rows, rho=3.0, seen=seen)
    guarded.check()


def test_one_cluster_equals_no_clusters(device):
    guarded, clusters = Guarded(device), Clusters(device, [6])
    grad, queue = guarded.normal(BLOCK + 9), guarded.normal(5, BLOCK + 9)
    weighted, raw, statistics = run(grad[None], queue, 6, clusters)
    assert torch.equal(raw, grad)
    sums = weigh_([grad], [queue], [torch.tensor(6, device=device)], None, Law(3.0))
    torch.testing.assert_close(weighted, grad, rtol=5e-7, atol=0)
    torch.testing.assert_close(statistics.float(), sums[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize(("rho", "count"), [(1.0, 9), (3.0, 4), (3.0, 0)])
def test_rho_one_and_warm_up_weight_nothing(device, rho, count):
    guarded, clusters = Guarded(device), Clusters(device, [2, 0, 6])
    sums, queue = sums_of(guarded, clusters, 77), guarded.normal(5, 77)
    queue = queue if count >= 5 else guarded.view(torch.full((5, 77), math.nan), torch.float32)
    actual = run(sums, queue, count, clusters, rho=rho)
    assert_combined(actual, sums, clusters, None, rho=rho)
    assert actual[2][2:].tolist() == pytest.approx([77.0, 0.0, 0.0], rel=1e-6)
    one = run(sums[:1], queue, count, Clusters(device, [4]), rho=rho)
    assert torch.equal(one[0], sums[0])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("n", [9, CHUNK + 5])
def test_a_gradient_that_is_not_finite_is_not_weighted(device, value, n):
    guarded, clusters = Guarded(device), Clusters(device, [2, 6])
    sums, queue = sums_of(guarded, clusters, n), guarded.normal(3, n)
    sums[1, n - 2] = value
    weighted, raw, statistics = run(sums, queue, 4, clusters)
    assert torch.equal(raw.isfinite(), weighted.isfinite())
    assert raw.isfinite().logical_not().nonzero().tolist() == [[n - 2]]
    kept = raw.isfinite()
    assert_combined((weighted[kept], raw[kept], statistics), sums[:, kept], clusters, None, rho=3.0)
    assert statistics[2:].tolist() == [float(n), 0.0, 0.0]
    guarded.check()


def test_a_raw_gradient_that_overflows_is_not_weighted(device):
    clusters = Clusters(device, [4, 4])
    sums = torch.tensor([[3e38, 1.0], [3e38, 2.0]], device=device)
    weighted, raw, _ = run(sums, torch.ones(2, 2, device=device), 2, clusters)
    assert raw.tolist() == [math.inf, 3.0]
    assert weighted[1] == 3.0


def test_loss_scale_changes_no_weight(device):
    guarded, clusters = Guarded(device), Clusters(device, [2, 0, 6])
    sums, queue = sums_of(guarded, clusters, 500), guarded.normal(5, 500)
    plain = run(sums, queue, 9, clusters)
    scale = torch.tensor(4096.0, device=device)
    scaled = run(sums * 4096, queue, 9, clusters, grad_scale=scale)
    assert torch.equal(scaled[0], plain[0] * 4096)
    assert torch.equal(scaled[1], plain[1] * 4096)
    assert torch.equal(scaled[2], plain[2])


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_statistics(device, rho):
    guarded, clusters = Guarded(device), Clusters(device, [2, 0, 6])
    sums, queue = sums_of(guarded, clusters, 2 * CHUNK + 17), guarded.normal(4, 2 * CHUNK + 17)
    weighted, raw, statistics = (t.double().cpu() for t in run(sums, queue, 9, clusters, rho=rho))
    rows = newest_first(queue, 9).cpu()
    weights = clusters.weights(centroids_of(sums, clusters), rows, rho)
    active = float(rho > 1)
    exact = torch.stack(
        [
            raw.square().sum(),
            weighted.square().sum(),
            clusters.mix(weights).sum(),
            clusters.mix(weights == rho).sum() * active,
            clusters.mix(weights == 1 / rho).sum() * active,
        ]
    )
    torch.testing.assert_close(statistics, exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("queue_dtype", DTYPES)
@pytest.mark.parametrize("value", [0.125, 0.0, 2.0**-100, 3 * 2.0**12])
def test_constant_queue(device, queue_dtype, value):
    """Lemma 3.3: ``1/rho`` where the mean equals the queue, ``rho`` where it does not."""
    clusters = Clusters(device, [4, 4])
    value = 0.0 if queue_dtype == torch.float16 and value < 1e-6 else value
    queue = torch.full((7, 3), value, device=device).to(queue_dtype)
    # One mean is one step away in the queue's type, the other so far away that z overflows.
    step = max(abs(value) * torch.finfo(queue_dtype).eps, 4 * torch.finfo(queue_dtype).tiny)
    means = torch.tensor([[value, value, 1e4], [value, value + step, 2e4]], dtype=torch.float64)
    dtype = torch.float64 if queue_dtype == torch.float64 else torch.float32
    sums = (means / 2).to(device, dtype)
    weighted, _, _ = run(sums, queue, 9, clusters)
    weights = torch.tensor([[1 / 3, 1 / 3, 3], [1 / 3, 3, 3]], dtype=torch.float64)
    exact = (weights * means).mean(dim=0)
    torch.testing.assert_close(weighted.double().cpu(), exact, rtol=3e-7, atol=0)


def test_a_mean_that_equals_its_constant_queue(device):
    """With a share that is no power of two, a mean is rounded before the queue is subtracted."""
    guarded, clusters = Guarded(device), Clusters(device, [3, 4])
    sums = sums_of(guarded, clusters, 300)
    means = centroids_of(sums, clusters)
    weighted, _, _ = run(sums, means[:1].repeat(4, 1).to(device), 4, clusters)
    exact = clusters.mix(means.double() * torch.tensor([[1 / 3], [3]], dtype=torch.float64))
    size = clusters.mix(means.double().abs() * 3)
    assert bool(((weighted.double().cpu() - exact).abs() <= 1e-6 * size).all())


@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e-10, 1e10, 1e18, 1e30])
def test_neither_tiny_nor_huge_gradients_lose_the_statistic(device, scale):
    guarded, clusters = Guarded(device), Clusters(device, [4, 4])
    sums, queue = sums_of(guarded, clusters, 200, scale=scale), guarded.normal(5, 200, scale=scale)
    weighted, _, _ = run(sums, queue, 5, clusters)
    centroids = centroids_of(sums, clusters)
    size = clusters.mix(centroids.abs()).clamp(min=scale * 1e-3)
    error = (weighted.double().cpu() - clusters.gradient(centroids, queue.cpu(), 3.0)).abs() / size
    assert float(error.max()) < 1e-5


def test_repeats_agree_bit_for_bit(device):
    guarded, clusters = Guarded(device), Clusters(device, [2, 0, 6])
    sums, queue = sums_of(guarded, clusters, CHUNK + 3), guarded.normal(5, CHUNK + 3)
    first, second = (run(sums, queue, 6, clusters) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(0, 70),
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=9).filter(any),
    slots=st.integers(1, 8),
    turn=st.integers(-2, 9),
    rho=st.sampled_from([1.0, 2.0, 3.0]),
    exponent=st.integers(-20, 20),
    seed=st.integers(0, 99),
)
def test_any_call_agrees_with_eager(device, n, sizes, slots, turn, rho, exponent, seed):
    """The kernel agrees with the eager engine; scaling by a power of two changes no bit."""
    guarded, clusters = Guarded("cpu", seed=seed), Clusters("cpu", sizes)
    sums, queue = sums_of(guarded, clusters, n), guarded.normal(slots, n)
    count = max(slots + turn, 0)
    vectors: dict[str, Any] = clusters.vectors()
    expected = eager.combine(sums, queue, torch.tensor(count), Law(rho), **vectors)
    clusters.device = device
    sums, queue = sums.to(device), queue.to(device)
    actual = run(sums, queue, count, clusters, rho=rho)
    expected = *expected[:2], expected[2].sum(dim=0)
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=2e-4, atol=1e-6)
    factor = 2.0**exponent
    scaled = run(sums * factor, queue * factor, count, clusters, rho=rho)
    assert torch.equal(scaled[0], actual[0] * factor)


def test_wrong_inputs_are_named(device):
    guarded, clusters = Guarded(device), Clusters(device, [1, 1])
    sums, queue = guarded.normal(2, 4), guarded.normal(3, 4)
    with pytest.raises(ValueError, match=r"queues\[0\] must have shape \(3, 4\)"):
        run(sums, guarded.normal(4, 3).T, 3, clusters)
    with pytest.raises(ValueError, match="inverse_shares must be contiguous float64 of shape"):
        run(sums, queue, 3, Clusters(device, [1, 1, 1]))
    vectors: dict[str, Any] = clusters.vectors()
    with pytest.raises(ValueError, match=r"queued\[0\] must be one torch.int64"):
        combine(sums, queue, torch.tensor(3.0, device=device), Law(3.0), **vectors)
