# Queues are full where the oracle's are asked for, and gradients are there.
# pyright: reportArgumentType=false, reportOperatorIssue=false
"""A queue in bytes: what it holds, how far weights are off, and the doors that use it.

``reference.float8`` and ``reference.float8_rows`` say what a byte keeps; the bound of the weights
is that of docs/method.md.
"""

import copy
import math

import pytest
import torch
from optim_cases import Oracle, adamw, parameters, set_gradients, sgd, small_parameters, train
from torch import nn

from gq_triton import GQSGD, GQAdamW, GradQueue, kernels, reference
from gq_triton.engines import compiled, eager
from gq_triton.float8 import (
    BYTE,
    EXPONENT_HIGH,
    LARGEST,
    convert,
    decode,
    encode,
    replace_,
    significant,
    stored_type,
    wire_type,
)
from gq_triton.law import Law
from gq_triton.testing import assert_ulps, weight_ulps

L = 5


def trajectory(steps=30, n=700):
    """Return gradients (steps, n): noise of any scale, constants, zeros and rare large ones."""
    generator = torch.Generator().manual_seed(0)
    grads = torch.randn(steps, n, generator=generator)
    grads *= torch.exp2(torch.randint(-110, 100, (n,), generator=generator).float())
    grads[:, :50] *= torch.exp(4 * torch.randn(steps, 50, generator=generator))
    grads[:, 50:60], grads[:, 60:70] = 0.1, 0.0
    grads[:, 70:80] = torch.where(torch.arange(steps)[:, None] % 9 == 8, -6.0, 1.0)
    grads[:, 80:90] += 1e3 * grads[0, 80:90]
    grads[:, 90:95] = 3e37 * torch.randn(steps, 5, generator=generator).sign()
    return grads


def test_a_ring_in_bytes_holds_what_the_oracle_says():
    grads = trajectory()
    ring, oracle = torch.zeros(L + 1, grads.shape[1], dtype=BYTE), reference.Ring(L)
    for step, grad in enumerate(grads):
        rounded = significant(grad)
        assert torch.equal(rounded.double(), reference.float8(grad))
        replace_(ring, step % L, rounded)
        oracle.push(grad, "float8")
        if step >= L:
            newest = [(step - age) % L for age in reversed(range(L))]
            assert torch.equal(decode(ring)[newest].double(), oracle.newest())
    again = convert(convert(ring, torch.float32), BYTE)
    assert torch.equal(decode(again), decode(ring))
    rows = reference.float8_rows(reference.float8(grads[:L]))
    assert torch.equal(decode(encode(grads[:L])).double(), rows)


def test_numbers_beyond_the_range_are_the_largest():
    assert significant(torch.tensor([3e38, -math.inf, 1e300]).double()).tolist() == [
        LARGEST, -LARGEST, LARGEST,
    ]  # fmt: skip
    assert significant(torch.tensor([65504.0, math.inf, -0.1]).half()).tolist() == [
        65536.0, LARGEST, -51 / 512,
    ]  # fmt: skip
    # Nor does another type of queue get an infinity, from bytes or from a wider type.
    rows = torch.tensor([[1e6, math.inf, -(2.0**70), -1.0]])
    for ring in (rows, encode(rows)):
        assert convert(ring, torch.float16).tolist() == [[65504.0, 65504.0, -65504.0, -1.0]]
    ring = encode(torch.tensor([[LARGEST, 0.0], [1.0, 0.0]]))
    assert int(ring[-1].max()) == EXPONENT_HIGH
    assert decode(ring).tolist() == [[LARGEST, 0.0], [0.0, 0.0]]
    assert (stored_type("float8", torch.float64), stored_type(None, BYTE)) == (BYTE, BYTE)
    types = wire_type("float8", torch.float32), wire_type(torch.bfloat16, torch.float32)
    assert types == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(("offset", "size"), [(0, 0.0083), (1, 0.0142), (3, 0.0355), (10, 0.113)])
def test_the_error_of_z_has_the_bound_of_the_method(offset, size):
    """The bound takes the exact mean, sigma and largest gradient of each element."""
    generator = torch.Generator().manual_seed(1)
    grads = offset + torch.randn(4 * L, 4000, generator=generator, dtype=torch.float64)
    grads *= torch.exp2(20 * torch.rand(4000, generator=generator, dtype=torch.float64))
    oracle = reference.Ring(L)
    seen, errors = 0.0, []
    for step, grad in enumerate(grads):
        stored, queue = oracle.newest(), grads[max(step - L, 0) : step]
        if stored is not None:
            mu, sigma = queue.mean(dim=0), queue.std(dim=0, correction=0)
            z = (grad - mu).abs() / sigma
            # Each row has met the L - 1 before and after it in the queue.
            row = 2.0**-6 * grads[max(step - 2 * L, 0) : step].abs().amax(dim=0)
            bound = (2.0**-6 * grad.abs() + row * (1 + z)) / (sigma - row)
            known = sigma > row
            exact = z.clamp(1 / 3, 3)
            error = (reference.scarcity_weight(grad, stored, queue_dtype="float8") - exact).abs()
            assert (error <= bound)[known].all()
            errors.append(error / exact)
            seen = max(seen, float((error / bound)[known].max()))
        oracle.push(grad, "float8")
    assert seen > 0.2, "the bound says something"
    assert float(torch.cat(errors).square().mean().sqrt()) == pytest.approx(size, rel=0.1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize("ops", [eager, compiled, kernels], ids=["torch", "numba", "triton"])
def test_engines_weigh_and_queue_as_the_oracle(ops):
    grads = trajectory(steps=2 * L + 2)
    ring, count = [torch.zeros(L + 1, 700, dtype=BYTE)], [torch.tensor(0)]
    oracle = reference.Ring(L)
    one = torch.ones(1, dtype=torch.float64)
    grads = list(grads.unbind(0))
    for grad in grads:
        queue = oracle.newest()
        expected = reference.weighted_gradient(grad, queue, queue_dtype="float8")
        if queue is not None and (ops is eager or grad is grads[-1]):
            weights = reference.scarcity_weight(grad, queue, queue_dtype="float8")
            statistics = torch.empty(2, len(grad))
            ops.queue_statistics(ring[0], count[0], statistics)
            shares = dict(inverse_shares=one, mixture=one, sigma_scales=one)
            for read, counter in ((ring[0], count[0]), (statistics, None)):
                combined, raw, table = ops.combine(
                    grad[None], read, counter, Law(3.0), queue_dtype=BYTE, **shares
                )
                # Statistics round the mean once: an error of |mu| / sigma ulps.
                sigma = queue.std(dim=0, correction=0)
                near = (queue.mean(dim=0).abs() < 100 * sigma) | (sigma == 0)
                near |= torch.tensor(counter is not None)
                assert_ulps(combined[near], expected[near], weight_ulps(3.0, L) + 100)
                assert torch.equal(raw, grad)
                assert abs(float(table[:, 2].sum() - weights.sum())) < 1e-3 * len(grad)
        weighted = [grad.clone()]
        ops.weigh_(weighted, ring, count, None, Law(3.0))
        assert_ulps(weighted[0], expected, weight_ulps(3.0, L))
        oracle.push(grad, "float8")
    other, number = [torch.zeros_like(ring[0])], [torch.tensor(0)]
    for grad in grads:
        ops.push_([grad], other, number, None)
    assert torch.equal(other[0], ring[0])
    assert int(count[0]) == int(number[0]) == len(grads)


@pytest.mark.parametrize("variant", [sgd(momentum=0.9), adamw()], ids=["sgd", "adamw"])
@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_the_optimizers_agree_with_the_oracle(variant, backend):
    dtype = torch.float64 if backend == "torch" else torch.float32
    exact = {"rtol": 1e-12, "atol": 1e-12} if backend == "torch" else {"rtol": 1e-4, "atol": 1e-5}
    params = parameters(dtype)
    optimizer = variant.build(params, queue_length=3, queue_dtype="float8", backend=backend)
    oracles = [Oracle(p, variant, length=3, rho=3.0, queue_dtype="float8") for p in params]
    for step in range(9):
        set_gradients(params, step)
        optimizer.step()
        for param, oracle in zip(params, oracles, strict=True):
            oracle.step(param.grad)
            torch.testing.assert_close(param.detach().double(), oracle.param, **exact)
    for param in params:
        ring = optimizer.state[param]["queue"]
        assert (ring.dtype, ring.shape) == (torch.uint8, (4, *param.shape))
        assert ring.untyped_storage().nbytes() == 4 * param.numel()


def test_lemma_3_3_holds_in_bytes():
    """u and C are far less than 8 apart, and exact in 6 bits: so are phi, 1/rho and rho."""
    param = nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = GQSGD([param], 0.5, 0.9, queue_length=3, queue_dtype="float8")
    found = []
    for step in range(1, 28):
        param.grad = torch.tensor(-6.0 if step % 9 == 0 else 1.0, dtype=torch.float64)
        optimizer.step()
        found.append(float(optimizer.state[param]["momentum_buffer"]))
    golden = [-15.3312648900, -21.6927373411, -24.1573021089]
    assert found[8::9] == pytest.approx(golden, abs=6e-11)


def test_a_constant_gradient_is_constant_and_powers_of_two_change_no_weight():
    weights = []
    for scale in (1.0, -(2.0**-80), 2.0**60):
        param = nn.Parameter(torch.zeros(300))
        optimizer = GQSGD([param], 1.0, queue_dtype="float8")
        generator = torch.Generator().manual_seed(0)
        for _ in range(L + 4):
            grad = torch.randn(300, generator=generator)
            grad[:100] = 0.1 * torch.arange(1, 101)
            param.data.zero_()
            param.grad = grad * scale
            optimizer.step()
        weights.append(-param.detach() / param.grad)
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])
    assert torch.allclose(weights[0][:100], torch.tensor(1 / 3))


def test_checkpoints_convert():
    """A loaded queue takes the type that its group is then given; the plug-in's takes its own."""
    for kind in (GQSGD, GQAdamW):
        params = small_parameters()
        optimizer = kind(params, lr=0.1, queue_length=3, backend="torch")
        train(optimizer, params, 5)
        exact = optimizer.state[params[0]]["queue"]
        resumed = kind(small_parameters(), lr=0.1)
        twins = resumed.param_groups[0]["params"]
        for queue_dtype in ("float8", torch.bfloat16, torch.float32, "float8"):
            resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            resumed.param_groups[0]["queue_dtype"] = queue_dtype
            train(resumed, twins, 1, start=5)
            ring = resumed.state[twins[0]]["queue"]
            kept = convert(ring, torch.float32)
            assert ring.dtype == stored_type(queue_dtype, torch.float32)
            assert torch.allclose(kept[[0, 1]], exact[[0, 1]], rtol=2.0**-6, atol=0.02)
            back = kind(small_parameters())
            back.load_state_dict(copy.deepcopy(resumed.state_dict()))
            assert torch.equal(back.state[back.param_groups[0]["params"][0]]["queue"], ring)
        # Between two steps, too.
        optimizer.param_groups[0]["queue_dtype"] = "float8"
        train(optimizer, params, 1, start=5)
        assert optimizer.state[params[0]]["queue"].dtype == BYTE
    model = nn.Linear(1, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    queue = GradQueue(model, queue_length=2)
    queue.attach(optimizer)
    (model.bias * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    optimizer.step()
    narrow = GradQueue(nn.Linear(1, 3), queue_length=2, queue_dtype="float8")
    state = {}
    for _ in range(2):
        narrow.load_state_dict(queue.state_dict())
        narrow._queues.init_state()
        state = narrow.state_dict()
        assert state["queue"]["bias"].dtype == BYTE
        assert decode(state["queue"]["bias"]).tolist() == [[1, 2, 3], [0, 0, 0]]
        queue.load_state_dict(state)
        queue._queues.init_state()
        assert queue.state_dict()["queue"]["bias"].tolist() == [[1, 2, 3], [0, 0, 0]]
    state["queue"]["bias"][-1] = 255
    with pytest.raises(ValueError, match="exponents of a queue in bytes must be at most 253"):
        narrow.load_state_dict(state)


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_parameters_of_16_bits_have_a_queue_in_bytes(backend):
    for dtype in (torch.float16, torch.bfloat16):
        params = small_parameters(dtype)
        train(GQSGD(params, 0.1, queue_length=2, queue_dtype="float8", backend=backend), params, 4)
        assert all(bool(param.isfinite().all()) for param in params)
