"""The rules that every optimizer of one table keeps: steps and numbers.

torch.optim is the reference wherever torch has a behaviour, ``gq_triton.reference`` where it has
none. State and checkpoints are in test_optim_state.py, loss scaling in test_optim_scaler.py,
errors in test_optim_errors.py.
"""

import math
import warnings

import pytest
import torch
from optim_cases import (
    BACKENDS,
    Oracle,
    all_backends,
    all_variants,
    assert_same,
    both_optimizers,
    parameters,
    set_gradients,
    small_parameters,
    snapshot,
    train,
    values,
)

from gq_triton import GQSGD, reference
from gq_triton.testing import assert_ulps, weight_ulps

both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@all_variants
@all_backends
@both_dtypes
def test_tgq14_rho_1_is_torch_bit_for_bit(variant, backend, dtype):
    ours, theirs = parameters(dtype), parameters(dtype)
    optimizer = variant.build(ours, rho=1.0, queue_length=3, backend=backend)
    plain = variant.plain(theirs)
    for step in range(40):
        for params, either in ((ours, optimizer), (theirs, plain)):
            set_gradients(params, step)
            either.step()
        assert_same(ours, theirs)


@all_variants
@all_backends
@both_dtypes
def test_tgq15_the_first_l_steps_are_torch_bit_for_bit(variant, backend, dtype):
    ours, theirs = parameters(dtype), parameters(dtype)
    optimizer, plain = variant.build(ours, queue_length=3, backend=backend), variant.plain(theirs)
    for step in range(4):
        for params, either in ((ours, optimizer), (theirs, plain)):
            set_gradients(params, step)
            either.step()
        if step < 3:
            assert_same(ours, theirs)
    changed = [not torch.equal(a, b) for a, b in zip(ours, theirs, strict=True) if a.numel()]
    assert all(changed)


@all_variants
@all_backends
def test_agrees_with_the_oracle_in_float64(variant, backend):
    params = parameters(torch.float64)
    optimizer = variant.build(params, queue_length=3, backend=backend)
    oracles = [Oracle(param, variant, length=3, rho=3.0) for param in params]
    for step in range(12):
        set_gradients(params, step)
        optimizer.step()
        for param, oracle in zip(params, oracles, strict=True):
            oracle.step(param.grad)
            torch.testing.assert_close(param.detach(), oracle.param, rtol=1e-12, atol=1e-12)


@all_variants
@all_backends
def test_every_step_is_within_ulps_of_the_oracle_in_float32(variant, backend):
    """The oracle starts each step from the optimizer's state, so that rounding does not add up."""
    params = parameters(torch.float32)
    optimizer = variant.build(params, queue_length=3, backend=backend)
    oracles = [Oracle(param, variant, length=3, rho=3.0) for param in params]
    lr = variant.options["lr"]
    for step in range(12):
        set_gradients(params, step)
        for param, oracle in zip(params, oracles, strict=True):
            state = optimizer.state.get(param, {})
            before = oracle.param = param.detach().double()
            if "momentum_buffer" in state:
                oracle.momentum = state["momentum_buffer"].double()
            if "exp_avg" in state:
                oracle.exp_avg = state["exp_avg"].double()
                oracle.exp_avg_sq = state["exp_avg_sq"].double()
            old = oracle.momentum if oracle.momentum is not None else torch.zeros_like(before)
            weighted = oracle.step(param.grad)
            # Errors are measured in ulps of the sum's terms, because some terms cancel.
            if variant.ours is GQSGD:
                decay = variant.options.get("weight_decay", 0.0)
                moved = lr * 2 * (weighted.abs() + decay * before.abs() + old.abs())
            else:
                # A first moment that cancels is as exact as the gradient that went into it.
                beta1, beta2 = variant.options.get("betas", (0.9, 0.999))
                size = beta1 * oracle.exp_avg.abs() + (1 - beta1) * weighted.abs()
                spread = (oracle.exp_avg_sq / (1 - beta2 ** (step + 1))).sqrt() + 1e-30
                moved = lr * 2 * size / (1 - beta1 ** (step + 1)) / spread
            oracle.scale = before.abs() + moved
        optimizer.step()
        for param, oracle in zip(params, oracles, strict=True):
            assert_ulps(param, oracle.param, weight_ulps(3.0, 3), scale=oracle.scale)


@pytest.mark.slow
@both_optimizers
def test_the_backends_agree(variant):
    ends = []
    for backend in BACKENDS:
        params = parameters(torch.float64)
        train(variant.build(params, backend=backend), params, 12)
        ends.append(values(params))
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)


@both_optimizers
@all_backends
def test_a_parameter_without_a_gradient_is_skipped(variant, backend):
    params = small_parameters()
    optimizer = variant.build(params, queue_length=2, backend=backend)
    train(optimizer, params, 3)
    before = snapshot(optimizer)
    set_gradients(params, 3)
    params[0].grad = None
    optimizer.step()
    after = snapshot(optimizer)
    assert_same(after[0][0], before[0][0])
    assert_same(after[1][0], before[1][0])
    assert after[1][1]["queued"] == 4
    never = variant.build(small_parameters())
    never.step()
    assert not never.state


@all_variants
@all_backends
def test_zero_gradients_are_queued_like_any_other(variant, backend):
    """A constant queue of zeros gives weight 1/rho, times 0; decay and momentum go on."""
    params = parameters(torch.float64)
    optimizer = variant.build(params, queue_length=2, backend=backend)
    oracles = [Oracle(param, variant, length=2, rho=3.0) for param in params]
    for step in range(6):
        set_gradients(params, step, scale=float(step in (0, 4)))
        optimizer.step()
        for param, oracle in zip(params, oracles, strict=True):
            oracle.step(param.grad)
            torch.testing.assert_close(param.detach(), oracle.param, rtol=1e-12, atol=1e-12)


@both_optimizers
@all_backends
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_reaches_its_parameter_and_nothing_else(
    variant, backend, bad
):
    """The parameter gets it as in torch.optim; its queue does not, and no other parameter does."""
    params, clean = small_parameters(), small_parameters()
    optimizer, other = (variant.build(p, queue_length=2, backend=backend) for p in (params, clean))
    queue = None
    for step in range(5):
        gradients = set_gradients(params, step)
        set_gradients(clean, step)
        if step == 3:
            queue = optimizer.state[params[0]]["queue"].clone()
            gradients[0][5] = bad
        optimizer.step()
        other.step()
        if step == 3:
            assert not params[0][5].isfinite()
            assert params[0].isfinite().sum() == 39
            assert_same(optimizer.state[params[0]]["queue"], queue)
            assert optimizer.state[params[0]]["queued"] == 3
    assert_same(params[1], clean[1])
    assert optimizer.state[params[0]]["queued"] == 4
    assert optimizer.state[params[1]]["queued"] == 5


@both_optimizers
@all_backends
def test_the_queue_holds_the_last_raw_gradients(variant, backend):
    params = parameters()
    optimizer = variant.build(params, queue_length=3, backend=backend)
    for step in range(8):
        gradients = [g.clone() for g in set_gradients(params, step)]
        optimizer.step()
        assert_same([p.grad for p in params], gradients)
        for param, gradient in zip(params, gradients, strict=True):
            queue = optimizer.state[param]["queue"]
            assert queue.shape == (3, *param.shape)
            assert_same(queue[step % 3], gradient)
            assert int(optimizer.state[param]["queued"]) == step + 1


@both_optimizers
@all_backends
def test_the_current_gradient_is_not_among_those_it_is_compared_with(variant, backend):
    """An outlier gets weight rho; in a set that held it, Samuelson's bound would forbid that."""
    param = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = GQSGD([param], lr=1.0, queue_length=5, backend=backend)
    for step in range(5):
        param.grad = torch.full((4,), 1.0 + 0.01 * step).double()
        optimizer.step()
    before, param.grad = param.detach().clone(), torch.full((4,), -6.0).double()
    optimizer.step()
    torch.testing.assert_close(before - param.detach(), torch.full((4,), -18.0).double())


@all_backends
def test_a_constant_gradient_is_constant_in_a_bfloat16_queue(backend):
    """bfloat16 does not hold 0.1: the rounded gradient is compared, and the weight is 1/rho."""
    param = torch.zeros(8, requires_grad=True)
    optimizer = GQSGD([param], lr=1.0, queue_dtype=torch.bfloat16, backend=backend)
    for step in range(9):
        before = param.detach().clone()
        param.grad = torch.full((8,), 0.1)
        optimizer.step()
        moved = before - param.detach()
        expected = 0.1 if step < 5 else 0.1 / 3
        torch.testing.assert_close(moved, torch.full((8,), expected), rtol=1e-5, atol=0)
    assert optimizer.state[param]["queue"].dtype == torch.bfloat16


@all_backends
@both_dtypes
def test_match_norm_gives_each_parameter_the_norm_of_its_raw_gradient(backend, dtype):
    params = parameters(dtype)
    optimizer = GQSGD(params, lr=1.0, queue_length=3, match_norm=True, backend=backend)
    oracles = [reference.Ring(3) for _ in params]
    for step in range(7):
        gradients = set_gradients(params, step, scale=10.0**step)
        before = values(params)
        optimizer.step()
        for param, raw, old, ring in zip(params, gradients, before, oracles, strict=True):
            moved = (old - param.detach()).double()
            expected = reference.weighted_gradient(raw, ring.newest(), match_norm=True)
            ring.push(raw)
            near = 3e-6 if dtype == torch.float32 else 3e-7
            size = float(expected.abs().amax()) if expected.numel() else 0.0
            torch.testing.assert_close(moved, expected, rtol=near, atol=near * (size + 1))
            norm = float(raw.double().norm())
            assert float(moved.norm()) == pytest.approx(norm, rel=near * 10, abs=near)


@both_optimizers
@all_backends
@pytest.mark.parametrize("how", ["closure", "record_loss"])
def test_the_effective_length_follows_the_loss(variant, backend, how):
    options = {"queue_length": 5, "min_queue_length": 2, "loss_window": 2}
    params = small_parameters(torch.float64)
    optimizer = variant.build(params, backend=backend, **options)
    oracles = [Oracle(param, variant, length=5, rho=3.0) for param in params]
    losses, used = [9, 8, 7.5, 7, 6, 5, 5.5, 4, 3, 2, 1, 0.5], set()
    for step, loss in enumerate(losses):
        newest = [*losses[step::-1], *[math.nan] * 6][:6]
        length = reference.effective_length(newest, 2, 2, 5)
        used.add(length)
        set_gradients(params, step)
        if how == "closure":
            optimizer.step(lambda loss=loss: torch.tensor(loss))
        else:
            optimizer.record_loss(loss)
            optimizer.step()
        for param, oracle in zip(params, oracles, strict=True):
            oracle.step(param.grad, length)
            torch.testing.assert_close(param.detach(), oracle.param, rtol=1e-12, atol=1e-12)
    assert used == {2, 3, 4, 5}


@both_optimizers
def test_a_loss_that_nobody_records_is_reported_once(variant):
    params = small_parameters()
    optimizer = variant.build(params, loss_window=3)
    with pytest.warns(UserWarning, match=r"call optimizer.record_loss\(loss\) before"):
        train(optimizer, params, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(optimizer, params, 3, start=1)


@pytest.mark.slow
@both_optimizers
@all_backends
def test_threads_change_no_bit(variant, backend):
    """The parameters are large enough that every engine splits the work."""
    ends, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            params = [torch.linspace(-1, 1, 270_001).requires_grad_()]
            optimizer = variant.build(params, queue_length=2, backend=backend)
            train(optimizer, params, 4)
            ends.append(snapshot(optimizer))
    finally:
        torch.set_num_threads(threads)
    assert_same(ends[0], ends[1])
    assert_same(ends[1], ends[2])


@both_optimizers
@all_backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_parameters_follow_the_oracle_and_warm_up_like_torch(variant, backend, dtype):
    # These parameters have no holes and the memory order of their gradients: torch rounds others
    # twice.
    ours, theirs = parameters(dtype)[:6], parameters(dtype)[:6]
    optimizer, plain = variant.build(ours, queue_length=3, backend=backend), variant.plain(theirs)
    train(optimizer, ours, 3, mixed=False)
    train(plain, theirs, 3, mixed=False)
    assert_same(ours, theirs)
    oracles = [reference.Ring(3) for _ in ours]
    for step in range(3):
        for raw, ring in zip(set_gradients(theirs, step, mixed=False), oracles, strict=True):
            ring.push(raw)
    for step in range(3, 8):
        set_gradients(ours, step, mixed=False)
        gradients = set_gradients(theirs, step, mixed=False)
        for param, raw, ring in zip(theirs, gradients, oracles, strict=True):
            param.grad = reference.weighted_gradient(raw, ring.newest()).to(dtype)
            ring.push(raw)
        optimizer.step()
        plain.step()
    near = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(ours, theirs, rtol=near, atol=near)
