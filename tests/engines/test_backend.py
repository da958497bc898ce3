"""The three engines can stand in for each other: the same names, the same arguments."""

import inspect

import pytest
import torch
from kernel_cases import INTERPRETED, QUIET

from gq_triton import GQSGD, GQAdamW, compiled, eager, kernels
from gq_triton.ring import flat

pytestmark = QUIET
ENGINES = [kernels, compiled, eager]
# What the rest of the package asks an engine for.
OPERATIONS = [
    "all_finite", "channel_sums", "combine", "gqadamw_", "gqsgd_", "position_sums", "push_",
    "queue_statistics", "weigh_",
]  # fmt: skip
interpreted = pytest.mark.skipif(not INTERPRETED, reason="Kernels are compiled here, for CUDA.")
BACKENDS = ["torch", "numba", pytest.param("triton", marks=interpreted)]


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.__name__)
def test_an_engine_has_what_it_lists(engine):
    assert [name for name in engine.__all__ if not hasattr(engine, name)] == []


@pytest.mark.parametrize("name", OPERATIONS)
def test_engines_take_the_same_arguments(name):
    signatures = [inspect.signature(getattr(engine, name)) for engine in ENGINES]
    parameters = [[(p.name, p.kind, p.default) for p in s.parameters.values()] for s in signatures]
    assert parameters[0] == parameters[1] == parameters[2]


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
