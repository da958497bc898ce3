"""SVRG, SCSG and Katyusha: unbiased, less variance near the anchor, any optimizer, resumable."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from variance_cases import gradients, small

from gq_triton import GradQueue
from gq_triton.variance import SCSG, SVRG, Katyusha

KINDS = {
    "svrg": lambda model, data: SVRG(model, "cross_entropy", data, every=3),
    "scsg": lambda model, data: SCSG(model, "cross_entropy", data, 2, 4, growth=1.1),
    "katyusha": lambda model, data: Katyusha(model, "cross_entropy", data, every=3),
}


def move(model, by=0.05, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            param += by * torch.randn(param.shape, dtype=param.dtype, generator=generator)


def estimate(estimator, model, inputs, targets):
    model.zero_grad()
    estimator.backward(inputs, targets)
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def one_by_one(estimator, model, data):
    """Return the estimate for every sample alone, all at the same point."""
    before, rows = estimator.state_dict(), []
    for x, y in data:
        rows.append(estimate(estimator, model, x[None], y[None]))
        estimator.load_state_dict(before)
    return torch.stack(rows)


# --- T-IS13


def test_tis13_svrg_is_unbiased():
    model, data = small()
    svrg = SVRG(model, "cross_entropy", data, every=10)
    svrg.snapshot()
    move(model, 0.5)
    found = one_by_one(svrg, model, data)
    torch.testing.assert_close(found.mean(0), gradients(model, data).mean(0), atol=1e-12, rtol=0)


def test_tis13_scsg_is_unbiased_over_the_anchor_s_samples():
    # All parts of 4 of the 6 samples, and all samples.
    model, data = small()
    scsg = SCSG(model, "cross_entropy", data, 2, 4)
    scsg.snapshot()
    past = gradients(model, data)
    move(model, 0.5)
    found = []
    for part in itertools.combinations(range(6), 4):
        scsg.mean = past[list(part)].mean(0)
        found.append(one_by_one(scsg, model, data).mean(0))
    mean = torch.stack(found).mean(0)
    torch.testing.assert_close(mean, gradients(model, data).mean(0), atol=1e-12, rtol=0)


def test_tis13_katyusha_is_unbiased_and_quieter_than_plain_near_the_anchor():
    # The importance sampling paper's code adds what must be subtracted: g + g~ - mean. That is
    # unbiased too, but has about four times the variance of the plain gradient.
    model, data = small()
    katyusha = Katyusha(model, "cross_entropy", data, every=10)
    katyusha.snapshot()
    past = gradients(model, data)
    move(model)
    found = one_by_one(katyusha, model, data)
    # The gradient is that of x, half way from the anchor to z.
    anchor = [p.detach() for p in katyusha.anchor.params.values()]
    with torch.no_grad():
        for param, other in zip(model.parameters(), anchor, strict=True):
            param += (other - param) / 2
    plain = gradients(model, data)
    torch.testing.assert_close(found.mean(0), plain.mean(0), atol=1e-12, rtol=0)
    wrong = plain + past - past.mean(0)
    torch.testing.assert_close(wrong.mean(0), plain.mean(0), atol=1e-12, rtol=0)
    correct, paper, alone = (rows.var(0).sum().item() for rows in (found, wrong, plain))
    assert correct < 0.01 * alone
    assert 3.5 * alone < paper < 4.5 * alone


def test_katyusha_with_sgd_is_the_paper_s_recursion():
    model, data = small()
    lr, tau1, tau2 = 0.2, 0.4, 0.3
    katyusha = Katyusha(model, "cross_entropy", data, every=3, tau1=tau1, tau2=tau2)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr / tau1)
    reference, _ = small()

    def flat():
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    def rows_at(point):
        nn.utils.vector_to_parameters(point, reference.parameters())
        return gradients(reference, data)

    y = z = anchor = flat()
    past = rows_at(y)
    for step in range(7):
        if step % 3 == 0:
            anchor, past = y, rows_at(y)
        x = tau1 * z + tau2 * anchor + (1 - tau1 - tau2) * y
        batch = [step % 6, (2 * step + 1) % 6]
        v = (rows_at(x) - past)[batch].mean(0) + past.mean(0)
        y, z = x - lr * v, z - lr / tau1 * v
        optimizer.zero_grad()
        katyusha.backward(*data[batch])
        optimizer.step()
        torch.testing.assert_close(flat(), z)
        with katyusha.iterate():
            torch.testing.assert_close(flat(), y)
        torch.testing.assert_close(flat(), z)
    katyusha.finish()
    torch.testing.assert_close(flat(), y)


def test_katyusha_s_anchor_is_the_iterate_whoever_asks_for_it():
    model, data = small()
    katyusha = Katyusha(model, "cross_entropy", data, every=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        katyusha.backward(*data[:2])
        optimizer.step()
    with katyusha.iterate():
        y = [p.detach().clone() for p in model.parameters()]
    katyusha.snapshot()
    for one, other in zip(katyusha.anchor.params.values(), y, strict=True):
        assert torch.equal(one, other)


# --- anchors


@pytest.mark.parametrize("samples", [7, 513])
def test_the_anchor_s_gradient_is_that_of_every_sample(samples):
    # The authors' code counts one batch more than it sums, which makes the mean too small; here a
    # ragged last part counts by its samples.
    model, data = small(samples)
    svrg = SVRG(model, "cross_entropy", data, every=10)
    svrg.snapshot()
    x, y = data.tensors
    loss = nn.functional.cross_entropy(model(x), y)
    grads = torch.autograd.grad(loss, [*model.parameters()])
    torch.testing.assert_close(svrg.mean, torch.cat([g.flatten() for g in grads]))


def test_a_new_anchor_comes_when_it_is_due():
    model, data = small()
    svrg = SVRG(model, "cross_entropy", data, every=3)
    made = []
    for _ in range(7):
        estimate(svrg, model, *data[:2])
        made.append(svrg.anchors)
    assert made == [1, 1, 1, 2, 2, 2, 3]


def test_scsg_s_anchors_grow_and_last_as_long_as_the_paper_says():
    model, data = small(64)
    scsg = SCSG(model, "cross_entropy", data, 4, 16, growth=2.0)
    parts, lengths = [], []
    for number in range(4):
        scsg.anchors = number
        parts.append(len(scsg._indices()))
        assert len(scsg._indices().unique()) == parts[-1]
    assert parts == [16, 32, 64, 64]
    scsg._growth = 1.0
    for number in range(4000):
        scsg.anchors = number
        lengths.append(scsg._length())
    # Geometric from 1, with the mean 16 / 4 and the standard deviation sqrt(12).
    assert min(lengths) == 1
    assert sum(lengths) / 4000 == pytest.approx(4, abs=4 * math.sqrt(12 / 4000))


def test_a_snapshot_leaves_random_numbers_and_the_model_alone():
    data = small(8)[1]
    layers = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)
    model = nn.Sequential(*layers).double()
    svrg = SVRG(model, "cross_entropy", data, every=10)
    state, numbers = torch.get_rng_state(), [t.clone() for t in model.state_dict().values()]
    svrg.snapshot()
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(model.state_dict().values(), numbers, strict=True):
        assert torch.equal(one, other)


def test_both_gradients_drop_the_same_and_the_loop_draws_what_it_would_without():
    data = small(8)[1]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 64), nn.Dropout(0.5), nn.Linear(64, 3)).double()
    svrg = SVRG(model, "cross_entropy", data, every=10)
    svrg.snapshot()
    # At the anchor the correction takes the whole gradient of the batch away.
    torch.testing.assert_close(estimate(svrg, model, *data[:4]), svrg.mean)
    drawn = []
    for step in (lambda x, y: svrg.backward(x, y), lambda x, y: model(x)):
        torch.manual_seed(1)
        step(*data[:4])
        drawn.append(torch.rand(()))
    assert drawn[0] == drawn[1]


# --- training


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "RMSprop", "GradQueue"])
def test_any_optimizer_learns(kind, optimizer):
    model, data = small(24)
    data = TensorDataset(data.tensors[0], (data.tensors[0][:, 0] > 0).long())
    estimator = KINDS[kind](model, data)
    if optimizer == "GradQueue":
        taken = torch.optim.SGD(model.parameters(), lr=0.5)
        GradQueue(model, queue_length=3, backend="torch").attach(taken)
    else:
        rate = 0.5 if optimizer == "SGD" else 0.02
        taken = getattr(torch.optim, optimizer)(model.parameters(), lr=rate)
    x, y = data.tensors
    before = nn.functional.cross_entropy(model(x), y).item()
    for epoch in range(3):
        generator = torch.Generator().manual_seed(epoch)
        for x, y in DataLoader(data, batch_size=4, shuffle=True, generator=generator):
            taken.zero_grad()
            assert 0 < estimator.backward(x, y).item() < 3
            taken.step()
    x, y = data.tensors
    assert nn.functional.cross_entropy(model(x), y).item() < before - 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_estimator_goes_on_bit_for_bit(kind):
    # The authors' code copies the other way on load, so that a resumed run loses the mean gradient.
    def run(stops):
        model, data = small(12)
        estimator = KINDS[kind](model, data)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        for step in range(8):
            if step == stops:
                saved = model.state_dict(), estimator.state_dict()
                model, data = small(12, seed=0)
                move(model)
                estimator = KINDS[kind](model, data)
                model.load_state_dict(saved[0])
                estimator.load_state_dict(saved[1])
                optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
            optimizer.zero_grad()
            estimator.backward(*data[step : step + 4])
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    expected = run(None)
    for stops in (0, 2, 3, 5):
        for one, other in zip(run(stops), expected, strict=True):
            assert torch.equal(one, other)


def test_gradients_accumulate_as_with_loss_backward():
    model, data = small()
    svrg = SVRG(model, "cross_entropy", data, every=10)
    once = estimate(svrg, model, *data[:2])
    svrg.backward(*data[:2])
    twice = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(twice, 2 * once)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda m, d: SVRG(m, "mse", d, every=0), "every must be an integer >= 1, got 0"),
        (lambda m, d: SVRG(m, "mse", [], every=1), "the dataset must have at least one sample"),
        (lambda m, d: SCSG(m, "mse", d, 4, 2), "anchor_samples must be from batch_size, 4, to"),
        (lambda m, d: SCSG(m, "mse", d, 4, 7), "the number of samples, 6, got 7"),
        (lambda m, d: SCSG(m, "mse", d, 2, 4, growth=0.5), "growth must be a number >= 1"),
        (lambda m, d: Katyusha(m, "mse", d, 1, tau1=0.0), "tau1 must be above 0"),
        (lambda m, d: Katyusha(m, "mse", d, 1, tau1=0.6), "tau1 [+] tau2 at most 1"),
    ],
)
def test_bad_input_is_refused(make, text):
    model, data = small()
    with pytest.raises(ValueError, match=text):
        make(model, data)


def test_a_state_of_another_model_is_refused():
    model, data = small()
    other = SVRG(nn.Linear(3, 3).double(), "cross_entropy", data, every=1)
    other.snapshot()
    svrg = SVRG(model, "cross_entropy", data, every=1)
    wrong: list[Any] = [other.state_dict(), {}, None, {**svrg.state_dict(), "left": -1}]
    for state in wrong:
        with pytest.raises(ValueError, match="the saved SVRG does not fit: "):
            svrg.load_state_dict(state)
    katyusha = Katyusha(model, "cross_entropy", data, every=1)
    for last in ({}, {"last": [[torch.ones(2)], []]}):
        with pytest.raises(ValueError, match="the saved Katyusha does not fit: "):
            katyusha.load_state_dict({**svrg.state_dict(), **last})


def test_an_anchor_whose_gradient_is_not_finite_is_refused():
    model, data = small()
    svrg = SVRG(model, "cross_entropy", data, every=1)
    nn.init.constant_(next(model.parameters()), torch.nan)
    with pytest.raises(ValueError, match="the gradient of the dataset must be finite"):
        svrg.backward(*data[:2])
    assert svrg.mean is None
