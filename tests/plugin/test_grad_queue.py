# Gradients, layers and labels are there after a backward pass, whatever their types say.
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false
"""The plug-in without clusters, with any optimizer in any loop."""

import copy

import pytest
import torch
from plugin_cases import backward, batch, make_model
from torch import nn

from gq_triton import GQSGD, GQAdamW, GradQueue, reference

OPTIMIZERS = [
    lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    lambda params: torch.optim.SGD(params, lr=0.1, fused=True),
    lambda params: torch.optim.AdamW(params, lr=1e-2),
    lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True),
    lambda params: torch.optim.Adagrad(params, lr=1e-2),
    lambda params: torch.optim.RMSprop(params, lr=1e-2),
]


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS)
@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_the_optimizer_steps_on_what_the_oracle_weights(make_optimizer, backend):
    model, twin = make_model(), make_model()
    optimizer, plain = make_optimizer(model.parameters()), make_optimizer(twin.parameters())
    GradQueue(model, queue_length=4, backend=backend).attach(optimizer)
    rings = [reference.Ring(4) for _ in twin.parameters()]
    for step in range(9):
        backward(model, step)
        optimizer.step()
        backward(twin, step)
        for param, ring in zip(twin.parameters(), rings, strict=True):
            raw = param.grad.clone()
            param.grad.copy_(reference.weighted_gradient(raw, ring.newest()))
            ring.push(raw)
        plain.step()
        for actual, expected in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.slow
def test_it_equals_the_fused_optimizer():
    model, twin = make_model(), make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    GradQueue(model).attach(optimizer)
    fused = GQSGD(twin.parameters(), lr=0.1, momentum=0.9)
    for step in range(9):
        backward(model, step)
        optimizer.step()
        backward(twin, step)
        fused.step()
    for actual, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


def test_remove_leaves_a_plain_optimizer_and_keeps_the_queue():
    model, twin = make_model(), make_model()
    optimizer, plain = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin))
    queue = GradQueue(model, queue_length=2)
    handle = queue.attach(optimizer)
    for step in range(2):
        for m, o in ((model, optimizer), (twin, plain)):
            backward(m, step)
            o.step()
    handle.remove()
    handle.remove()
    digest = queue.digest()
    for step in range(2, 6):
        for m, o in ((model, optimizer), (twin, plain)):
            backward(m, step)
            o.step()
    assert queue.digest() == digest
    for actual, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(actual, expected)
    queue.attach(optimizer)
    backward(model, 6)
    optimizer.step()
    assert queue.metrics()["mean_weight"] != 1.0


def test_weighting_twice_is_refused():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    queue = GradQueue(model)
    for own in (GQSGD(model.parameters(), lr=0.1), GQAdamW(model.parameters())):
        with pytest.raises(ValueError, match="weights its gradients itself"):
            queue.attach(own)
    del own  # as long as it lives it could step
    queue.attach(optimizer)
    with pytest.raises(ValueError, match="weight twice"):
        queue.attach(optimizer)
    with pytest.raises(ValueError, match="weight twice"):
        queue.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="weight twice"):
        GradQueue(model).attach(optimizer)
    other = make_model()
    with pytest.raises(ValueError, match="belongs to the model"):
        GradQueue(make_model()).attach(torch.optim.SGD(other.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="Optimizer"):
        GradQueue(model).attach(model)


def test_a_sparse_gradient_is_refused_by_name():
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    GradQueue(model).attach(optimizer)
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=r"0\.weight .*sparse=False"):
        optimizer.step()


def test_closures_are_weighed_inside_the_step():
    model, twin = make_model(), make_model()
    optimizer, plain = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin))
    queue, other = GradQueue(model, loss_window=2), GradQueue(twin, loss_window=2)
    queue.attach(optimizer)
    other.attach(plain)
    for step in range(9):

        def closure(step=step):
            return backward(model, step)

        returned = optimizer.step(closure) if step % 2 else optimizer.step(closure=closure)
        loss = backward(twin, step)
        other.record_loss(loss)
        plain.step()
        assert torch.equal(torch.as_tensor(returned), loss)
    assert queue.digest() == other.digest()
    for actual, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_scale_that_changes_leaves_the_weights_alone(fused):
    model, twin = make_model(), make_model()
    optimizer, plain = (torch.optim.AdamW(m.parameters(), fused=fused) for m in (model, twin))
    queue, other = GradQueue(model), GradQueue(twin)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    queue.attach(optimizer, scaler)
    other.attach(plain)
    for step in range(9):
        model.zero_grad()
        scaler.scale(model(batch(step)).square().mean()).backward()
        if step == 7:
            model[0].weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        if step != 7:
            backward(twin, step)
            plain.step()
    assert scaler.get_scale() != 2.0**10
    assert queue.digest() == other.digest()
    for actual, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


def test_gradients_that_are_not_finite_or_missing_leave_the_queue_clean():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    queue = GradQueue(model, queue_length=2)
    queue.attach(optimizer)
    for step in range(3):
        backward(model, step)
        optimizer.step()
    before = copy.deepcopy(queue.state_dict())
    backward(model, 3)
    model[0].weight.grad[0, 0] = torch.nan
    raw = model[0].weight.grad.clone()
    model[0].bias.grad = None
    optimizer.step()
    after = queue.state_dict()
    assert torch.equal(model[0].weight.grad, raw) or torch.equal(
        model[0].weight.grad.nan_to_num(), raw.nan_to_num()
    )
    for name in ("0.weight", "0.bias"):
        assert torch.equal(after["queue"][name], before["queue"][name])
        assert int(after["queued"][name]) == 3
    assert int(after["queued"]["2.weight"]) == 4


def test_a_saved_queue_continues_bit_for_bit(tmp_path):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    queue = GradQueue(model, loss_window=2)
    queue.attach(optimizer)
    for step in range(7):
        queue.record_loss(backward(model, step))
        optimizer.step()
    torch.save({"model": model.state_dict(), "queue": queue.state_dict()}, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    other = make_model(seed=1)
    other.load_state_dict(saved["model"])
    plain = torch.optim.SGD(other.parameters(), lr=0.1)
    loaded = GradQueue(other, loss_window=2)
    loaded.load_state_dict(saved["queue"])
    loaded.attach(plain)
    assert loaded.digest() == queue.digest()
    for step in range(7, 12):
        for m, o, q in ((model, optimizer, queue), (other, plain, loaded)):
            q.record_loss(backward(m, step))
            o.step()
    assert loaded.digest() == queue.digest()
    for actual, expected in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(actual, expected)


def test_loaded_memory_waits_for_the_stream_that_reads_it(monkeypatch):
    """The hook's stream copies memory that another stream loaded; only a GPU shows the race."""
    released = []
    monkeypatch.setattr("gq_triton.queues.rings.in_use", lambda *tensors: released.extend(tensors))
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    queue = GradQueue(model, loss_window=2)
    queue.attach(optimizer)
    for step in range(2):
        queue.record_loss(backward(model, step))
        optimizer.step()
    queue.load_state_dict(queue.state_dict())
    loaded = [*queue._queues._queue.values(), queue._queues._losses]
    released.clear()
    queue.record_loss(backward(model, 2))
    optimizer.step()
    kept = [*queue._queues._queue.values()]  # losses are written where they are
    for tensor in loaded:
        assert not any(tensor is other for other in kept)
        assert any(tensor is other for other in released)


def test_a_queue_of_another_model_is_refused_and_nothing_changes():
    model = make_model()
    queue = GradQueue(model)
    queue.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    digest = queue.digest()
    saved = {"options": {"queue_length": 5, "loss_window": None}, "losses": None, "queued": {}}
    with pytest.raises(ValueError, match=r"'9\.weight'.*another model"):
        queue.load_state_dict(saved | {"queue": {"9.weight": torch.zeros(5, 2)}})
    with pytest.raises(ValueError, match=r"'0.weight' must have shape \(5, 8, 6\), got \(5, 2\)"):
        queue.load_state_dict(saved | {"queue": {"0.weight": torch.zeros(5, 2)}})
    with pytest.raises(ValueError, match="queue_length of options must be 5 here, got 4"):
        queue.load_state_dict(
            saved | {"queue": {}, "options": {"queue_length": 4, "loss_window": None}}
        )
    assert queue.digest() == digest


def test_match_norm_keeps_every_parameters_norm():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    queue = GradQueue(model, queue_length=3, match_norm=True)
    queue.attach(optimizer)
    for step in range(6):
        backward(model, step)
        raw = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
    for param, grad in zip(model.parameters(), raw, strict=True):
        assert not torch.equal(param.grad, grad)
        torch.testing.assert_close(param.grad.norm(), grad.norm(), rtol=1e-6, atol=0.0)
    assert queue.metrics()["norm_ratio"] == pytest.approx(1.0)


def test_channels_last_and_strided_parameters_keep_their_layout():
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 3).double().to(memory_format=torch.channels_last)
    model.bias = nn.Parameter(torch.randn(4, 2, dtype=torch.float64)[:, 0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    GradQueue(model, queue_length=3).attach(optimizer)
    rings = [reference.Ring(3) for _ in model.parameters()]
    for step in range(7):
        model.zero_grad()
        images = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(step)).double()
        model(images).square().mean().backward()
        if step % 2:
            model.weight.grad = model.weight.grad.contiguous()
        raw = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        for param, grad, ring in zip(model.parameters(), raw, rings, strict=True):
            expected = reference.weighted_gradient(grad, ring.newest())
            torch.testing.assert_close(param.grad, expected, rtol=1e-11, atol=1e-14)
            ring.push(grad)


def test_names_that_look_wrapped_are_kept_apart():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 1, dtype=torch.float64))
            self.module = nn.Linear(3, 1, bias=False, dtype=torch.float64)

        def forward(self, x):
            return self.module(x) + x @ self.weight

    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    queue = GradQueue(model)
    queue.attach(optimizer)
    model(torch.ones(2, 3, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert sorted(queue.state_dict()["queue"]) == ["module.weight", "weight"]


def test_what_is_no_model_and_no_queue_is_refused():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got generator"):
        GradQueue(make_model().parameters())
    with pytest.raises(ValueError, match="the saved queue does not fit: it lacks options, losses"):
        GradQueue(make_model()).load_state_dict({})
    with pytest.raises(ValueError, match="queue_dtype must be None, a floating type"):
        GradQueue(make_model(), queue_dtype="bf16")
    with pytest.raises(ValueError, match="nesterov must be True or False"):
        GQSGD(make_model().parameters(), 0.1, 0.9, 0, 5e-4)


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_a_constant_gradient_is_constant_under_any_loss_scale(backend):
    """A gradient is compared as rounded for the queue: weights are 1/rho everywhere, not rho."""
    torch.manual_seed(0)
    model = nn.Linear(300, 4, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, fused=True)
    queue = GradQueue(model, queue_length=3, backend=backend)
    queue.attach(optimizer)
    gradient = torch.randn(4, 300)
    for _ in range(5):
        model.weight.grad = gradient * 1000.0
        optimizer.grad_scale = torch.tensor(1000.0)
        optimizer.step()
    assert queue.metrics()["saturated_low"] == 1.0


def test_wrapped_optimizers_are_not_weighted_twice():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner):
            super().__init__(inner.param_groups, inner.defaults)
            self.inner = inner

        def step(self, closure=None):
            return self.inner.step(closure)

    class Bare(torch.optim.Optimizer):
        def __init__(self, inner):
            self.param_groups = inner.param_groups

    model = make_model()
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="GQSGD weights its gradients itself"):
        GradQueue(model).attach(Wrapper(GQSGD(model.parameters(), lr=0.1)))
    with pytest.raises(ValueError, match="attach to the optimizer that it wraps"):
        GradQueue(model).attach(Bare(plain))
    GradQueue(model).attach(plain)
    with pytest.raises(ValueError, match="weight twice"):
        GradQueue(model).attach(Wrapper(plain))


def test_two_optimizers_may_share_a_model():
    model, twin = make_model(), make_model()
    queue, other = GradQueue(model, queue_length=3), GradQueue(twin, queue_length=3)
    halves = [torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (0, 2)]
    whole = torch.optim.SGD(twin.parameters(), lr=0.1)
    for half in halves:
        queue.attach(half)
    other.attach(whole)
    for step in range(7):
        backward(model, step)
        backward(twin, step)
        for optimizer in (*halves, whole):
            optimizer.step()
    assert queue.digest() == other.digest()
    for actual, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(actual, expected)
