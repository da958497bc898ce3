"""How many samples are scored and drawn, with which weights, and when that pays."""

import pytest
import torch

from gq_triton.sampling.presample import Plan, Smoothing, draw, plan, threshold, weights_of
from gq_triton.sampling.ranks import shard, stream

SCORES = torch.tensor([1.0, 1.0, 1.0, 5.0], dtype=torch.float64)
ALL = torch.arange(4)


def test_tis02_golden_weights():
    torch.testing.assert_close(weights_of(SCORES, ALL).tolist(), [2.0, 2.0, 2.0, 0.4])


@pytest.mark.parametrize("k", [2, 3, 4, 5, 6])
def test_tis04_threshold_of_the_cost_model(k):
    assert threshold("constant_batch", 64, k) == pytest.approx(1 + k / 3, rel=1e-12)
    # drawing pays where B + 3b < 3 tau b
    tau = threshold("constant_batch", 64, k)
    assert k * 64 + 3 * 64 == pytest.approx(3 * tau * 64)
    assert plan("constant_batch", 64, k, 9.0) == Plan(k * 64, 64)


def test_tis11_constant_variance():
    assert threshold("constant_variance", 128, 3.0) == pytest.approx(1 / (2 / 3 - 0.2), rel=1e-12)
    assert threshold("constant_variance", 128, 3.0) == pytest.approx(2.142857, abs=1e-6)
    assert plan("constant_variance", 128, 3.0, 4.0) == Plan(128, int(0.45 * 128))
    assert plan("constant_variance", 128, 3.0, 1.0).trained == 128  # never more than are scored
    assert plan("constant_variance", 1, 3.0, 4.0).trained == 1


def test_tis11_constant_time():
    assert threshold("constant_time", 128, 3.0) == 2
    # t = 384, a = 32, B = int(128 + (288 - 128) / 2) = 208, a = int(176 / 3) = 58
    assert plan("constant_time", 128, 3.0, 4.0) == Plan(208, 58)
    for b in (1, 2, 10, 1000):
        for tau in (2.1, 5.0, 50.0):
            scored, trained = plan("constant_time", b, 3.0, tau)
            assert scored + 3 * trained <= max(3 * b, 4)  # the time of a uniform step
            assert min(scored, trained) >= 1


@pytest.mark.parametrize("power", [1.0, 0.5, 0.0, -2.0])
def test_tis10_biased_weights_keep_the_weighted_score(power):
    drawn = torch.tensor([0, 3, 3, 1])
    plain, biased = weights_of(SCORES, drawn), weights_of(SCORES, drawn, power)
    own = SCORES[drawn]
    assert float(biased @ own) == pytest.approx(float(plain @ own), rel=1e-12)
    # below 1 they lean towards the hard samples
    if power == 1:
        assert torch.equal(biased, plain)
    else:
        assert biased[1] / biased[0] > plain[1] / plain[0]


def test_tis09_the_weighted_gradient_is_unbiased():
    """All draws of one index, enumerated: also for scores that are not the norms, and smoothed."""
    gradients = torch.randn(4, 3, dtype=torch.float64)
    for smooth in (Smoothing(), Smoothing(0.5, 0.1, 0.2), Smoothing(0.0)):
        scores = smooth(SCORES, 2.0)
        share = scores / scores.sum()
        expected = sum(
            share[i] * weights_of(scores, torch.tensor([i])) * gradients[i] for i in range(4)
        )
        torch.testing.assert_close(expected, gradients.mean(0), rtol=1e-12, atol=1e-15)


def test_samples_are_drawn_as_often_as_their_scores_say():
    drawn = draw(SCORES, 80_000, stream("test"))
    counts = torch.bincount(drawn, minlength=4)
    expected = SCORES / SCORES.sum() * 80_000
    # chi-square with 3 degrees of freedom: above 16.3 once in a thousand seeds
    assert float(((counts - expected).square() / expected).sum()) < 16.3


def test_samples_without_a_score_are_never_drawn():
    scores = torch.tensor([0.0, 0.0, 1e-300, 0.0, 3.0, 0.0], dtype=torch.float64)
    assert draw(scores, 1000, stream("test")).unique().tolist() == [4]
    scores[4] = 1e-300
    assert draw(scores, 1000, stream("test")).unique().tolist() == [2, 4]


def test_zero_scores_fall_back_to_uniform():
    """The authors' code divides by their sum, 0."""
    zeros = torch.zeros(5, dtype=torch.float64)
    drawn = draw(zeros, 5000, stream("test"))
    assert torch.bincount(drawn, minlength=5).min() > 900
    assert weights_of(zeros, drawn, 0.5).unique().tolist() == [1.0]
    assert Smoothing(0.5, 1.0, 1.0)(zeros, 3.0) is zeros


def test_smoothing():
    scores = torch.tensor([0.0, 4.0, 9.0], dtype=torch.float64)
    assert Smoothing(0.5, 0.5, 0.25)(scores, 2.0).tolist() == [1.0, 3.0, 4.0]
    assert Smoothing()(scores, 2.0).tolist() == scores.tolist()


def test_parts_are_disjoint_and_streams_differ_by_name():
    parts = [shard(10, 3, rank, 0, "parts") for rank in range(3)]
    assert sorted(i for part in parts if part is not None for i in part.tolist()) == [*range(10)]
    assert shard(10, 1, 0, 0) is None
    numbers = {int(torch.randint(2**62, (), generator=stream(0, step))) for step in range(100)}
    assert len(numbers) == 100
    first, second = (torch.rand(3, generator=stream("a", 1)) for _ in range(2))
    assert torch.equal(first, second)
