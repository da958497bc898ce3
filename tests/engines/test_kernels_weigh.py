"""The law alone: weights, ring buffer and sums of `weigh_` against the float64 oracle."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    DEVICES,
    QUIET,
    Guarded,
    assert_stored,
    assert_weights,
    newest_first,
    oracle_weights,
    truncated,
)

from gq_triton import kernels
from gq_triton.engines import eager
from gq_triton.kernels import all_finite, weigh_
from gq_triton.kernels.launch import CHUNK, block_size
from gq_triton.law import Law

BLOCK = block_size(torch.float32)
SIZES = (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, CHUNK - 1, CHUNK, CHUNK + 1)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
pytestmark = [
    pytest.mark.parametrize("device", DEVICES),
    *QUIET,
]


def weights_of(grads, queues, queued, *, rho=3.0, **options):
    """Run the kernel and return the weights ``after / before`` in float64 and the sums."""
    before = [grad.to("cpu", torch.float64, copy=True) for grad in grads]
    sums = weigh_(grads, queues, queued, all_finite(grads), Law(rho, **options))
    after = [grad.double().cpu() for grad in grads]
    return [a / b for a, b in zip(after, before, strict=True)], sums


@pytest.mark.slow
@pytest.mark.parametrize("shift", [0, 1])
def test_weights_of_all_sizes_in_one_launch(device, shift):
    guarded = Guarded(device, shift)
    grads, queues = guarded.lists(SIZES), guarded.rings(SIZES, 5)
    exact = [oracle_weights(g, q, 7, 3.0) for g, q in zip(grads, queues, strict=True)]
    weights, _ = weights_of(grads, queues, guarded.counters(SIZES, 7))
    for actual, expected in zip(weights, exact, strict=True):
        assert_weights(actual, expected, rho=3.0, slots=5)
    guarded.check()


@pytest.mark.slow
@pytest.mark.parametrize("slots", [*range(1, 13), 16, 17, 20])
@pytest.mark.parametrize("rho", [1.5, 3.0, 10.0])
def test_weights_of_all_queue_lengths(device, slots, rho):
    sizes = (7, BLOCK + 3)
    guarded = Guarded(device, seed=slots)
    grads, queues = guarded.lists(sizes), guarded.rings(sizes, slots)
    count = 3 * slots + 1
    exact = [oracle_weights(g, q, count, rho) for g, q in zip(grads, queues, strict=True)]
    weights, _ = weights_of(grads, queues, guarded.counters(sizes, count), rho=rho)
    for actual, expected in zip(weights, exact, strict=True):
        assert_weights(actual, expected, rho=rho, slots=slots)


@pytest.mark.parametrize("slots", [1, 3, 5])
def test_ring_from_empty_through_two_turns(device, slots):
    sizes = (6, 19)
    guarded = Guarded(device)
    queues = [guarded.view(torch.full((slots, n), math.nan), torch.float32) for n in sizes]
    queued = guarded.counters(sizes, 0)
    history: list[list[torch.Tensor]] = [[], []]
    for step in range(2 * slots + 2):
        grads = guarded.lists(sizes)
        raw = [grad.clone() for grad in grads]
        exact = [oracle_weights(g, q, step, 3.0) for g, q in zip(grads, queues, strict=True)]
        weights, _ = weights_of(grads, queues, queued)
        for index in range(2):
            history[index].append(raw[index])
            assert_weights(weights[index], exact[index], rho=3.0, slots=slots)
            if step < slots:
                assert torch.equal(grads[index], raw[index])
            assert int(queued[index]) == step + 1
            kept = newest_first(queues[index], step + 1)[: step + 1]
            assert torch.equal(kept, torch.stack(history[index][::-1][:slots]))
    guarded.check()


@pytest.mark.parametrize(("slots", "used"), [(5, 1), (5, 3), (5, 5), (5, 9), (20, 2), (20, 19)])
def test_effective_length_uses_the_newest_rows(device, slots, used):
    sizes = (33, BLOCK + 1)
    guarded = Guarded(device)
    grads, queues = guarded.lists(sizes), guarded.rings(sizes, slots)
    exact = [
        oracle_weights(g, q, slots + 3, 3.0, min(used, slots))
        for g, q in zip(grads, queues, strict=True)
    ]
    length = torch.tensor(used, device=device)
    weights, _ = weights_of(grads, queues, guarded.counters(sizes, slots + 3), length=length)
    for actual, expected in zip(weights, exact, strict=True):
        assert_weights(actual, expected, rho=3.0, slots=slots)


@pytest.mark.parametrize("queue_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_types_are_independent(device, dtype, queue_dtype):
    sizes = (5, 300)
    guarded = Guarded(device, shift=1 if dtype == queue_dtype else 0)
    grads = guarded.lists(sizes, dtype=dtype)
    queues = guarded.rings(sizes, 5, dtype=queue_dtype)
    raw = [grad.clone() for grad in grads]
    # The interpreter truncates to bfloat16, so the oracle gets gradients as the kernel queues them.
    rounded = [truncated(g, queue_dtype) for g in raw]
    exact = [oracle_weights(g, q, 8, 3.0) for g, q in zip(rounded, queues, strict=True)]
    weigh_(grads, queues, guarded.counters(sizes, 8), None, Law(3.0))
    for index, grad in enumerate(grads):
        assert_stored(grad, exact[index] * raw[index].double().cpu(), scale=1.0)
        assert torch.equal(queues[index][8 % 5], rounded[index].to(queue_dtype))
    guarded.check()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_gradients_pass_untouched(device, value):
    sizes = (4, 9, BLOCK + 2)
    guarded = Guarded(device)
    grads, queues = guarded.lists(sizes), guarded.rings(sizes, 3)
    grads[1][4] = value
    raw, rings = [g.clone() for g in grads], [q.clone() for q in queues]
    exact = [oracle_weights(g, q, 4, 3.0) for g, q in zip(grads, queues, strict=True)]
    queued = guarded.counters(sizes, 4)
    sums = weigh_(grads, queues, queued, all_finite(grads), Law(3.0))
    assert torch.equal(grads[1].view(torch.int32), raw[1].view(torch.int32))
    assert torch.equal(queues[1], rings[1])
    assert [int(count) for count in queued] == [5, 4, 5]
    assert sums[1, 2:].tolist() == [9.0, 0.0, 0.0]
    for index in (0, 2):
        assert torch.equal(queues[index][1], raw[index])
        weights = grads[index].double().cpu() / raw[index].double().cpu()
        assert_weights(weights, exact[index], rho=3.0, slots=3)


def test_loss_scale_changes_no_weight_and_no_queue(device):
    sizes = (50, BLOCK + 1)
    plain, scaled = Guarded(device), Guarded(device)
    grads, queues = plain.lists(sizes), plain.rings(sizes, 5)
    grads_scaled, queues_scaled = scaled.lists(sizes), scaled.rings(sizes, 5)
    for grad in grads_scaled:
        grad.mul_(4096.0)
    sums = weigh_(grads, queues, plain.counters(sizes, 9), None, Law(3.0))
    scale = torch.tensor(4096.0, device=device)
    law = Law(3.0, grad_scale=scale)
    sums_scaled = weigh_(grads_scaled, queues_scaled, scaled.counters(sizes, 9), None, law)
    assert torch.equal(sums, sums_scaled)
    for index in range(2):
        assert torch.equal(grads_scaled[index], grads[index] * 4096.0)
        assert torch.equal(queues_scaled[index], queues[index])


def test_sums(device):
    sizes = (0, 3, 2 * CHUNK + 17)
    guarded = Guarded(device)
    grads, queues = guarded.lists(sizes), guarded.rings(sizes, 4)
    raw = [grad.double().cpu() for grad in grads]
    sums = weigh_(grads, queues, guarded.counters(sizes, 4), None, Law(2.0)).double().cpu()
    assert sums.shape == (3, 5)
    for index, before in enumerate(raw):
        after = grads[index].double().cpu()
        weights = after / before
        torch.testing.assert_close(sums[index, 0], before.square().sum(), rtol=1e-5, atol=0)
        torch.testing.assert_close(sums[index, 1], after.square().sum(), rtol=1e-5, atol=0)
        torch.testing.assert_close(sums[index, 2], weights.sum(), rtol=1e-5, atol=0)
        assert sums[index, 3] == int((weights > 2.0 - 1e-6).sum())
        assert sums[index, 4] == int((weights < 0.5 + 1e-7).sum())


def test_rho_one_and_warm_up_change_no_bit(device):
    sizes = (11, BLOCK + 1)
    for rho, count in ((1.0, 9), (3.0, 4)):
        guarded = Guarded(device)
        grads, queues = guarded.lists(sizes), guarded.rings(sizes, 5)
        raw = [grad.clone() for grad in grads]
        sums = weigh_(grads, queues, guarded.counters(sizes, count), None, Law(rho))
        for index, n in enumerate(sizes):
            assert torch.equal(grads[index], raw[index])
            assert torch.equal(queues[index][count % 5], raw[index])
            assert sums[index, 2:].tolist() == [n, 0.0, 0.0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.1, 0.0, 1e-30, 2e4])
def test_constant_queue(device, dtype, value):
    """Lemma 3.3: ``1/rho`` where the gradient equals the queue, ``rho`` where it does not."""
    queue = torch.full((7, 4), value, device=device).to(dtype)
    near = torch.nextafter(queue[0].cpu(), torch.full((4,), math.inf, dtype=dtype)).to(device)
    # The interpreter takes subnormal bfloat16 for zero.
    near = near.clamp(min=torch.finfo(dtype).tiny) if dtype == torch.bfloat16 else near
    for grad, weight in ((queue[0].clone(), 1 / 3), (near, 3.0)):
        exact = grad.double().cpu() * weight
        weigh_([grad], [queue.clone()], [torch.tensor(9, device=device)], None, Law(3.0))
        assert_stored(grad, exact, scale=0.0, units=2)


@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e-10, 1e10, 1e18, 1e30])
def test_neither_tiny_nor_huge_gradients_lose_the_statistic(device, scale):
    guarded = Guarded(device)
    grad, queue = guarded.normal(200, scale=scale), guarded.normal(5, 200, scale=scale)
    exact = oracle_weights(grad, queue, 5, 3.0) * grad.double().cpu()
    weigh_([grad], [queue], guarded.counters((1,), 5), None, Law(3.0))
    error = (grad.double().cpu() - exact).abs() / exact.abs().clamp(min=scale * 1e-3)
    assert float(error.max()) < 1e-5


def test_a_gradient_beyond_the_queues_type_saturates(device):
    grad = torch.tensor([1e5, -1e30, 2.0], device=device)
    queue = torch.ones(3, 3, dtype=torch.float16, device=device)
    weigh_([grad], [queue], [torch.tensor(3, device=device)], None, Law(3.0))
    assert queue[0].tolist() == [65504.0, -65504.0, 2.0]
    assert torch.equal(grad.cpu(), torch.tensor([1e5, -1e30, 2.0]) * 3)


def test_repeats_agree_bit_for_bit(device):
    results = []
    for _ in range(2):
        guarded = Guarded(device)
        sizes = (CHUNK + 3, 100)
        grads, queues = guarded.lists(sizes), guarded.rings(sizes, 5)
        sums = weigh_(grads, queues, guarded.counters(sizes, 6), None, Law(3.0))
        results.append([sums, *grads, *queues])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 70),
    slots=st.integers(1, 8),
    turn=st.integers(0, 20),
    exponent=st.integers(-20, 20),
    seed=st.integers(0, 99),
)
def test_scale_and_order_do_not_matter(device, n, slots, turn, exponent, seed):
    """A power of two changes no bit of a weight; the age of a row changes roundings only."""
    guarded = Guarded(device, seed=seed)
    grad, queue = guarded.normal(n), guarded.normal(slots, n)
    factor = 2.0**exponent
    first, second, third = grad.clone(), grad * factor, grad.clone()
    for g, q, count in (
        (first, queue.clone(), slots),
        (second, queue * factor, slots),
        (third, queue.clone(), slots + turn),
    ):
        weigh_([g], [q], [torch.tensor(count, device=device)], None, Law(3.0))
    assert torch.equal(first * factor, second)
    torch.testing.assert_close(third, first, rtol=1e-4, atol=0)


def test_no_tensors(device):
    assert weigh_([], [], [], torch.ones(0, dtype=torch.bool), Law(3.0)).shape == (0, 5)


def test_wrong_inputs_are_named(device):
    guarded = Guarded(device)
    grads, queues, queued = [guarded.normal(4)], [guarded.normal(3, 4)], guarded.counters((4,), 3)
    with pytest.raises(ValueError, match=r"queues\[0\] must have shape \(3, 4\)"):
        weigh_(grads, [guarded.normal(4, 3).T], queued, None, Law(3.0))
    with pytest.raises(ValueError, match=r"queued\[0\] must be one torch.int64"):
        weigh_(grads, queues, [queued[0].int()], None, Law(3.0))
    with pytest.raises(ValueError, match="shorter"):
        weigh_(grads, queues, [], None, Law(3.0))


@pytest.mark.parametrize("ops", [kernels, eager], ids=lambda ops: ops.__name__)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [None, 8.0])
def test_push_writes_the_oldest_row_of_what_is_accepted(device, ops, stored, scale):
    guarded = Guarded(device, shift=1)
    grads, queues = guarded.lists(SIZES), guarded.rings(SIZES, 3, stored)
    # bfloat16 holds these numbers exactly: the interpreter truncates where it should round.
    for grad in grads:
        grad.copy_((grad * 16).round().clamp_(-64, 64))
    counters = [torch.tensor(turn, device=device) for turn in range(len(SIZES))]
    accepted = torch.tensor([index % 3 != 1 for index in range(len(SIZES))], device=device)
    grad_scale = None if scale is None else torch.tensor(scale, device=device)
    expected = [queue.clone() for queue in queues]
    for index, (rows, grad) in enumerate(zip(expected, grads, strict=True)):
        if index % 3 != 1:
            rows[index % 3] = (grad / (scale or 1.0)).to(stored)
    before = [grad.clone() for grad in grads]
    ops.push_(grads, queues, counters, accepted, grad_scale=grad_scale)
    for mine, theirs in zip([*queues, *grads], [*expected, *before], strict=True):
        assert torch.equal(mine, theirs)
    assert [int(c) for c in counters] == [i + (i % 3 != 1) for i in range(len(SIZES))]
    guarded.check()
