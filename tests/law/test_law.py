"""The law, the oracle and the effective length against the paper's statements and its numbers.

The lemmas, which need a whole trajectory of an optimizer, are in test_lemmas.py.
"""

import itertools
import math
import re
from pathlib import Path

import pytest
import torch

from gq_triton import GQSGD, reference, scarcity_weight
from gq_triton.queues import losses as history

LAWS = {"public": scarcity_weight, "oracle": reference.scarcity_weight}


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture(params=LAWS)
def law(request):
    return LAWS[request.param]


def weight(law, grad, queue, rho=3.0):
    """Return the weight of one number against a list of numbers, in float64."""
    column = torch.tensor(queue, dtype=torch.float64).reshape(-1, 1)
    return law(torch.tensor([grad], dtype=torch.float64), column, rho=rho).item()


@pytest.mark.parametrize("rho", [1.0, 1.5, 3.0, 10.0])
def test_tgq01_clip_form_equals_the_piecewise_form_of_equation_1(law, rho):
    grad, queue = randn(5000), randn(5, 5000, seed=1)
    z = (grad - queue.mean(0)).abs() / queue.std(0, correction=0)
    piecewise = torch.where(
        z > 1, z.clamp(max=rho), torch.maximum(z, torch.tensor(1 / rho, dtype=torch.float64))
    )
    torch.testing.assert_close(law(grad, queue, rho=rho), piecewise, rtol=1e-11, atol=0)
    assert (z > rho).any()
    assert (z < 1 / rho).any()


def test_tgq03_lemma_3_2_gives_phi_for_every_length(law):
    """For one C among L-1 copies of u, z(u) = 1/sqrt(L-1) with the POPULATION deviation."""
    for length in range(2, 41):
        queue = [1.0] * (length - 1) + [-6.0]
        phi = max(1 / math.sqrt(length - 1), 1 / 3)
        assert weight(law, 1.0, queue) == pytest.approx(phi, rel=1e-13)
        sample = 1 / math.sqrt(length)
        assert length >= 10 or abs(phi - sample) > 0.01, "ddof=1 would give another phi"


def test_tgq03_phi_is_below_1_from_length_3_and_1_over_rho_from_length_10(law):
    phi = {n: weight(law, 1.0, [1.0] * (n - 1) + [-6.0]) for n in range(2, 12)}
    assert phi[2] == pytest.approx(1.0, rel=1e-15)
    assert all(phi[n] < 1 for n in range(3, 12))
    assert phi[9] > 1 / 3 + 0.01
    assert phi[10] == pytest.approx(1 / 3, rel=1e-15)


def test_tgq03_z_of_c_in_a_queue_that_holds_it_is_the_root_of_l_minus_1(law):
    for length in range(2, 41):
        queue = [1.0] * (length - 1) + [-6.0]
        expected = max(math.sqrt(length - 1), 1.0)
        assert weight(law, -6.0, queue, rho=100.0) == pytest.approx(expected, rel=1e-13)


def test_tgq08_zeta_balances_the_batch_and_the_papers_sign_is_wrong_below_zero():
    """With rho = zeta the weighted batch mean equals the mean of the sparse samples."""

    def paper(a, b, q, p):
        batch = q + p
        return (batch * a + math.sqrt(batch**2 * a * a - 4 * q * p * a * b)) / (2 * q * a)

    def sign_safe(a, b, q, p):
        batch = q + p
        return (batch + math.sqrt(batch**2 - 4 * p * q * b / a)) / (2 * q)

    q, p = 5, 95
    for a, b in ((-1.0, 0.25), (2.0, -3.0), (1.0, 0.5), (-4.0, -1.0)):
        zeta = sign_safe(a, b, q, p)
        residual = q * zeta**2 * a - zeta * (q + p) * a + p * b
        assert abs(residual) < 1e-11 * (q + p) ** 2
        centroids = torch.tensor([[a], [b]], dtype=torch.float64)
        queue = torch.full((5, 1), b, dtype=torch.float64)
        balanced = reference.cluster_gradient(centroids, [q, p], queue, rho=zeta)
        assert balanced.item() == pytest.approx(a, rel=1e-12)
        assert a < 0 or paper(a, b, q, p) == pytest.approx(zeta, rel=1e-12)
        assert a * b > 0 or zeta > (q + p) / q
    assert sign_safe(-1.0, 0.25, q, p) == pytest.approx(20.235, abs=1e-3)
    assert paper(-1.0, 0.25, q, p) == pytest.approx(-0.235, abs=1e-3)


def test_tgq09_both_kinds_saturate_exactly_below_a_share_of_1_over_1_plus_rho_squared(law):
    """Assumption 3.2 for a two-point signal: shares around 0.1 at rho = 3."""
    for sparse, slots in ((1, 12), (9, 100), (1, 9), (11, 100), (2, 10)):
        share = sparse / slots
        queue = [1.0] * (slots - sparse) + [-6.0] * sparse
        z_q, z_p = math.sqrt((1 - share) / share), math.sqrt(share / (1 - share))
        w_q, w_p = weight(law, -6.0, queue), weight(law, 1.0, queue)
        assert w_q == pytest.approx(min(max(z_q, 1 / 3), 3.0), rel=1e-12)
        assert w_p == pytest.approx(min(max(z_p, 1 / 3), 3.0), rel=1e-12)
        saturated = w_q == 3.0 and w_p == 1 / 3
        assert saturated == (share < 1 / (1 + 3.0**2))
        if saturated:
            assert w_q * -6.0 / (w_p * 1.0) == pytest.approx(9 * -6.0, rel=1e-12)


def test_assumption_3_2_as_printed_admits_a_gradient_that_is_not_unusual(law):
    """The paper has |E g_q| > |mu + rho*sigma|; mu=-1, sigma=1, g=-2.5 satisfies that."""
    mu, sigma, rho, grad = -1.0, 1.0, 3.0, -2.5
    assert abs(grad) > abs(mu + rho * sigma)
    assert weight(law, grad, [mu - sigma, mu + sigma]) == pytest.approx(1.5)


def test_algorithm_1_as_printed_has_a_sigma_of_zero(law):
    """The printed sum of (g_i - mu) over L vanishes: every weight would be 0/0, rho or 1/rho."""
    queue = randn(5, 1000)
    printed = (queue - queue.mean(0)).sum(0) / len(queue)
    assert printed.abs().max() < 1e-15
    weights = law(randn(1000, seed=1), queue)
    assert ((weights > 1 / 3) & (weights < 3)).double().mean() > 0.5


def test_tgq10_a_linear_drift_has_the_same_weight_for_every_slope(law):
    golden = {3: 2.449, 4: 2.236, 5: 2.121}
    for length in range(2, 13):
        expected = math.sqrt(3 * (length + 1) / (length - 1))
        assert length not in golden or expected == pytest.approx(golden[length], abs=5e-4)
        for intercept, slope in ((0.0, 1.0), (5.0, -0.25), (-3.0, 1e-3), (0.125, 4e6)):
            queue = [intercept + slope * t for t in range(length)]
            drifting = weight(law, intercept + slope * length, queue, rho=10.0)
            assert drifting == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1, 2, 3, 5, 7, 12])
def test_tgq11_a_constant_queue_is_constant(law, dtype, length):
    """The plain formula fails: for L=7 and u=0.1 in float32, sigma = |u - mu| > 0 and w = 1."""
    values = torch.tensor([0.1, -0.3, 1e-20, 7e5, 0.0], dtype=torch.float64)
    u = values.to(dtype)
    queue = u.expand(length, -1).clone()
    low, high = torch.tensor(1 / 3), torch.tensor(3.0)
    torch.testing.assert_close(law(u, queue), low.expand(5).to(law(u, queue)), rtol=0, atol=1e-7)
    weights = law(torch.nextafter(u, torch.full_like(u, math.inf)), queue)
    torch.testing.assert_close(weights, high.expand(5).to(weights), rtol=0, atol=0)


def test_tgq11_the_plain_formula_fails_in_float32():
    u = torch.tensor(0.1)
    queue = u.expand(7).clone()
    mu = queue.mean()
    assert queue.std(correction=0) == (u - mu).abs() > 0, "z = 1 instead of 0"
    assert queue.square().mean() - mu * mu < 0, "the one-pass variance is even negative"
    assert scarcity_weight(u.reshape(1), queue.reshape(7, 1)).item() == pytest.approx(1 / 3)


@pytest.mark.parametrize("scale", [2.0**-90, 2.0**60, 0.37, -1.0, -5e3])
def test_tgq12_scale_invariance_and_sign(law, scale):
    grad, queue = randn(1000), randn(5, 1000, seed=1)
    torch.testing.assert_close(
        law(scale * grad, scale * queue), law(grad, queue), rtol=1e-12, atol=0
    )


def test_tgq12_the_order_of_the_queue_does_not_matter(law):
    grad, queue = randn(200), randn(4, 200, seed=1)
    expected = law(grad, queue)
    for order in itertools.permutations(range(4)):
        torch.testing.assert_close(law(grad, queue[list(order)]), expected, rtol=1e-12, atol=0)


def test_tgq13_one_cluster_equals_no_clusters():
    grad, queue = randn(3, 7), randn(5, 3, 7, seed=1)
    alone = reference.cluster_gradient(grad[None], [64], queue)
    assert torch.equal(alone, reference.weighted_gradient(grad, queue))
    warm_up = reference.cluster_gradient(grad[None], [64], None)
    assert torch.equal(warm_up, grad)


def test_tgq13_unweighted_clusters_sum_to_the_batch_mean_and_empty_ones_to_nothing():
    samples, queue = randn(12, 6), randn(5, 6, seed=1)
    parts = samples[:1], samples[1:5], samples[5:]
    sizes = [len(part) for part in parts]
    centroids = torch.stack([part.mean(0) for part in parts])
    batch = samples.mean(0)
    torch.testing.assert_close(
        reference.cluster_gradient(centroids, sizes, None), batch, rtol=1e-13, atol=1e-15
    )
    torch.testing.assert_close(
        reference.cluster_gradient(centroids, sizes, queue, rho=1.0), batch, rtol=1e-13, atol=1e-15
    )
    weighted = reference.cluster_gradient(centroids, sizes, queue)
    by_hand = sum(
        n / 12 * reference.scarcity_weight(c, queue) * c
        for n, c in zip(sizes, centroids, strict=True)
    )
    torch.testing.assert_close(weighted, by_hand, rtol=1e-13, atol=1e-15)
    empty = torch.cat([torch.full((1, 6), math.nan, dtype=torch.float64), centroids])
    assert torch.equal(reference.cluster_gradient(empty, [0, *sizes], queue), weighted)


def test_cluster_options_at_their_limits():
    centroids, queue = randn(3, 6), randn(5, 6, seed=1)
    equal = reference.cluster_gradient(centroids, [1, 4, 7], None, population_power=0.0)
    torch.testing.assert_close(equal, centroids.mean(0))
    whole = reference.cluster_gradient(centroids[:1], [12], queue, centroid_scale="standard_error")
    assert torch.equal(whole, reference.weighted_gradient(centroids[0], queue))
    small = reference.scarcity_weight(centroids[0], queue, rho=9.0, sigma_scale=2.0)
    plain = reference.scarcity_weight(centroids[0], queue, rho=9.0)
    torch.testing.assert_close(small, (plain / 2).clamp(1 / 9, 9), rtol=1e-12, atol=0)


def gaussian_moments(length, rho=3.0):
    """Return E[w] and E[(w g)^2] / E[g^2] for i.i.d. standard normal gradients, by quadrature.

    No code of the law is used: mu, sigma and g are independent, and L sigma^2 is chi-squared.
    """
    half = (length - 1) / 2
    sigma = 6 * (torch.arange(600, dtype=torch.float64) + 0.5) / 600
    density = sigma ** (length - 2) * torch.exp(-length * sigma.square() / 2)
    density = density * 2 * (length / 2) ** half / math.gamma(half) * 6 / 600
    x = torch.linspace(-9, 9, 2001, dtype=torch.float64)  # g - mu, of variance 1 + 1/L
    spread = 1 + 1 / length
    normal = torch.exp(-x.square() / (2 * spread)) / math.sqrt(2 * math.pi * spread)
    normal = normal * (x[1] - x[0])
    w = (x.abs() / sigma[:, None]).clamp(1 / rho, rho)
    # g | (g - mu) = x is normal with mean x / spread and variance 1 - 1 / spread.
    square = x.square() / spread**2 + 1 - 1 / spread
    mean = (density[:, None] * normal * w).sum()
    return mean.item(), (density[:, None] * normal * w.square() * square).sum().item()


@pytest.mark.parametrize(
    ("length", "mean", "square"),
    [
        (3, 1.4220, 5.142),
        (4, 1.2547, 4.661),
        (5, 1.1601, 4.355),
        (10, 0.9871, 3.686),
        (50, 0.8678, 3.091),
    ],
)
def test_tgq16_gaussian_noise_has_the_mean_weight_of_the_table(law, length, mean, square):
    exact = gaussian_moments(length)
    assert exact == pytest.approx((mean, square), abs=1e-3)
    n = 50_000
    grad, queue = randn(n, seed=length), randn(length, n, seed=length + 100)
    weights = law(grad, queue)
    squares = (weights * grad).square()
    assert abs(weights.mean() - exact[0]) < 3 * weights.std() / math.sqrt(n)
    assert abs(squares.mean() - exact[1]) < 3 * squares.std() / math.sqrt(n)


def test_symmetric_noise_leaves_the_direction_of_the_mean(law):
    """E[w g] = E[w] E[g]: only the length of the step changes."""
    n, mean = 200_000, 0.5
    grad, queue = randn(n) + mean, randn(5, n, seed=1) + mean
    weights = law(grad, queue)
    excess = weights * (grad - mean)
    assert abs(excess.mean()) < 3 * excess.std() / math.sqrt(n)


@pytest.mark.parametrize(
    ("share", "plain", "weighted"),
    [(0.02, 0.78, -0.2366), (0.05, 0.45, -1.0181), (0.08, 0.12, -1.7154)],
)
def test_skewed_sparse_noise_turns_the_mean_around(law, share, plain, weighted):
    """The estimator is biased for u = 1, C = -10, L = 5: all queues are enumerated exactly."""
    values = [1.0, -10.0]
    chance = {1.0: 1 - share, -10.0: share}
    total = 0.0
    for signal in itertools.product(values, repeat=6):
        probability = math.prod(chance[v] for v in signal)
        total += probability * weight(law, signal[0], signal[1:]) * signal[0]
    assert sum(v * chance[v] for v in values) == pytest.approx(plain, abs=1e-9)
    assert total == pytest.approx(weighted, abs=1e-4)


def test_tgq17_a_queue_that_holds_the_gradient_cannot_reach_rho_before_length_10(law):
    """Samuelson: no member of n numbers is further than sqrt(n-1) deviations from their mean."""
    for n in range(2, 15):
        queue = randn(n, 5_000, seed=n)
        inclusive = law(queue[0], queue, rho=100.0)
        assert inclusive.max() <= math.sqrt(n - 1) * (1 + 1e-12)
        outlier = weight(law, -6.0, [-6.0] + [1.0] * (n - 1), rho=100.0)
        assert outlier == pytest.approx(math.sqrt(n - 1), rel=1e-13)
        assert (weight(law, -6.0, [-6.0] + [1.0] * (n - 1)) > 3 - 1e-9) == (n >= 10)
    assert weight(law, -6.0, [1.0, 1.0, -6.0, 1.0, 1.0]) == pytest.approx(2.0)


EFFECTIVE_LENGTHS = {
    "oracle": reference.effective_length,
    "device": lambda losses, *bounds: int(
        history.effective_length(torch.tensor(losses, dtype=torch.float64), *bounds)
    ),
}


@pytest.mark.parametrize("which", EFFECTIVE_LENGTHS)
@pytest.mark.parametrize(
    ("losses", "window", "bounds", "expected"),
    [
        pytest.param([1, 2, 3, 4, 5, 0], 2, (3, 5), 4, id="golden"),
        pytest.param([1.0] * 8, 3, (3, 5), 3, id="flat"),
        pytest.param([5, 4, 3, 2, 1, 0], 2, (3, 5), 3, id="rising-now"),
        pytest.param([0, 1, 2, 3, 4, 5, 6, 7], 3, (3, 5), 5, id="long-fall"),
        pytest.param([0, 1, 2, 3, 4, 5, 6, 7], 3, (3, 9), 6, id="as-far-as-recorded"),
        pytest.param([1, 2, 3, math.nan, 5, 6, 7], 2, (1, 9), 2, id="nan-ends-it"),
        pytest.param([1, 2, 3, 4, math.inf, 6, 7], 2, (1, 9), 3, id="inf-ends-it"),
        pytest.param([math.nan] * 7, 3, (3, 5), 3, id="nothing-recorded"),
        pytest.param([1, 2, 3], 1, (1, 1), 1, id="one"),
    ],
)
def test_tgq19_effective_length_goldens(which, losses, window, bounds, expected):
    assert EFFECTIVE_LENGTHS[which](losses, window, *bounds) == expected


def test_tgq19_effective_length_on_the_device_equals_the_oracle():
    generator = torch.Generator().manual_seed(0)
    for _ in range(500):
        window, longest = (int(torch.randint(1, 6, (), generator=generator)) for _ in range(2))
        shortest = int(torch.randint(1, longest + 1, (), generator=generator))
        falling = torch.rand(longest + window - 1, generator=generator).double().cumsum(0)
        losses = falling + 0.5 * torch.rand(falling.shape, generator=generator).double()
        if torch.rand((), generator=generator) < 0.3:
            losses[int(torch.randint(len(losses), (), generator=generator))] = math.nan
        expected = reference.effective_length(losses.tolist(), window, shortest, longest)
        assert int(history.effective_length(losses, window, shortest, longest)) == expected


def test_tgq19_a_recorded_loss_is_the_newest():
    losses = history.new_losses(2, 5, torch.device("cpu"))
    assert losses.shape == (6,)
    assert losses.isnan().all()
    for loss in (0, 5, 4, 3, 2, 1):
        losses = history.record_loss(losses, loss)
    assert losses.tolist() == [1, 2, 3, 4, 5, 0]
    assert int(history.effective_length(losses, 2, 3, 5)) == 4


def test_tgq20_case_1_has_the_limit_q_over_b_and_not_1():
    """The frequent samples' gradient vanishes; the batch mean is (q/B) E_q, the paper says E_q."""
    q, batch = 5, 100
    sparse = torch.tensor([2.0, -3.0], dtype=torch.float64)
    for frequent in (1.0, 1e-3, 1e-9, 0.0):
        centroids = torch.stack([sparse, torch.full((2,), frequent, dtype=torch.float64)])
        mean = reference.cluster_gradient(centroids, [q, batch - q], None)
        torch.testing.assert_close(
            mean - (1 - q / batch) * frequent, q / batch * sparse, rtol=1e-12, atol=1e-15
        )
    assert q / batch == 0.05


def test_every_test_named_in_the_method_exists():
    root = Path(__file__).resolve().parents[2]
    page = (root / "docs" / "method.md").read_text(encoding="utf-8")
    sources = "".join(f.read_text(encoding="utf-8") for f in (root / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", page))
    assert len(named) > 30
    assert named <= set(re.findall(r"^def (test_\w+)", sources, flags=re.MULTILINE))


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_a_gradient_beyond_the_queues_range_saturates(backend):
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = GQSGD([param], lr=1.0, queue_length=3, queue_dtype=torch.float16, backend=backend)
    ring = reference.Ring(3)
    for step in range(9):
        param.grad = torch.tensor([1e5, 1.0, -1e6]) * (1 + step % 3)
        before, raw = param.detach().clone(), param.grad.clone()
        weighted = reference.weighted_gradient(raw, ring.newest())
        ring.push(raw, torch.float16)
        optimizer.step()
        torch.testing.assert_close(before.double() - weighted, param.double(), rtol=1e-5, atol=0.0)
        assert torch.isfinite(optimizer.state[param]["queue"]).all()
