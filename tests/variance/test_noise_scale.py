# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
# pyright: reportAttributeAccessIssue=false, reportFunctionMemberAccess=false
"""The noise meter: its figures against gradients of single samples, and the training it leaves."""

import copy
import gc
import io
import math
import re
import weakref

import pytest
import torch
from cluster_cases import GPT, MLP, ResNet
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from gq_triton import GradQueue
from gq_triton.grouping import Groups
from gq_triton.options import ClusterOptions
from gq_triton.variance import NoiseScale, steps_ratio
from gq_triton.variance.noise.sink import Squares
from gq_triton.variance.noise.window import ratio

F64 = torch.float64


class Planted(nn.Module):
    """A model whose sample has the gradient z, its input; u describes the sample."""

    def __init__(self, size=30):
        super().__init__()
        self.describe, self.head = nn.Identity(), nn.Linear(size, 1, bias=False)

    def forward(self, z, u=None):
        if u is not None:
            self.describe(u)
        return self.head(z)


def draws(batch, seed, size=30, noise=2.0):
    """Return samples whose gradients have mean 1 and variance 4 in every element."""
    generator = torch.Generator().manual_seed(seed)
    return 1 + noise * torch.randn(batch, size, generator=generator, dtype=F64)


def by_sample(model, losses):
    """Return gradients of single samples, by parameter name, ``(B, P)``."""
    named = dict(model.named_parameters())
    rows = [torch.autograd.grad(loss, list(named.values()), retain_graph=True) for loss in losses]
    return {
        name: torch.stack([row[place].flatten() for row in rows])
        for place, name in enumerate(named)
    }


CASES = {
    "mlp": (MLP, lambda: torch.randn(9, 6, dtype=F64)),
    "convolutions": (lambda: ResNet(lambda c: nn.GroupNorm(2, c)),
                     lambda: torch.randn(9, 2, 8, 8, dtype=F64)),
    "gpt, tied head": (lambda: GPT(norm=nn.RMSNorm), lambda: torch.randint(0, 9, (9, 5))),
    "run again": (lambda: nn.Sequential(nn.LSTM(4, 3, batch_first=True)),
                  lambda: torch.randn(9, 5, 4, dtype=F64)),
}  # fmt: skip


def losses_of(model, batch):
    out = model(batch)
    out = out[0] if isinstance(out, tuple) else out
    return (out - 1).square().flatten(1).mean(dim=1)


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


def clustered(model, **options):
    queue = GradQueue(model, n_clusters=3, features="features", queue_length=3, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return queue, optimizer, queue.attach(optimizer)


@pytest.mark.parametrize("kind", [MLP, lambda: GPT(norm=nn.RMSNorm)])
def test_a_meter_listens_to_the_clusters_of_a_grad_queue(kind):
    """Training is that without a meter; the variance is that of single samples in clusters of 2."""
    torch.manual_seed(0)
    model = kind().to(F64)
    twin = copy.deepcopy(model)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    options = {"clusterer": lambda features: labels, "backend": "torch", "population_power": 0.5}
    queue, optimizer, _ = clustered(model, **options)
    _, plain, _ = clustered(twin, **options)
    meter = NoiseScale(model, every=2)
    for step in range(1, 7):
        batch = torch.randint(9, (6, 5)) if kind is not MLP else torch.randn(6, 6, dtype=F64)
        for module, steps in ((model, optimizer), (twin, plain)):
            steps.zero_grad()
            losses_of(module, batch).mean().backward()
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)
        assert torch.equal(queue.labels_, labels)
        if step % 2 == 0:
            bare = kind().to(F64)
            bare.load_state_dict(twin.state_dict())
            variance = sum(
                float(rows.var(dim=0).sum())
                for rows in by_sample(bare, losses_of(bare, batch)).values()
            )
            assert meter.history[-1]["variance"] == pytest.approx(variance, rel=1e-9)
        optimizer.step()
        plain.step()
    assert [row["step"] for row in meter.history] == [2, 4, 6]
    assert meter.report().total.between_to_within.value > 0
    assert queue.metrics()["cluster_sizes"] == [2, 2, 2]


def test_a_meter_on_a_grad_queue_says_what_it_does_not_take():
    model = MLP()
    queue, optimizer, handle = clustered(model)
    for options, words in [({"features": "features"}, "leave features out"),
                           ({"optimizer": optimizer}, "leave optimizer out")]:  # fmt: skip
        with pytest.raises(ValueError, match=f"attached to the model; {words}"):
            NoiseScale(model, **options)
    meter = NoiseScale(model, every=1)
    handle.remove()
    with pytest.raises(RuntimeError, match=r"build the NoiseScale after attach\(\)"):
        model(torch.randn(6, 6))
    meter.remove()
    own = NoiseScale(model, every=1)
    queue.attach(optimizer)
    with pytest.raises(RuntimeError, match=r"build the NoiseScale after attach\(\)"):
        model(torch.randn(6, 6))
    own.remove()


def test_it_stands_beside_a_grad_queue_without_clusters():
    model = MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    GradQueue(model, queue_length=3, backend="torch").attach(optimizer)
    meter = NoiseScale(model, every=1)
    for _ in range(5):
        optimizer.zero_grad()
        losses_of(model, torch.randn(8, 6)).mean().backward()
        optimizer.step()
    assert meter.report().steps == 5


def test_nothing_stays_on_the_model():
    model = MLP()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    meter = NoiseScale(model, every=1)
    losses_of(model, torch.randn(8, 6)).mean().backward()
    alive = weakref.ref(meter)
    copied = copy.deepcopy(model)
    torch.save(model, io.BytesIO())
    losses_of(copied, torch.randn(8, 6)).mean().backward()
    assert len(meter.history) == 1
    del meter
    gc.collect()
    assert alive() is None
    for module in (model, copied):
        assert {name: set(vars(part)) for name, part in module.named_modules()} == before
        assert not any(part._forward_pre_hooks or part._forward_hooks for part in module.modules())
        assert not any(p._backward_hooks for p in module.parameters())


def test_saved_and_loaded_it_measures_the_same():
    def train(meter, steps):
        for seed in steps:
            z = draws(16, seed)
            meter._model.zero_grad()
            meter._model(z, z[:, :3]).mean().backward()

    for features in (None, "describe"):
        options = {"every": 2, "clusters": 4, "features": features, "window": 4}
        whole = NoiseScale(Planted().to(F64), **options)
        train(whole, range(15))
        first = NoiseScale(Planted().to(F64), **options)
        train(first, range(7))
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second = NoiseScale(Planted().to(F64), **options)
        second.load_state_dict(torch.load(file))
        train(second, range(7, 15))
        assert str(second.report()) == str(whole.report())
        assert second.history == whole.history
        assert second.step == 15


def test_a_state_of_something_else_changes_nothing():
    meter = NoiseScale(Planted().to(F64), every=1)
    meter._model(draws(16, 0)).mean().backward()
    good, before = meter.state_dict(), str(meter.report())
    for key, value in {"names": ["other"], "step": -1, "measured": [{}], "rows": [[1, 2]],
                       "generator": torch.zeros(3)}.items():  # fmt: skip
        with pytest.raises(ValueError, match="the saved meter does not fit"):
            meter.load_state_dict({**good, key: value})
    with pytest.raises(ValueError, match="the saved meter does not fit"):
        meter.load_state_dict({})
    assert str(meter.report()) == before


def test_figures_before_anything_was_measured():
    meter = NoiseScale(MLP())
    assert math.isnan(meter.noise_scale)
    assert meter.per_layer == {}
    assert meter.history == []
    assert str(meter.report()) == "nothing was measured yet"
    assert math.isnan(meter.report().steps_ratio(64, 32).value)


def test_evaluation_and_a_batch_of_one_are_not_measured():
    model = Planted().to(F64)
    meter = NoiseScale(model, every=1)
    with torch.no_grad():
        model(draws(8, 0))
    assert meter.step == 0
    model(draws(1, 0)).mean().backward()
    assert math.isnan(meter.noise_scale)
    model(draws(2, 0)).mean().backward()
    assert not math.isnan(meter.noise_scale)
    assert meter.report().steps == 1
    for seed in range(100):
        model(draws(4, seed)).mean().backward()
    assert [row["step"] for row in meter.history] == list(range(2, 103))


def test_a_step_that_overflows_is_left_out():
    model = Planted()
    meter = NoiseScale(model, every=1)
    for scale in (1.0, torch.inf, 1.0):
        model.zero_grad()
        (model(draws(8, 0).float()) * scale).mean().backward()
    assert meter.report().steps == 2
    assert math.isfinite(meter.noise_scale)
    assert [row["step"] for row in meter.history] == [1, 3]


def test_accumulation_measures_one_pass_and_gradients_add_up():
    model, twin = Planted().to(F64), Planted().to(F64)
    twin.load_state_dict(model.state_dict())
    meter = NoiseScale(model, every=2)
    for seed in range(4):
        for module in (model, twin):
            (module(draws(8, seed)).mean() / 4).backward()
    torch.testing.assert_close(model.head.weight.grad, twin.head.weight.grad)
    assert meter.report().steps == 2


def test_a_second_backward_pass_has_its_gradient():
    model, twin = MLP().to(F64), MLP().to(F64)
    twin.load_state_dict(model.state_dict())
    meter = NoiseScale(model, every=1)
    batch = torch.randn(8, 6, dtype=F64)
    for module in (model, twin):
        out = module(batch)
        out.square().mean().backward(retain_graph=True)
        out.sum().backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert meter.report().steps >= 1


def test_several_forward_passes_for_one_backward_pass_say_so():
    model, twin = MLP().to(F64), MLP().to(F64)
    twin.load_state_dict(model.state_dict())
    meter = NoiseScale(model, every=2)
    one, two = torch.randn(2, 8, 6, dtype=F64)

    def train():
        for _ in range(2):
            for module in (model, twin):
                module.zero_grad()
                (module(one) * module(two)).mean().backward()

    with pytest.warns(UserWarning, match="noise is not measured of"):
        train()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert meter.report().steps == 0


def test_a_model_that_returns_its_loss_alone():
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Planted()

        def forward(self, z):
            return self.inner(z).mean()

    model = Loss().to(F64)
    meter = NoiseScale(model, every=1, clusters=16)
    z = draws(16, 0)
    model(z).backward()
    assert meter.history[0]["samples"] == 16
    assert meter.history[0]["variance"] == pytest.approx(float(z.var(dim=0).sum()))


def test_the_report_is_a_table_with_the_prediction():
    model = MLP()
    meter = NoiseScale(model, every=1)
    for _ in range(5):
        losses_of(model, torch.randn(16, 6)).mean().backward()
    text = str(meter.report())
    assert [line.split()[0] for line in text.splitlines()[1:6]] != []
    assert "critical batch about" in text
    assert "within 3 times on those and four others" in text
    assert re.search(r"batch 32 would take \d+% of the steps, \d+% to \d+%", text)
    assert repr(meter) == "NoiseScale(every=1, clusters=4; 5 measurements in the window)"


@pytest.mark.slow
@pytest.mark.rare
# Dynamo looks at the gradients of what crosses from one of its graphs into the next.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("compiled", ["before", "after", "in place"])
def test_a_compiled_model_keeps_its_gradients_and_its_graphs(compiled):
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    model, twin = MLP(), MLP()
    twin.load_state_dict(model.state_dict())
    called = torch.compile(model, backend="aot_eager") if compiled == "before" else model
    meter = NoiseScale(called, every=3)
    if compiled == "after":
        called = torch.compile(model, backend="aot_eager")
    elif compiled == "in place":
        model.compile(backend="aot_eager")
    graphs = []
    for _ in range(9):
        batch = torch.randn(8, 6)
        for module in (called, twin):
            module.zero_grad()
            losses_of(module, batch).mean().backward()
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
        graphs.append(counters["stats"]["unique_graphs"])
    assert [row["step"] for row in meter.history] == [3, 6, 9]
    assert graphs[2] == graphs[-1]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_models_are_measured(reentrant):
    class Checkpointed(MLP):
        def forward(self, x):
            x = x.clone().requires_grad_()
            return checkpoint(super().forward, x, use_reentrant=reentrant)

    torch.manual_seed(0)
    model, twin = Checkpointed().to(F64), MLP().to(F64)
    twin.load_state_dict(model.state_dict())
    meter = NoiseScale(model, every=2, clusters=8)
    for step in range(1, 5):
        batch = torch.randn(8, 6, dtype=F64)
        for module in (model, twin):
            module.zero_grad()
            losses_of(module, batch).mean().backward()
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-13)
        if step % 2 == 0:
            grads = by_sample(twin, losses_of(twin, batch))
            variance = sum(float(rows.var(dim=0).sum()) for rows in grads.values())
            assert meter.history[-1]["variance"] == pytest.approx(variance, rel=1e-9)
    assert len(meter.history) == 2


def test_autocast_keeps_its_gradients_and_bfloat16_its_figures():
    torch.manual_seed(0)
    model = MLP()
    twin = copy.deepcopy(model)
    meter = NoiseScale(model, every=1, clusters=16)
    batch = torch.randn(16, 6)
    for module in (model, twin):
        with torch.autocast("cpu", torch.bfloat16):
            losses = losses_of(module, batch)
        losses.mean().backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0.02, atol=1e-3)
    grads = by_sample(twin, losses_of(twin, batch))
    variance = sum(float(rows.var(dim=0).sum()) for rows in grads.values())
    assert meter.history[0]["variance"] == pytest.approx(variance, rel=0.05)


def test_lookups_of_a_table_are_those_of_its_rows():
    """A GPU gives lookups where the CPU gives sums of rows; V is one that does not count."""
    table = torch.zeros(7, 2, dtype=F64)
    labels = torch.tensor([0, 1, 0, 1])
    options = ClusterOptions(n_clusters=2, features="")
    groups = Groups.of(labels, 2, options, backend="torch")
    where = torch.tensor([3, 7, 3, 5, 0, 3, 7, 7])
    grads = torch.randn(8, 2, dtype=F64)
    found = []
    for way in ("lookups", "rows", "dense"):
        sink = Squares({"t": table}, {"t": table}, "torch", halves=False)
        sums = torch.zeros(2, 8, 2, dtype=F64)
        sums.view(16, 2).index_add_(0, labels.repeat_interleave(2) * 8 + where, grads)
        sums = sums[:, :7]
        if way == "lookups":
            taken = sink.take_lookups("t", groups, where, grads)
        elif way == "rows":
            rows = torch.tensor([0, 3, 5])
            taken = sink.take_rows("t", groups, rows, sums[:, rows].flatten(1))
        else:
            taken = sink.take("t", groups, iter([(0, 14, sums.flatten(1))]), F64)
        torch.testing.assert_close(taken.gradient, sums.sum(dim=0))
        found.append(sink.figures(["t"])[0][:, :2])
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])
