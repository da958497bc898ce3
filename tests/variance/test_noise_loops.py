# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
# pyright: reportAttributeAccessIssue=false, reportFunctionMemberAccess=false
"""The noise meter in loops: beside a GradQueue, saved, accumulating, compiled, checkpointed."""

import copy
import gc
import io
import math
import re
import weakref

import pytest
import torch
from cluster_cases import GPT, MLP
from noise_cases import Planted, by_sample, draws, losses_of
from torch import nn
from torch.utils.checkpoint import checkpoint

from gq_triton import GradQueue
from gq_triton.grouping import Groups
from gq_triton.options import ClusterOptions
from gq_triton.variance import NoiseScale
from gq_triton.variance.noise.sink import Squares

F64 = torch.float64


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
