"""The three engines can replace each other: they have the same operations and arguments."""

import inspect
import itertools
import math

import pytest
import torch
from kernel_cases import INTERPRETED, QUIET

from gq_triton import GQSGD, GQAdamW, kernels
from gq_triton.engines import Engine, compiled, eager
from gq_triton.law import Law
from gq_triton.ring import flat

pytestmark = QUIET
ENGINES = [kernels, compiled, eager]
OPERATIONS = sorted(name for name in dir(Engine) if not name.startswith("_"))
interpreted = pytest.mark.skipif(not INTERPRETED, reason="Kernels are compiled here, for CUDA.")
BACKENDS = ["torch", "numba", pytest.param("triton", marks=interpreted)]


def test_the_protocol_says_what_every_operation_does():
    assert len(OPERATIONS) == 17
    assert [name for name in OPERATIONS if not getattr(Engine, name).__doc__] == []


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.__name__)
def test_an_engine_offers_the_operations_of_the_protocol(engine):
    assert sorted(engine.__all__) == OPERATIONS


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.__name__)
def test_an_engine_takes_the_arguments_of_the_protocol(engine, name):
    def arguments(function):
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.kind, p.default) for p in parameters if p.name != "self"]

    assert arguments(getattr(engine, name)) == arguments(getattr(Engine, name))


@pytest.mark.slow
@pytest.mark.parametrize("make", [GQAdamW, lambda p, **o: GQSGD(p, lr=0.1, momentum=0.9, **o)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_parameter_with_holes_is_updated_in_place(backend, make):
    torch.manual_seed(0)
    holes = torch.randn(24, 2)[:, 1].requires_grad_()
    dense = holes.detach().clone().requires_grad_()
    assert holes.stride() == (2,)
    assert flat(holes.detach()).is_contiguous()
    pair = make([holes], backend=backend), make([dense], backend="torch")
    for _ in range(7):
        holes.grad = torch.randn(48)[::2]
        dense.grad = holes.grad.clone()
        for optimizer in pair:
            optimizer.step()
    # A few roundings per step differ between the engines; a stale copy would be off by lr.
    torch.testing.assert_close(holes, dense, rtol=1e-5, atol=1e-6)


def test_plain_torch_keeps_the_statistics_where_the_gradients_are():
    grads, queues = [torch.ones(3)], [torch.zeros(2, 3)]
    with torch.device("meta"):  # where a factory puts a tensor that names no device
        statistics = eager.weigh_(grads, queues, [torch.zeros((), device="cpu")], None, Law(3.0))
    assert statistics.device == grads[0].device


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("engine", [compiled, eager], ids=["numba", "torch"])
def test_one_element_that_is_not_finite_is_found_wherever_it_is(engine, dtype):
    largest = torch.finfo(dtype).max
    grads = [torch.full((7,), sign * largest, dtype=dtype) for sign in (1, -1)]
    grads += [torch.zeros(0, dtype=dtype), torch.zeros(3, 2, dtype=dtype)[:, 1]]
    for place, bad in itertools.product(range(7), (math.nan, math.inf, -math.inf)):
        grads.append(torch.zeros(7, dtype=dtype))
        grads[-1][place] = bad
    expected = [bool(torch.isfinite(grad).all()) for grad in grads]
    assert engine.all_finite(grads).tolist() == expected
    contiguous = [grad for grad in grads if grad.is_contiguous()]
    assert engine.all_finite(contiguous).tolist() == expected[:3] + expected[4:]
    assert engine.all_finite([]).tolist() == []


@pytest.mark.parametrize("engine", [compiled, eager], ids=["numba", "torch"])
def test_a_weight_does_not_depend_on_the_elements_beside_it(engine):
    """Some blocks need scaling, since a square underflows or overflows, and some do not."""
    torch.manual_seed(0)
    queue = torch.randn(5, 192) * 10.0 ** torch.linspace(-40, 25, 192)
    queue[:, ::3] = queue[0, ::3]  # constant
    grad = torch.where(torch.arange(192) % 2 == 0, queue[0], torch.randn(192))

    def weigh(*cuts):
        grads = [part.clone() for part in grad.split(cuts)]
        rings = [ring.clone() for ring in queue.split(cuts, dim=1)]
        engine.weigh_(grads, rings, [torch.tensor(7) for _ in cuts], None, Law(3.0))
        return torch.cat(grads), torch.cat(rings, dim=1)

    whole, parts = weigh(192), weigh(64, 64, 64)
    assert bool(whole[0].isfinite().all())
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("ops", [eager, compiled], ids=["torch", "numba"])
def test_a_gradient_that_is_negated_in_memory_has_its_sign(ops):
    """So is the imaginary part of a conjugate; that of one number is contiguous."""
    number, queue = torch.randn(1), torch.randn(3, 1)
    negated = torch.complex(torch.zeros(1), -number).conj().imag
    assert negated.is_neg()
    assert torch.equal(negated, number)
    rings, grads = [queue.clone(), queue.clone()], [number.clone(), negated]
    for ring, grad in zip(rings, grads, strict=True):
        ops.weigh_([grad], [ring], [torch.tensor(3)], None, Law(3.0))
    assert torch.equal(*rings)
    torch.testing.assert_close(*grads)
