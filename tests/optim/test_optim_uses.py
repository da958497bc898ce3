"""The optimizers in the places of torch's own: groups, schedulers, closures."""

import math

import pytest
import torch
from optim_cases import (
    all_backends,
    assert_same,
    both_optimizers,
    copies,
    parameters,
    set_gradients,
    small_parameters,
    values,
)

from gq_triton import GQSGD, reference


@both_optimizers
@all_backends
def test_options_may_differ_per_group(variant, backend):
    """Each group equals a separate optimizer; a group may also be added later."""
    changes = [
        {"rho": 1.5, "queue_length": 2, "min_queue_length": 1},
        {"lr": 0.02, "weight_decay": 0.3, "queue_dtype": torch.bfloat16},
        {"backend": "torch", "match_norm": True, "queue_length": 4},
        {"maximize": True, "loss_window": 2},
    ]
    together = [parameters(seed=seed) for seed in range(len(changes))]
    alone = [copies(params) for params in together]
    groups = [{"params": p, **c} for p, c in zip(together, changes, strict=True)]
    optimizer = variant.build(groups[:3], backend=backend)
    others = [
        variant.build(p, **{"backend": backend, **c}) for p, c in zip(alone, changes, strict=True)
    ]
    for step in range(9):
        if step == 2:
            optimizer.add_param_group(groups[3])
        count = 4 if step >= 2 else 3
        optimizer.record_loss(9.0 - step)
        for params, single, other in zip(
            together[:count], alone[:count], others[:count], strict=True
        ):
            set_gradients(params, step)
            set_gradients(single, step)
            other.record_loss(9.0 - step)
            other.step()
        optimizer.step()
    assert_same([values(p) for p in together], [values(p) for p in alone])


def schedulers():
    lr = torch.optim.lr_scheduler
    return {
        "lambda": lambda o: lr.LambdaLR(o, lambda step: 0.9**step),
        "one-cycle": lambda o: lr.OneCycleLR(o, max_lr=0.2, total_steps=20),
        "cosine": lambda o: lr.CosineAnnealingLR(o, T_max=7),
    }


@both_optimizers
@all_backends
@pytest.mark.parametrize("scheduler", schedulers().values(), ids=schedulers())
def test_schedulers_drive_the_learning_rate_and_the_momentum(variant, backend, scheduler):
    """Learning rate, momentum and betas act as in torch; with the law on, as in the oracle."""
    for rho in (1.0, 3.0):
        ours, theirs = small_parameters(torch.float64), small_parameters(torch.float64)
        optimizer = variant.build(ours, rho=rho, backend=backend)
        plain = variant.plain(theirs)
        pairs = [(ours, optimizer, scheduler(optimizer)), (theirs, plain, scheduler(plain))]
        rings = [reference.Ring(5) for _ in theirs]
        for step in range(15):
            for params, either, schedule in pairs:
                gradients = set_gradients(params, step)
                if either is plain:
                    for param, raw, ring in zip(params, gradients, rings, strict=True):
                        param.grad = reference.weighted_gradient(raw, ring.newest(), rho=rho)
                        ring.push(raw)
                either.step()
                schedule.step()
        tolerance = 0 if rho == 1 else 1e-12
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@both_optimizers
@all_backends
def test_the_learning_rate_may_be_a_tensor(variant, backend):
    for dtype in (torch.float32, torch.float64):
        ours, theirs = small_parameters(), small_parameters()
        rate = torch.tensor(0.05, dtype=dtype)
        optimizer = variant.build(ours, rho=1.0, lr=rate, backend=backend)
        plain = variant.plain(theirs, lr=rate.clone())
        for step in range(6):
            if step == 3:
                optimizer.param_groups[0]["lr"].fill_(0.01)
                plain.param_groups[0]["lr"].fill_(0.01)
            for params, either in ((ours, optimizer), (theirs, plain)):
                set_gradients(params, step)
                either.step()
        assert_same(ours, theirs)


@both_optimizers
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_and_closures(variant, set_to_none):
    ours, theirs = small_parameters(), small_parameters()

    def closure_of(optimizer, params):
        def closure():
            optimizer.zero_grad(set_to_none=set_to_none)
            assert torch.is_grad_enabled()
            loss = torch.cat([(p - 1).square().flatten() for p in params]).sum()
            loss.backward()
            return loss

        return closure

    optimizer, plain = variant.build(ours, rho=1.0), variant.plain(theirs)
    for _ in range(4):
        loss, expected = (o.step(closure_of(o, p)) for o, p in ((optimizer, ours), (plain, theirs)))
        assert_same(loss, expected)
    assert_same(ours, theirs)
    assert optimizer.step() is None


@all_backends
def test_an_infinite_weight_stays_infinite(backend):
    """Without decay torch does not multiply the weight by it: 0 times infinity would be NaN."""
    param = torch.tensor([math.inf, 1.0], requires_grad=True)
    optimizer = GQSGD([param], lr=0.5, queue_length=2, min_queue_length=1, backend=backend)
    for step in range(3):
        param.grad = torch.tensor([1.0, 2.0 * step])
        optimizer.step()
    assert param.tolist() == [math.inf, -6.0]  # 1 - 0.5 * (0 + 2 + 3 * 4)


def test_a_queue_length_that_changes_between_steps_is_refused():
    params = small_parameters()
    optimizer = GQSGD(params, lr=0.1, queue_length=2, min_queue_length=1)
    set_gradients(params, 0)
    optimizer.step()
    before = values(params)
    optimizer.param_groups[0]["queue_length"] = 3
    with pytest.raises(
        ValueError, match=r"parameter 0 .* holds 2 gradients, got queue_length=3: s"
    ):
        optimizer.step()
    assert_same(values(params), before)
    for param in params:
        del optimizer.state[param]["queue"]
    optimizer.step()
    assert {len(optimizer.state[param]["queue"]) for param in params} == {3}


@all_backends
def test_a_gradient_whose_memory_is_negated_keeps_its_sign(backend):
    """Autograd gives one to the imaginary part of a conjugate."""
    real, imaginary = (torch.tensor(number, requires_grad=True) for number in (0.5, 0.3))
    optimizer = GQSGD(
        [real, imaginary], lr=1.0, queue_length=2, min_queue_length=1, backend=backend
    )
    for step in range(3):
        optimizer.zero_grad()
        (torch.complex(real, imaginary).conj() * complex(0, step)).real.backward()
        assert imaginary.grad is not None
        assert imaginary.grad.is_neg()
        optimizer.step()
    assert imaginary.item() == pytest.approx(0.3 - (0 + 1 + 2 * 3), abs=1e-6)


@all_backends
@pytest.mark.parametrize("name", ["queue", "momentum_buffer"])
def test_an_entry_of_another_memory_order_may_be_put_into_a_state(backend, name):
    ends = []
    for replaces in (False, True):
        torch.manual_seed(0)
        param = torch.nn.Parameter(torch.randn(3, 2).T)
        optimizer = GQSGD([param], lr=0.1, momentum=0.9, queue_length=2, backend=backend)
        for _ in range(5):
            if replaces and name in optimizer.state[param]:
                state = optimizer.state[param]
                state[name] = state[name].contiguous()
            param.grad = torch.randn(2, 3)
            optimizer.step()
        ends.append(param)
    assert torch.equal(*ends)
