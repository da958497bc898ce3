"""The clustered weight gradient: `cluster_weight_grad` against the float64 oracle."""

import math
from dataclasses import dataclass

import pytest
import torch
from kernel_cases import DEVICES, QUIET, Clusters, Guarded, newest_first, truncated
from torch import Tensor

from gq_triton.kernels import cluster_weight_grad
from gq_triton.kernels.cluster_wgrad import GROUP, TILE_I, TILE_O

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OCCUPATIONS = [[5], [1, 7], [40, 0, 3], [0, 0, 1, 0], [3, 1, 4, 1, 5, 9, 0, 2, 6], [70, 130]]
SHAPES = [(1, 1), (TILE_O, TILE_I), (TILE_O + 1, 16), (7, 2 * TILE_I + 5), (GROUP * TILE_O + 1, 70)]
EPS = torch.finfo(torch.float32).eps
pytestmark = [
    pytest.mark.parametrize("device", DEVICES),
    *QUIET,
]


@dataclass
class Layer:
    """One layer's rows by cluster, and a queue of raw gradients of about the same size."""

    clusters: Clusters
    dy: Tensor
    x: Tensor
    queue: Tensor

    @staticmethod
    def of(guarded, clusters, shape, *, slots=5, dtype=torch.float32, queue_dtype=torch.float32):
        rows = sum(clusters.sizes)
        dy = guarded.normal(rows, shape[0], dtype=dtype, scale=rows**-0.5)
        x = guarded.normal(rows, shape[1], dtype=dtype)
        queue = guarded.normal(slots, shape[0] * shape[1], dtype=queue_dtype)
        return Layer(clusters, dy, x, queue)

    def run(self, count, *, rho=3.0, **options):
        """Run the kernel."""
        device = self.dy.device
        ends = torch.tensor([0, *self.clusters.sizes]).cumsum(0).to(device)
        queued, vectors = torch.tensor(count, device=device), self.clusters.vectors()
        return cluster_weight_grad(
            self.dy, self.x, ends, self.queue, queued, rho=rho, **vectors, **options
        )

    def products(self, function=lambda t: t):
        """Return ``dy_k^T x_k`` of all clusters ``(K, O * I)`` in float64."""
        parts = [t.double().cpu().split(self.clusters.sizes) for t in (self.dy, self.x)]
        pairs = zip(*parts, strict=True)
        return torch.stack([(function(a).T @ function(b)).flatten() for a, b in pairs])

    def check(self, actual, rows, *, rho=3.0, unscale=1.0):
        """Check both gradients; return the worst error of each in units of its bound.

        A sum of n products may be off by ``4 + sqrt(n)`` eps of the sum of their sizes: by that
        much the means are uncertain. The weighted gradient must be one that the law gives for means
        within it, so that a weight may change as much as the oracle's does there, plus what
        `combine` is allowed.
        """
        weighted, raw = (part.double().cpu().flatten() for part in actual)
        sums, inverse = self.products(), self.clusters.vectors()["inverse_shares"].cpu()[:, None]
        lengths = torch.tensor(self.clusters.sizes, dtype=torch.float64)[:, None]
        noise = EPS * (4 + lengths.sqrt()) * self.products(torch.abs)
        raw_bound = noise.sum(dim=0) + 1e-300
        raw_ratio = float(((raw - sums.sum(dim=0)).abs() / raw_bound).max())
        assert raw_ratio <= 1, f"raw gradient is off by {raw_ratio} times the bound"
        centroids, noise = sums * inverse, noise * inverse
        near = [centroids + noise * sign for sign in (-1, 0, 1)]
        weights = torch.stack([self._weights(c * unscale, rows, rho) for c in near])
        if rows is not None:
            # Between the ends the score may touch 0.
            mu = rows.double().mean(dim=0)
            touches = (near[0] * unscale <= mu) & (near[2] * unscale >= mu)
            weights[1][touches] = 1 / rho
        moved = weights.amax(dim=0) - weights.amin(dim=0)
        exact_weights = self._weights(centroids * unscale, rows, rho)
        exact = self.clusters.mix(exact_weights * centroids)
        slots = 0 if rows is None else len(rows)
        eps = EPS * (8 + 4 * rho * math.sqrt(slots) + 2 + len(sums))
        size = exact_weights * centroids.abs()
        bound = self.clusters.mix(moved * centroids.abs() + rho * noise + eps * size) + 1e-300
        ratio = float(((weighted - exact).abs() / bound).max())
        assert ratio <= 1, f"weighted gradient is off by {ratio} times the bound"
        return raw_ratio, ratio

    def _weights(self, seen, rows, rho):
        # The oracle rounds to the queue's type, the interpreter truncates to bfloat16.
        if rows is not None and rows.dtype in (torch.bfloat16, torch.float16):
            return self.clusters.weights(truncated(seen.float(), rows.dtype), rows, rho)
        return self.clusters.weights(seen, None if rows is None else rows.double(), rho)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", OCCUPATIONS)
def test_clusters_of_all_sizes(device, sizes, dtype):
    guarded = Guarded(device, shift=1)
    layer = Layer.of(guarded, Clusters(device, sizes), (20, 33), dtype=dtype)
    layer.check(layer.run(7), newest_first(layer.queue, 7).cpu())
    guarded.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_of_all_shapes(device, shape, dtype):
    guarded = Guarded(device)
    layer = Layer.of(guarded, Clusters(device, [2, 4]), shape, dtype=dtype)
    layer.check(layer.run(5), layer.queue.cpu())
    guarded.check()


@pytest.mark.parametrize("k", range(1, 10))
def test_any_number_of_clusters(device, k):
    guarded, clusters = Guarded(device, seed=k), Clusters(device, list(range(k, 0, -1)))
    layer = Layer.of(guarded, clusters, (17, 18))
    layer.check(layer.run(5), layer.queue.cpu())


@pytest.mark.parametrize("scale", ["paper", "standard_error"])
@pytest.mark.parametrize("power", [1.0, 0.0])
def test_populations(device, scale, power):
    clusters = Clusters(device, [1, 9, 0, 30], power, scale)
    layer = Layer.of(Guarded(device), clusters, (17, 18))
    layer.check(layer.run(5), layer.queue.cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queue_dtype", [*DTYPES, torch.float64])
def test_types_are_independent(device, dtype, queue_dtype):
    guarded, clusters = Guarded(device), Clusters(device, [3, 12])
    layer = Layer.of(guarded, clusters, (17, 32), dtype=dtype, queue_dtype=queue_dtype)
    layer.check(layer.run(8), newest_first(layer.queue, 8).cpu())


@pytest.mark.parametrize("slots", [1, 2, 5, 17])
@pytest.mark.parametrize("rho", [1.5, 10.0])
def test_all_queue_lengths(device, slots, rho):
    guarded, clusters = Guarded(device, seed=slots), Clusters(device, [3, 12])
    layer = Layer.of(guarded, clusters, (17, 18), slots=slots)
    count = 3 * slots + 1
    layer.check(layer.run(count, rho=rho), newest_first(layer.queue, count).cpu(), rho=rho)


@pytest.mark.parametrize(("slots", "used"), [(5, 1), (5, 3), (5, 9), (20, 2)])
def test_effective_length_uses_the_newest_rows(device, slots, used):
    layer = Layer.of(Guarded(device), Clusters(device, [3, 12]), (17, 18), slots=slots)
    length = torch.tensor(used, device=device)
    rows = newest_first(layer.queue, slots + 3, min(used, slots)).cpu()
    layer.check(layer.run(slots + 3, length=length), rows)


def test_columns_of_a_larger_ring(device):
    guarded = Guarded(device)
    layer = Layer.of(guarded, Clusters(device, [3, 12]), (8, 9))
    layer.queue = guarded.normal(5, 200)[:, 17 : 17 + 72]
    layer.check(layer.run(8), newest_first(layer.queue, 8).cpu())


@pytest.mark.parametrize(("rho", "count"), [(1.0, 9), (3.0, 4), (3.0, 0)])
def test_rho_one_and_warm_up_weight_nothing(device, rho, count):
    layer = Layer.of(Guarded(device), Clusters(device, [3, 0, 12]), (17, 18))
    if count < 5:
        layer.queue.fill_(math.nan)
    layer.check(layer.run(count, rho=rho), None, rho=rho)
    layer.clusters = Clusters(device, [15])
    weighted, raw = layer.run(count, rho=rho)
    assert torch.equal(weighted, raw)


@pytest.mark.parametrize("queue_dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_queue(device, dtype, queue_dtype):
    """Lemma 3.3: ``1/rho`` where the mean equals the queue, ``rho`` where it does not."""
    dy = torch.tensor([[1.0, 0], [1, 0], [0, 2], [2, 2]], dtype=dtype, device=device)
    x = torch.tensor([[3.0], [1], [4], [1]], dtype=dtype, device=device)
    # Means 8, 0 and 4, 20.
    queue = torch.tensor([[8.0, 20]], device=device).repeat(4, 1).to(queue_dtype)
    layer = Layer(Clusters(device, [2, 2]), dy, x, queue)
    weighted, raw = layer.run(9)
    assert raw.flatten().tolist() == [6.0, 10.0]
    expected = torch.tensor([(8 / 3 + 3 * 4) / 2, 20 / 3 / 2])
    torch.testing.assert_close(weighted.flatten().cpu(), expected, rtol=3e-7, atol=0)
    layer.queue = torch.zeros_like(queue) + queue.new_tensor([1e-30, 0])
    weighted, _ = layer.run(9)
    expected = torch.tensor([3 * 6.0, 3 * 10])
    torch.testing.assert_close(weighted.flatten().cpu(), expected, rtol=3e-7, atol=0)


def test_a_mean_that_equals_its_constant_queue(device):
    """A share that is no power of two: a mean is rounded before the queue is taken from it."""
    dy = torch.arange(1.0, 8, device=device)[:, None].repeat(1, 40)
    x = torch.arange(1.0, 41, device=device).repeat(7, 1)
    layer = Layer(Clusters(device, [3, 4]), dy, x, dy)
    inverse = layer.clusters.vectors()["inverse_shares"].cpu()[:, None]
    means = layer.products().float() * inverse.float()
    layer.queue = means[:1].repeat(4, 1).to(device)
    weighted, _ = layer.run(4)
    exact = layer.clusters.mix(means * torch.tensor([[1 / 3], [3.0]]))
    torch.testing.assert_close(weighted.double().cpu().flatten(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_not_weighted(device, value):
    layer = Layer.of(Guarded(device), Clusters(device, [2, 6]), (TILE_O + 3, 18))
    layer.dy[4, TILE_O + 1] = value
    weighted, raw = layer.run(9)
    bad = torch.zeros(TILE_O + 3, 18, dtype=torch.bool, device=device)
    bad[TILE_O + 1] = True
    assert torch.equal(~raw.isfinite(), bad)
    assert torch.equal(~weighted.isfinite(), bad)
    layer.dy[4, TILE_O + 1] = 0
    pairs = zip((weighted, raw), layer.run(0), strict=True)
    layer.check([torch.where(bad, clean, dirty) for dirty, clean in pairs], None)


def test_loss_scale_changes_no_weight(device):
    layer = Layer.of(Guarded(device), Clusters(device, [3, 0, 12]), (17, 18))
    plain = layer.run(9)
    layer.dy = layer.dy * 4096
    scaled = layer.run(9, grad_scale=torch.tensor(4096.0, device=device))
    assert torch.equal(scaled[0], plain[0] * 4096)
    assert torch.equal(scaled[1], plain[1] * 4096)


def test_repeats_agree_bit_for_bit(device):
    layer = Layer.of(Guarded(device), Clusters(device, [30, 0, 12]), (TILE_O + 1, TILE_I + 1))
    first, second = (layer.run(9) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_empty_weight(device):
    layer = Layer.of(Guarded(device), Clusters(device, [2, 1]), (4, 0))
    assert [t.shape for t in layer.run(9)] == [(4, 0), (4, 0)]


def test_wrong_inputs_are_named(device):
    layer = Layer.of(Guarded(device), Clusters(device, [2, 1]), (4, 5))
    dy, x, queue = layer.dy, layer.x, layer.queue
    for wrong in (dy[:2], dy.half(), dy.T.contiguous().T):
        layer.dy = wrong
        with pytest.raises(ValueError, match=r"dy \(R, O\) and x \(R, I\) must have"):
            layer.run(9)
    layer.dy, layer.queue = dy, queue[:, 1:]
    with pytest.raises(ValueError, match=r"queues\[0\] must have shape \(5, 20\)"):
        layer.run(9)
    ends = torch.tensor([0, 2, 3], device=device)
    vectors = layer.clusters.vectors() | {"mixture": torch.ones(3, device=device)}
    with pytest.raises(ValueError, match="mixture must be contiguous float64 of shape"):
        cluster_weight_grad(dy, x, ends, queue, torch.tensor(9, device=device), rho=3.0, **vectors)
    with pytest.raises(ValueError, match="offsets must be"):
        cluster_weight_grad(dy, x, ends.int(), queue, ends[0], rho=3.0, **vectors)
