"""The nearest centre of every point: `nearest_centers` against the float64 oracle."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICES, QUIET, Guarded

from gq_triton import clustering, distances
from gq_triton.clustering import KMeans
from gq_triton.kernels import nearest_centers
from gq_triton.kernels.kmeans_assign import MOST_K, TILE_B, TILE_F

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = [(1, 1, 1), (TILE_B, TILE_F, 16), (TILE_B + 1, TILE_F + 1, 17), (7, 2 * TILE_F + 5, 2)]
SIZES += [(2 * TILE_B + 3, 3, 2 * MOST_K + 1), (40, 1, MOST_K), (5, 300, 9)]
pytestmark = [
    pytest.mark.parametrize("device", DEVICES),
    *QUIET,
]


def compute_type(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def check(actual, x, centers, distinct):
    """Check labels and distances; return the worst error of a distance in units of its bound.

    Three sums of F products, each off by at most ``4 + sqrt(F)`` eps of the sum of its sizes, which
    together are at most ``(||x|| + ||c||)^2``. A label may be any whose distance is within that of
    the least one: it is the oracle's wherever the two least are further apart.
    """
    labels, found = actual[0].cpu(), actual[1].double().cpu()
    x, centers = x.double().cpu(), centers.double().cpu()
    exact = (x[:, None] - centers).square().sum(dim=2)
    exact[:, ~distinct.cpu()] = math.inf
    reach = (x.norm(dim=1)[:, None] + centers.norm(dim=1)).square()
    eps = torch.finfo(actual[1].dtype).eps
    bound = (4 + math.sqrt(x.shape[1])) * eps * reach + torch.finfo(actual[1].dtype).tiny
    chosen = labels[:, None]
    ratio = (found - exact.gather(1, chosen)[:, 0]).abs() / bound.gather(1, chosen)[:, 0]
    worst = float(ratio.max())
    assert worst <= 1, f"distances are off by {worst} times the bound"
    assert bool((found >= 0).all())
    least = (exact + bound).amin(dim=1)
    assert bool(((exact - bound).gather(1, chosen)[:, 0] <= least).all())
    clear = ((exact - bound) <= least[:, None]).sum(dim=1) == 1
    assert torch.equal(labels[clear], exact.argmin(dim=1)[clear])
    assert labels.dtype == torch.int64
    return worst


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("sizes", SIZES)
def test_all_sizes(device, sizes, shift, dtype):
    points, features, clusters = sizes
    guarded = Guarded(device, shift)
    x = guarded.normal(points, features, dtype=dtype)
    centers = guarded.normal(clusters, features, dtype=compute_type(dtype))
    every = torch.ones(clusters, dtype=torch.bool, device=device)
    actual = nearest_centers(x, centers, every)
    check(actual, x, centers, every)
    assert actual[1].dtype == centers.dtype
    guarded.check()


def test_equally_near_centres_give_the_lowest_label(device):
    """Small integers: every sum is exact, whatever its order."""
    x = torch.tensor([[0.0, 0], [3, 1], [-3, 1], [0, 5]], device=device)
    near = torch.tensor([[3.0, 1], [-3, 1], [3, 1], [0, -1]], device=device)
    centers = torch.full((2 * MOST_K + 3, 2), 9.0, device=device)
    centers[5:9] = near
    centers[2 * MOST_K - 1 : 2 * MOST_K + 3] = near  # again in later tiles
    labels, found = nearest_centers(x, centers, torch.ones_like(centers[:, 0], dtype=torch.bool))
    assert labels.tolist() == [8, 5, 6, 5]
    assert found.tolist() == [1, 0, 0, 25]


def test_centres_that_are_marked_get_no_point(device):
    guarded = Guarded(device)
    x, centers = guarded.normal(50, 20), guarded.normal(2 * MOST_K + 6, 20)
    kept = torch.arange(len(centers), device=device) % 3 == 1
    labels, found = nearest_centers(x, centers, kept)
    check((labels, found), x, centers, kept)
    assert bool(kept[labels].all())
    centers[3] = x[:1]  # the nearest, were it not marked
    again = nearest_centers(x, centers, kept)
    assert torch.equal(again[0], labels)
    assert torch.equal(again[1], found)


def test_results_depend_on_the_point_alone(device):
    """The interpreter's product rounds by the place of a row, the GPU's does not."""
    guarded = Guarded(device, seed=3)
    x, centers = guarded.normal(3 * TILE_B + 5, 70), guarded.normal(20, 70)
    every = torch.ones(20, dtype=torch.bool, device=device)
    labels, found = nearest_centers(x, centers, every)
    again = nearest_centers(x, centers, every)
    assert torch.equal(again[0], labels)
    assert torch.equal(again[1], found)
    order = torch.randperm(len(x), generator=guarded.generator).to(device)
    permuted = nearest_centers(x[order], centers, every)
    assert torch.equal(permuted[0], labels[order])
    tol = 1e-6 if device == "cpu" else 0.0
    torch.testing.assert_close(permuted[1], found[order], rtol=tol, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_point_that_is_not_finite_shows(device, value):
    guarded = Guarded(device)
    x, centers = guarded.normal(9, 5), guarded.normal(3, 5)
    every = torch.ones(3, dtype=torch.bool, device=device)
    clean = nearest_centers(x, centers, every)
    x[4, 2] = value
    labels, found = nearest_centers(x, centers, every)
    others = torch.arange(9, device=device) != 4
    assert not found[4].isfinite()
    assert 0 <= labels[4] < 3
    assert torch.equal(labels[others], clean[0][others])
    assert torch.equal(found[others], clean[1][others])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    points=st.integers(0, 70),
    features=st.integers(1, 70),
    clusters=st.integers(1, 40),
    exponent=st.integers(-15, 15),
    seed=st.integers(0, 99),
)
def test_any_call_agrees_with_torch(device, points, features, clusters, exponent, seed):
    """The two faces of one operation, in float64; a power of two changes no bit."""
    guarded = Guarded("cpu", seed=seed)
    x = guarded.normal(points, features, dtype=torch.float64)
    centers = guarded.normal(clusters, features, dtype=torch.float64)
    distinct = torch.arange(clusters) != clusters // 2
    distinct[0] = True
    expected = distances.nearest_centers(x, centers, distinct)
    x, centers, distinct = (t.to(device) for t in (x, centers, distinct))
    labels, found = nearest_centers(x, centers, distinct)
    assert torch.equal(labels.cpu(), expected[0])
    torch.testing.assert_close(found.cpu(), expected[1], rtol=1e-11, atol=1e-11)
    factor = 2.0**exponent
    scaled = nearest_centers(x * factor, centers * factor, distinct)
    assert torch.equal(scaled[0], labels)
    assert torch.equal(scaled[1], found * factor**2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_kmeans_gives_the_same_clusters(device, monkeypatch, seed, far, dtype):
    """Through the seam, with relocation; test_clustering.py holds torch's to scikit-learn's."""
    generator = torch.Generator().manual_seed(seed)
    middles = torch.randn(5, 12, generator=generator)
    x = middles[torch.randint(5, (150,), generator=generator)]
    x = (x + 0.3 * torch.randn(x.shape, generator=generator)).to(dtype)
    start = x[:6].clone()
    start[0] += 100.0 if far else 0.0
    expected = KMeans(6, init=start, max_iter=30, tol=0.0).fit(x)
    calls = []
    monkeypatch.setattr(clustering, "ASSIGN_BACKEND", "triton")
    monkeypatch.setattr(
        "gq_triton.kernels.nearest_centers", lambda *args: calls.append(0) or nearest_centers(*args)
    )
    actual = KMeans(6, init=start, max_iter=30, tol=0.0).fit(x.to(device))
    assert calls
    assert torch.equal(actual.labels_.cpu(), expected.labels_)
    assert int(actual.n_iter_) == int(expected.n_iter_)
    tol = 1e-5 if dtype == torch.float32 else 1e-12
    centers = actual.cluster_centers_.cpu()
    torch.testing.assert_close(centers, expected.cluster_centers_, rtol=tol, atol=tol)


def test_wrong_inputs_are_named(device):
    guarded = Guarded(device)
    x, centers = guarded.normal(9, 5), guarded.normal(3, 5)
    every = torch.ones(3, dtype=torch.bool, device=device)
    for wrong in (x[:, :4], x.double(), x.T.contiguous().T, x.int()):
        with pytest.raises(ValueError, match=r"x \(B, F\) and centers \(K >= 1, F\) must have"):
            nearest_centers(wrong, centers, every)
    with pytest.raises(ValueError, match=r"x \(B, F\) and centers \(K >= 1, F\) must have"):
        nearest_centers(x, centers[:0], every[:0])
    for wrong in (every[:2], every.int()):
        with pytest.raises(ValueError, match="distinct must be contiguous bool of shape"):
            nearest_centers(x, centers, wrong)
