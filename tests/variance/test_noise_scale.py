# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
# pyright: reportAttributeAccessIssue=false, reportFunctionMemberAccess=false
"""The noise meter's figures against gradients of single samples, and what it leaves untouched."""

import copy
import math

import pytest
import torch
from cluster_cases import MLP
from noise_cases import CASES, Planted, by_sample, draws, losses_of
from torch import nn
from torch.nn.functional import cross_entropy

from gq_triton.variance import NoiseScale, steps_ratio
from gq_triton.variance.noise.window import ratio

F64 = torch.float64


@pytest.mark.parametrize(
    ("case", "halves"), [*((case, False) for case in CASES), ("mlp", True), ("convolutions", True)]
)
def test_groups_of_one_sample_give_the_variance_of_the_samples(case, halves):
    kind, make_batch = CASES[case]
    torch.manual_seed(0)
    model = kind().to(F64)
    twin, batch = copy.deepcopy(model), make_batch()
    meter = NoiseScale(model, 1, clusters=9, features="features" if halves else None)
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4])
    if halves:
        meter._clusters._own = lambda features: labels
    losses_of(model, batch).mean().backward()
    expected = by_sample(twin, losses_of(twin, batch))
    losses_of(twin, batch).mean().backward()
    assert meter.per_layer.keys() == expected.keys()
    for name, grads in expected.items():
        variance = grads.var(dim=0).sum()
        found = meter.per_layer[name]
        assert found.variance == pytest.approx(float(variance), rel=1e-9)
        signal = grads.mean(dim=0).square().sum() - variance / 9
        assert found.signal == pytest.approx(float(signal), rel=1e-9, abs=1e-15)
        if halves:
            means = torch.stack([grads[labels == k].mean(dim=0) for k in range(5)])
            sizes = torch.tensor([2, 2, 2, 2, 1], dtype=F64)
            between = (sizes * (means - grads.mean(dim=0)).square().sum(dim=1)).sum() / 4
            within = torch.stack([grads[labels == k].var(dim=0).sum() for k in range(4)]).mean()
            ratio = float(between / within)
            assert found.between_to_within.value == pytest.approx(ratio, rel=1e-9)
        torch.testing.assert_close(
            model.get_parameter(name).grad, twin.get_parameter(name).grad, rtol=1e-10, atol=1e-13
        )
    total = sum(float(grads.var(dim=0).sum()) for grads in expected.values())
    assert meter.history[0]["variance"] == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("features", [None, "describe"])
def test_planted_gaussian_gradients(features):
    model = Planted().to(F64)
    meter = NoiseScale(model, 1, clusters=6, features=features, window=100)
    for seed in range(100):
        z = draws(24, seed)
        model.zero_grad()
        model(z, z[:, :2]).mean().backward()
    report = meter.report()
    # tr S = 30 * 4, |G|**2 = 30.
    assert report.total.variance == pytest.approx(120, rel=0.05)
    assert report.total.signal == pytest.approx(30, rel=0.05)
    low, high = meter.interval[1:]
    assert low < 4 < high < 1.3 * low
    assert meter.noise_scale == pytest.approx(4, rel=0.1)
    assert report.total.signal_to_noise == pytest.approx(24 / 4, rel=0.1)
    assert report.critical_batch.value == 2.4 * meter.noise_scale
    assert len(report.group_norms) == 6


def test_the_interval_covers_the_truth_in_19_of_20_cases():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(400):
        # Variances around 4 and signals around 1, the latter as noisy as those of small batches.
        top = 4 * torch.randn(25, 12, generator=generator, dtype=F64).square().mean(dim=1)
        bottom = 1 + torch.randn(25, generator=generator, dtype=F64)
        found = ratio(top, bottom)
        covered += found.low <= 4 <= found.high
    assert 0.90 <= covered / 400 <= 0.98


def test_ratios_at_the_edges():
    one, none = torch.ones(5, dtype=F64), torch.zeros(5, dtype=F64)
    assert ratio(2 * one, one) == (2, 2, 2)
    assert ratio(none, one) == (0, 0, 0)
    assert ratio(-1e-20 * one, one)[:2] == (0, 0)
    assert ratio(one, none) == (math.inf, 0, math.inf)
    assert ratio(one, -one) == (math.inf, 0, math.inf)
    assert ratio(one[:2], one[:2]) == (1, 0, math.inf)
    assert all(map(math.isnan, ratio(one[:0], one[:0])))


def test_identical_samples_have_no_noise():
    model = Planted()
    meter = NoiseScale(model, 1)
    for seed in range(5):
        model(draws(1, seed).float().expand(32, 30)).mean().backward()
    assert 0 <= meter.noise_scale < 1e-9


def test_noise_without_signal_has_an_infinite_scale():
    model = Planted().to(F64)
    meter = NoiseScale(model, 1)
    z = draws(32, 0)
    model(torch.cat([z, -z])).mean().backward()
    assert meter.noise_scale == math.inf
    assert meter.report().steps_ratio(128, 64).value == 0.5
    assert "inf" in str(meter.report())


def test_clusters_that_tell_nothing_have_f_1_and_others_more():
    found = {}
    for kind in ("told", "permuted"):
        model = Planted().to(F64)
        meter = NoiseScale(model, 1, clusters=4, features="describe", window=80)
        for seed in range(80):
            generator = torch.Generator().manual_seed(seed)
            source = torch.randint(4, (40,), generator=generator)
            z = draws(40, seed) + 0.5 * source[:, None]
            if kind == "permuted":
                source = source[torch.randperm(40, generator=generator)]
            model.zero_grad()
            model(z, nn.functional.one_hot(source, 4).to(F64)).mean().backward()
        found[kind] = meter.report().total
        # The variance of a sample is that of its source and that within: 30 * (4 + .25 * 1.25).
        assert found[kind].variance == pytest.approx(30 * (4 + 0.25 * 1.25), rel=0.05)
    assert found["permuted"].between_to_within.value == pytest.approx(1, abs=0.1)
    # 1 + n_k * .25 * 1.25 * (4 / 3) / 4 with n_k = 10
    assert found["told"].between_to_within.value == pytest.approx(1 + 10 / 9.6, rel=0.1)


def test_a_noisy_quadratic_has_the_critical_batch_that_is_measured():
    """A step of the best length from B samples gains half of what one without noise does."""
    theta, noise = torch.full((30,), 0.5, dtype=F64), 2.0
    model = Planted().to(F64)
    meter = NoiseScale(model, 1, window=100)
    for seed in range(100):
        model.zero_grad()
        # The gradient of .5 |theta|**2 plus noise.
        model(draws(64, seed, noise=noise) - 1 + theta).mean().backward()
    critical = noise**2 / 0.5**2
    assert meter.noise_scale == pytest.approx(critical, rel=0.1)
    size = round(meter.noise_scale)
    rate = 1 / (1 + critical / size)
    gains = [
        0.5 * (theta.square().sum() - (theta - rate * (theta + step)).square().sum())
        for step in (draws(size, seed, noise=noise).mean(dim=0) - 1 for seed in range(400))
    ]
    assert float(torch.stack(gains).mean() / (0.25 * theta.square().sum())) == pytest.approx(
        1, rel=0.1
    )


def test_lag_share_of_noise_alone_is_1_and_of_a_turning_gradient_far_less():
    for kind in (lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.8),
                 lambda p: torch.optim.AdamW(p, lr=0.0, betas=(0.8, 0.999))):  # fmt: skip
        for turn in (0.0, 1.0):
            model = Planted().to(F64)
            optimizer = kind(model.parameters())
            meter = NoiseScale(model, 1, optimizer=optimizer, window=50)
            for seed in range(50):
                optimizer.zero_grad()
                model(draws(16, seed) + turn * (seed % 10)).mean().backward()
                optimizer.step()
            share = meter.report().total.lag_share
            if turn:
                assert share.value < 0.2
            else:
                assert share.value == pytest.approx(1, rel=0.25)


def test_training_is_the_same_bit_for_bit_between_measurements():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 3))
    twin = copy.deepcopy(model)
    meter = NoiseScale(model, every=3)
    states = {}
    for module in (model, twin):
        torch.manual_seed(1)
        states[module] = []
        for _ in range(9):
            module.zero_grad()
            cross_entropy(module(torch.randn(8, 6)), torch.randint(3, (8,))).backward()
            states[module].append([p.grad.clone() for p in module.parameters()])
        states[module].append([torch.get_rng_state()])
    for step, (ours, plain) in enumerate(zip(states[model], states[twin], strict=True), 1):
        for a, b in zip(ours, plain, strict=True):
            if step % 3:
                assert torch.equal(a, b), step
            else:
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert [row["step"] for row in meter.history] == [3, 6, 9]


def test_between_measurements_nothing_hangs_on_the_parameters():
    model = MLP()
    NoiseScale(model, every=2)
    meter = NoiseScale(MLP(), every=2)
    del meter
    kept = NoiseScale(model := MLP(), every=2)
    for step in range(1, 5):
        losses_of(model, torch.randn(8, 6)).mean().backward()
        hooks = [p for p in model.parameters() if p._backward_hooks]
        assert not hooks, step
    assert len(kept.history) == 2


def test_every_option_that_cannot_hold_is_refused():
    model = MLP()
    frozen = MLP().requires_grad_(False)
    for arguments, words in [
        ({"every": 0}, "every must be an integer >= 1, got 0"),
        ({"every": True}, "every must be an integer"),
        ({"clusters": 2.5, "window": 0}, "clusters must be .* 2.5; window must be .* 0"),
        ({"seed": -1}, "seed must be an integer >= 0"),
        ({"features": "nowhere"}, "features='nowhere' is no submodule"),
        ({"optimizer": torch.optim.SGD(nn.Linear(2, 2).parameters())}, "none of the optimizer's"),
    ]:
        with pytest.raises(ValueError, match=words):
            NoiseScale(model, **arguments)
    with pytest.raises(ValueError, match="has none"):
        NoiseScale(frozen)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got str"):
        NoiseScale("model")
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer, got float"):
        NoiseScale(model, optimizer=0.1)
    for old, new in ((0, 8), (8, math.inf), (8, True)):
        with pytest.raises(ValueError, match="must be a number of samples > 0"):
            steps_ratio(10.0, old, new)
    with pytest.raises(ValueError, match="critical_batch must be >= 0"):
        steps_ratio(math.nan, 8, 16)
    meter = NoiseScale(model, 1, clusters=1)
    with pytest.raises(RuntimeError, match="give clusters=2 or more"):
        model(torch.randn(8, 6))
    meter.remove()
    assert model(torch.randn(8, 6)) is not None


def test_two_meters_do_not_share_a_model():
    model = MLP()
    meter = NoiseScale(model)
    with pytest.raises(ValueError, match=r"another NoiseScale measures .* call remove\(\)"):
        NoiseScale(model)
    meter.remove()
    meter.remove()
    NoiseScale(model).remove()
