"""Properties of the law, drawn by Hypothesis: both CPU engines against the float64 oracle.

The distance to the oracle is measured in ulps of the engine's type and bounded by
``testing.weight_ulps``. In float64 the oracle rounds as much as the engines do, so the truth is
exact rational arithmetic there.
"""

import decimal
import math
import os
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gq_triton import reference, scarcity_weight
from gq_triton.engines import compiled, eager
from gq_triton.engines.compiled.law import TILE
from gq_triton.engines.eager.law import BLOCK
from gq_triton.law import Law
from gq_triton.testing import assert_ulps, weight_ulps

ENGINES = {"torch": eager, "numba": compiled}
SIZES = (0, 1, BLOCK - 1, BLOCK, BLOCK + 1)
SMALL = (1, 7, TILE - 1, TILE, TILE + 1)

lengths = st.integers(1, 12)
# Numba compiles once for each length and type, which takes a second.
FEW = 1, 2, 5, 12
few_lengths = st.sampled_from(FEW)
seeds = st.integers(0, 2**32 - 1)
rhos = st.sampled_from([1.0, 1.25, 3.0, 10.0])
engines = pytest.mark.parametrize("ops", ENGINES.values(), ids=ENGINES)
examples = settings(deadline=None, max_examples=20, derandomize=True)


def gradients(count, n, seed, dtype):
    """Return a trajectory (count, n) whose columns are of every kind that a gradient can be."""
    generator = torch.Generator().manual_seed(seed)
    width = min(n, 2000)
    noise = torch.randn(count, width, generator=generator, dtype=torch.float64)
    kinds = [
        noise,
        torch.full_like(noise, 0.1),  # constant
        torch.where(noise > 1, -7.3, 0.1),  # sparse: constant most of the time
        1e3 + noise,  # a large mean against the spread
        noise * 10.0 ** (30 * torch.rand(width, generator=generator) - 15),  # any scale
        noise.round(),  # many zeros and ties
        noise * 1e-3 ** noise[:1].abs(),  # heavy tails
    ]
    mixed = noise.clone()
    for kind, columns in enumerate(kinds):
        mixed[:, kind :: len(kinds)] = columns[:, kind :: len(kinds)]
    repeats = -(-n // width) if n else 1
    return mixed.to(dtype).repeat(1, repeats)[:, :n].contiguous()


def draw_length(data, ops, least=1, most=12):
    """Draw a length from ``least`` to ``most``; for Numba one of few, except in make test-all."""
    if ops is eager or os.environ.get("GQ_TRITON_EVERY_CASE") == "1":
        return data.draw(st.integers(least, most))
    return data.draw(st.sampled_from([length for length in FEW if least <= length <= most]))


class Case:
    """A ring with the newest ``length`` gradients, ``extra`` gradients after it was first full."""

    def __init__(self, length, n, seed, dtype, queue_dtype=None, extra=0):
        history = gradients(length + extra + 1, n, seed, dtype)
        self.grad, self.count = history[-1].clone(), length + extra
        self.queue = torch.empty(length, n, dtype=queue_dtype or dtype)
        self.oracle = reference.Ring(length)
        for step, gradient in enumerate(history[:-1]):
            self.queue[step % length] = gradient
            self.oracle.push(gradient, queue_dtype)

    def weigh(self, ops, rho=3.0, length=None, finite=True, **options):
        """Return w * g, the queue and the counter after one call of an engine."""
        grads, queues = [self.grad.clone()], [self.queue.clone()]
        counters = [torch.tensor(self.count)]
        short = None if length is None else torch.tensor(length)
        flags = torch.tensor([finite])
        ops.weigh_(grads, queues, counters, flags, Law(rho, short, **options))
        return grads[0], queues[0], int(counters[0])


@pytest.mark.slow
@engines
@given(data=st.data(), n=st.sampled_from(SIZES), seed=seeds, extra=st.integers(0, 13), rho=rhos)
@settings(examples, max_examples=12)
def test_float32_is_within_ulps_of_the_oracle_at_every_size(ops, data, n, seed, extra, rho):
    length = draw_length(data, ops)
    case = Case(length, n, seed, torch.float32, extra=extra)
    weighted, queue, count = case.weigh(ops, rho)
    expected = reference.weighted_gradient(case.grad, case.oracle.newest(), rho=rho)
    assert_ulps(weighted, expected, weight_ulps(rho, length))
    slot = case.count % length
    assert torch.equal(queue[slot], case.grad), "the RAW gradient takes the oldest slot"
    kept = [row for row in range(length) if row != slot]
    assert torch.equal(queue[kept], case.queue[kept])
    assert count == case.count + 1


@pytest.mark.slow
@engines
@given(
    length=few_lengths,
    n=st.sampled_from(SMALL),
    seed=seeds,
    extra=st.integers(0, 13),
    rho=rhos,
    queue_dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
    grad_dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
)
@examples
def test_every_pair_of_types(ops, length, n, seed, extra, rho, queue_dtype, grad_dtype):
    """The gradient is compared after rounding to the queue's type; the product is not."""
    case = Case(length, n, seed, grad_dtype, queue_dtype, extra)
    weighted, queue, _ = case.weigh(ops, rho)
    expected = reference.weighted_gradient(case.grad, case.oracle.newest(), rho=rho)
    if grad_dtype == torch.bfloat16:
        assert_ulps(weighted, expected, 1.0)
    elif torch.promote_types(queue_dtype, grad_dtype) == torch.float64:
        # The oracle rounds to float64 too; the test with exact arithmetic below covers float64.
        assert_ulps(weighted.float(), expected, 1.0)
    else:
        assert_ulps(weighted, expected, weight_ulps(rho, length))
    assert torch.equal(queue[case.count % length], case.grad.to(queue_dtype))


@pytest.mark.slow
@engines
@given(data=st.data(), seed=seeds)
@examples
def test_a_shorter_effective_length_reads_the_newest_rows(ops, data, seed):
    length = draw_length(data, ops, least=2)
    used = draw_length(data, ops, most=length)
    case = Case(length, 300, seed, torch.float32, extra=data.draw(st.integers(0, 13)))
    weighted, _, _ = case.weigh(ops, length=used)
    expected = reference.weighted_gradient(case.grad, case.oracle.newest(used))
    assert_ulps(weighted, expected, weight_ulps(3.0, used))


@engines
@given(length=st.integers(2, 12), seed=seeds, missing=st.integers(1, 12))
@examples
def test_weight_is_1_until_the_queue_is_full(ops, length, seed, missing):
    case = Case(length, 100, seed, torch.float32)
    case.count = max(length - missing, 0)
    weighted, queue, count = case.weigh(ops)
    assert torch.equal(weighted, case.grad)
    assert torch.equal(queue[count - 1], case.grad)


@engines
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@given(length=lengths, seed=seeds, place=st.integers(0, 299))
@settings(examples, max_examples=10)
def test_a_gradient_that_is_not_finite_passes_and_is_not_queued(ops, bad, length, seed, place):
    case = Case(length, 300, seed, torch.float32)
    case.grad[place] = bad
    finite = ops.all_finite([case.grad, torch.ones(3)])
    assert finite.tolist() == [False, True]
    weighted, queue, count = case.weigh(ops, finite=bool(finite[0]))
    assert torch.equal(weighted.view(torch.int32), case.grad.view(torch.int32))
    assert torch.equal(queue, case.queue)
    assert count == case.count
    assert (scarcity_weight(case.grad, case.queue) == 1).all()


@engines
def test_all_finite_sees_one_bad_element_anywhere_and_survives_overflowing_sums(ops):
    big = torch.full((1000,), 3e38)
    assert ops.all_finite([big, -big, torch.zeros(0)]).tolist() == [True, True, True]
    for place in (0, 499, 999):
        for bad in (math.nan, math.inf, -math.inf):
            grad = big.clone()
            grad[place] = bad
            assert ops.all_finite([grad]).tolist() == [False]
    opposite = torch.tensor([math.inf, -math.inf])
    assert ops.all_finite([opposite]).tolist() == [False]


@given(length=lengths, seed=seeds, bad=st.sampled_from([math.nan, math.inf, -math.inf]))
@examples
def test_a_queue_that_is_not_finite_gives_weight_1_there_and_nowhere_else(length, seed, bad):
    case = Case(length, 50, seed, torch.float32)
    expected = scarcity_weight(case.grad, case.queue)
    case.queue[seed % length, 7] = bad
    weights = scarcity_weight(case.grad, case.queue)
    assert weights[7] == 1
    rest = torch.arange(50) != 7
    assert torch.equal(weights[rest], expected[rest])


@pytest.mark.slow
@engines
@given(
    data=st.data(),
    seed=seeds,
    exponent=st.sampled_from([-90, -20, -1, 1, 33, 60]),
    sign=st.sampled_from([-1.0, 1.0]),
)
@examples
def test_powers_of_two_and_the_sign_change_no_bit_of_a_weight(ops, data, seed, exponent, sign):
    length = draw_length(data, ops)
    case = Case(length, 512, seed, torch.float32)
    # Values lie on a grid, so that no deviation becomes subnormal.
    case.grad, case.queue = ((t * 2**12).round() for t in (case.grad, case.queue))
    case.grad, case.queue = (t.clamp(-(2**20), 2**20) for t in (case.grad, case.queue))
    before, _, _ = case.weigh(ops)
    factor = sign * 2.0**exponent
    case.grad, case.queue = case.grad * factor, case.queue * factor
    after, _, _ = case.weigh(ops)
    assert torch.equal(after, before * factor)


@pytest.mark.slow
@engines
@given(data=st.data(), seed=seeds)
@examples
def test_the_order_of_the_queue_does_not_matter(ops, data, seed):
    length = draw_length(data, ops, least=2)
    case = Case(length, 256, seed, torch.float32)
    expected = reference.weighted_gradient(case.grad, case.oracle.newest())
    order = torch.randperm(length, generator=torch.Generator().manual_seed(seed))
    case.queue = case.queue[order]
    weighted, _, _ = case.weigh(ops)
    assert_ulps(weighted, expected, weight_ulps(3.0, length))


@pytest.mark.slow
@engines
@given(data=st.data(), seed=seeds, exponent=st.integers(-20, 20))
@examples
def test_a_loss_scale_is_undone_in_the_queue_and_kept_in_the_gradient(ops, data, seed, exponent):
    length = draw_length(data, ops)
    case = Case(length, 256, seed, torch.float32)
    plain, queue, _ = case.weigh(ops)
    scale = 2.0**exponent
    case.grad = case.grad * scale
    scaled, scaled_queue, _ = case.weigh(ops, grad_scale=torch.tensor(scale))
    normal = plain.abs() > 1e-30
    assert torch.equal(scaled[normal], plain[normal] * scale)
    assert torch.equal(scaled_queue, queue)


def exact_weight(grad, queue, rho):
    """Return the weight of one number by rational arithmetic, rounded once to 50 digits."""
    q = [Fraction(value) for value in queue]
    mean = sum(q, Fraction(0)) / len(q)
    variance = sum(((value - mean) * (value - mean) for value in q), Fraction(0)) / len(q)
    error = Fraction(grad) - mean
    if variance == 0:
        return 1 / rho if error == 0 else rho
    with decimal.localcontext() as context:
        context.prec = 50
        square = Fraction(error * error) / variance
        z = (decimal.Decimal(square.numerator) / decimal.Decimal(square.denominator)).sqrt()
    return z if 1 / rho < z < rho else (1 / rho if z <= 1 / rho else rho)


def exact_ulps(actual, exact):
    """Return the distance to an exact weight in ulps of float64; the exact one is not rounded."""
    return float(abs(decimal.Decimal(actual) - decimal.Decimal(exact))) / math.ulp(float(exact))


@pytest.mark.slow
@pytest.mark.parametrize("which", [*ENGINES, "public", "oracle"])
@given(length=few_lengths, seed=seeds, rho=st.sampled_from([1.25, 3.0, 10.0]))
@examples
def test_float64_against_exact_rational_arithmetic(which, length, seed, rho):
    case = Case(length, 16, seed, torch.float64)
    if which in ENGINES:
        # With gradients that are powers of two the product w * g is exact.
        case.grad = torch.exp2(torch.frexp(case.grad).exponent.double())
        weights = case.weigh(ENGINES[which], rho)[0] / case.grad
    else:
        law = scarcity_weight if which == "public" else reference.scarcity_weight
        weights = law(case.grad, case.queue, rho=rho)
    for column, weight in enumerate(weights.tolist()):
        exact = exact_weight(case.grad[column].item(), case.queue[:, column].tolist(), rho)
        # The oracle takes deviations from the mean itself, whose rounding a large mean magnifies.
        offset = abs(case.queue[:, column].mean()) / case.queue[:, column].std(correction=0)
        slack = 4 * rho * offset.item() if which == "oracle" and offset.isfinite() else 0
        assert exact_ulps(weight, exact) <= weight_ulps(rho, length) + slack


@given(seed=seeds, length=lengths)
@examples
def test_public_law_accepts_any_shape_and_memory_order(seed, length):
    flat = Case(length, 24, seed, torch.float32)
    expected = scarcity_weight(flat.grad, flat.queue)
    for shape in ((24,), (2, 3, 4), (1, 24, 1)):
        weights = scarcity_weight(flat.grad.reshape(shape), flat.queue.reshape(length, *shape))
        assert weights.shape == shape
        assert torch.equal(weights.flatten(), expected)
    strided = scarcity_weight(
        flat.grad.reshape(4, 6).T, flat.queue.reshape(length, 4, 6).transpose(1, 2)
    )
    assert torch.equal(strided, expected.reshape(4, 6).T)
    number = scarcity_weight(flat.grad[0], flat.queue[:, 0])
    assert number.shape == ()
    assert number == expected[0]


@pytest.mark.parametrize(
    ("grad", "queue", "result"),
    [
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.bfloat16, torch.float64),
    ],
)
def test_type_of_the_weights(grad, queue, result):
    weights = scarcity_weight(torch.ones(3, dtype=grad), torch.ones(4, 3, dtype=queue))
    assert weights.dtype == result
    assert not weights.requires_grad


@pytest.mark.parametrize("ops", ENGINES.values(), ids=ENGINES)
def test_statistics_of_a_weighing(ops):
    case = Case(5, 4001, 3, torch.float32)
    # Noise removes discrete values, for which z may be rho itself up to rounding.
    case.grad.add_(torch.randn(4001, generator=torch.Generator().manual_seed(0)))
    grads, scale = [case.grad * 8], torch.tensor(8.0)
    counters, finite = [torch.tensor(case.count)], torch.tensor([True])
    table = ops.weigh_(grads, [case.queue], counters, finite, Law(3.0, grad_scale=scale))
    w = reference.scarcity_weight(case.grad, torch.stack(case.oracle.gradients))
    g = case.grad.double()
    expected = torch.stack(
        [g.square().sum(), (w * g).square().sum(), w.sum(), (w == 3).sum(), (w == 1 / 3).sum()]
    )
    torch.testing.assert_close(table[0].double(), expected.double(), rtol=1e-6, atol=0)
