"""A step of the optimizer may be compiled: alone, within a function, or with a closure."""

import pytest
import torch
from torch import nn

from gq_triton import GQSGD, GradQueue
from gq_triton.loss_scale import ScalerWatch


def ours(params):
    return GQSGD(params, lr=0.1, momentum=0.9, backend="torch")


def attached(params):
    optimizer = torch.optim.SGD(params, lr=0.1)
    GradQueue(nn.ParameterList(params), backend="torch").attach(optimizer)
    return optimizer


def watched(params):
    """As under DDP, whose state looks for a forgotten loss scaler in the first step."""
    optimizer = torch.optim.SGD(params, lr=0.1)
    vars(optimizer)["watch"] = ScalerWatch(params, "there is one")
    return optimizer


@pytest.mark.slow
@pytest.mark.parametrize("make", [ours, attached, watched])
def test_a_compiled_step_is_the_step(make):
    """Dynamo read the addresses of its own stand-ins for tensors, and failed in the first step."""
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        layer = nn.Linear(3, 2)
        optimizer = make([*layer.parameters()])
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for _ in range(2):
            optimizer.zero_grad()
            layer(torch.randn(4, 3)).square().sum().backward()
            step()
        results.append([layer.weight, layer.bias])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
