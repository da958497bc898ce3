"""The figures of GQSGD and GQAdamW: those of the plug-in, and no change to the training."""

import warnings

import pytest
import torch
from optim_cases import all_backends, both_optimizers

from gq_triton import GQSGD, GradQueue

L = 3


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))


def backward(model, step):
    generator = torch.Generator().manual_seed(step)
    model.zero_grad()
    model(torch.randn(6, 5, generator=generator)).square().mean().backward()


@pytest.mark.slow
@both_optimizers
@all_backends
@pytest.mark.parametrize("match_norm", [False, True])
def test_figures_are_those_of_the_plug_in(variant, backend, match_norm):
    options = {"queue_length": L, "backend": backend, "match_norm": match_norm}
    model, twin, plain = network(), network(), network()
    optimizer = variant.build(model.named_parameters(), lr=0.0, **options)
    # Stepping with lr 0 keeps all gradients the same, so the plug-in's queue is the same.
    judge = torch.optim.SGD(twin.parameters(), lr=0.0)
    queue = GradQueue(twin, **options)
    queue.attach(judge)
    assert optimizer.metrics() == {}
    assert optimizer.metrics(per_layer=True) == {}
    for step in range(L + 4):
        for one, stepping in ((model, optimizer), (twin, judge)):
            backward(one, step)
            stepping.step()
        expected = queue.metrics()
        assert expected.pop("cluster_sizes") is None
        assert optimizer.metrics() == pytest.approx(expected, rel=1e-5)
        layers = queue.metrics(per_layer=True)
        for name, own in optimizer.metrics(per_layer=True).items():
            assert own == pytest.approx(layers.pop(name), rel=1e-5), name
        assert not layers
    assert optimizer.metrics()["mean_weight"] != 1
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


@pytest.mark.slow
@both_optimizers
@all_backends
def test_counting_changes_no_bit(variant, backend):
    runs = []
    for counted in (False, True):
        model = network()
        optimizer = variant.build(model.parameters(), queue_length=L, backend=backend)
        if counted:
            optimizer.metrics()
        for step in range(L + 4):
            backward(model, step)
            optimizer.step()
        runs.append((model, optimizer))
    (model, plain), (other, counted) = runs
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    for one, two in zip(plain.state.values(), counted.state.values(), strict=True):
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert set(counted.metrics(per_layer=True)) == {f"group 0, parameter {i}" for i in range(4)}


def test_a_first_call_after_a_step_says_why_it_is_empty():
    model = network()
    optimizer = GQSGD(model.parameters(), lr=0.1, queue_length=L)
    backward(model, 0)
    optimizer.step()
    with pytest.warns(UserWarning, match="call it once before training"):
        assert optimizer.metrics() == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert optimizer.metrics() == {}
        backward(model, 1)
        optimizer.step()
        assert optimizer.metrics()["mean_weight"] == 1.0


def test_a_loss_scale_is_taken_out_and_a_skipped_step_has_no_figures():
    figures = []
    for scaled in (False, True):
        model = network()
        optimizer = GQSGD(model.parameters(), lr=0.1, queue_length=L, backend="torch")
        optimizer.metrics()
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for step in range(L + 3):
            model.zero_grad()
            generator = torch.Generator().manual_seed(step)
            loss = model(torch.randn(6, 5, generator=generator)).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        figures.append(optimizer.metrics())
        if scaled:
            model.zero_grad()
            scaler.scale(model(torch.full((6, 5), torch.inf)).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            assert optimizer.metrics() == {}
    assert figures[1] == pytest.approx(figures[0], rel=1e-5)
