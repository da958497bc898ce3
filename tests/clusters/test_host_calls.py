"""The host's part of a step, counted in calls: they depend on neither the machine nor its load.

``python benchmarks/host.py`` counts those of whole models, times them and compares two checkouts.
"""

import sys
from unittest import mock

import pytest
import torch
from kernel_cases import INTERPRETED
from meta_steps import PACKAGE, step_of, text_case, watching
from triton.runtime import interpreter

from gq_triton import GQSGD, GQAdamW

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="Launches are stubbed in the interpreter.")


def calls_of(step) -> int:
    """Return the calls of the package's functions in a step, and of C functions in them."""
    found = 0

    def seen(frame, event, _):
        nonlocal found
        own = frame.f_code.co_filename.startswith(PACKAGE) and "/tasks/" not in str(frame.f_code)
        found += own and event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(seen)
    try:
        step()
    finally:
        sys.setprofile(before)
    return found


# Calls for one more block of a decoder: 6 layers with 12 parameters. They may only become fewer; a
# change that saves some lowers the number.
BLOCK = 2817


@pytest.mark.slow
def test_calls_for_a_block_of_a_clustered_step():
    counts = []
    for blocks in (1, 2):
        model, batch, loss, features = text_case(blocks, 16, 2, 16, 5, 7)
        step = step_of(model, batch, loss, n_clusters=2, features=features)
        with watching():
            step()
            step()
            counts.append(calls_of(step))
    assert counts[1] - counts[0] <= BLOCK


@pytest.mark.parametrize(("kind", "most"), [(GQSGD, 129), (GQAdamW, 136)])
def test_calls_of_an_optimizers_step_do_not_grow_with_the_parameters(kind, most):
    counts = []
    for number in (3, 30):
        params = [torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(number)]
        for param in params:
            param.grad = torch.zeros(2, 2)
        optimizer = kind(params, lr=0.1, backend="triton", queue_length=2)
        with mock.patch.object(interpreter.GridExecutor, "__call__"):
            for _ in range(5):  # then nobody else can move the states
                optimizer.step()
            counts.append(calls_of(optimizer.step))
    assert counts[0] == counts[1] <= most
