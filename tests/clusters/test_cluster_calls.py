# pyright: reportOptionalMemberAccess=false, reportArgumentType=false
"""Layers are called, and their outputs changed in place, in every way that torch allows."""

import copy

import pytest
import torch
from torch import nn

from gq_triton import GradQueue


class Conv1D(nn.Module):
    """A stand-in with the name and the arithmetic of ``transformers.pytorch_utils.Conv1D``."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))
        self.bias = nn.Parameter(torch.zeros(6))

    def forward(self, x):
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return flat.view(*x.shape[:-1], -1)


Conv1D.__module__ = "transformers.pytorch_utils"

# A layer, the shape of its input, and torch's name of the input.
CASES = {
    "linear": (lambda: nn.Linear(4, 6), (8, 4), "input"),
    "linear, positions": (lambda: nn.Linear(4, 6), (8, 3, 4), "input"),
    "linear, positions, no bias": (lambda: nn.Linear(4, 6, bias=False), (8, 3, 4), "input"),
    "Conv1D": (Conv1D, (8, 3, 4), "x"),
    "conv1d": (lambda: nn.Conv1d(4, 6, 1), (8, 4, 5), "input"),
    "conv2d": (lambda: nn.Conv2d(4, 6, 1), (8, 4, 5, 5), "input"),
    "conv3d": (lambda: nn.Conv3d(4, 6, 1), (8, 4, 5, 5, 5), "input"),
    "embedding": (lambda: nn.Embedding(9, 6), (8, 5), "input"),
    "layer norm": (lambda: nn.LayerNorm(4), (8, 3, 4), "input"),
    "rms norm": (lambda: nn.RMSNorm(4), (8, 3, 4), "x"),
    "group norm": (lambda: nn.GroupNorm(2, 4), (8, 4, 5), "input"),
    "batch norm": (lambda: nn.BatchNorm1d(4), (8, 4, 5), "input"),
    "batch norm 2d": (lambda: nn.BatchNorm2d(4), (8, 4, 5, 5), "input"),
}


class Called(nn.Module):
    def __init__(self, layer, keyword):
        super().__init__()
        self.layer, self.keyword = layer, keyword

    def forward(self, x):
        return nn.functional.relu_(self.layer(**{self.keyword: x}))


def compare(model, batch, run):
    """Check that the gradients are torch's own with rho 1."""
    plain = copy.deepcopy(model)
    queue = GradQueue(model, n_clusters=2, features="layer", rho=1.0)
    queue.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    for each in (run, plain):
        each(batch).square().mean().backward()
    for actual, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-10, atol=1e-12)


def made(case):
    torch.manual_seed(0)
    make, shape, keyword = CASES[case]
    layer = make().double()
    batch = torch.randn(shape, dtype=torch.float64)
    if isinstance(layer, nn.Embedding):
        batch = torch.randint(0, 9, shape)
    return layer, batch, keyword


@pytest.mark.parametrize("case", CASES)
def test_keywords_and_activations_in_place(case):
    layer, batch, keyword = made(case)
    model = Called(layer, keyword)
    compare(model, batch, model)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["linear, positions", "rms norm"])
def test_keywords_and_activations_in_place_compiled(case):
    torch._dynamo.reset()
    layer, batch, keyword = made(case)
    model = Called(layer, keyword)
    compare(model, batch, torch.compile(model, fullgraph=True, backend="aot_eager"))


def test_a_frozen_layer_and_an_evaluation_take_keywords_too():
    layer, batch, keyword = made("linear")
    model = Called(layer, keyword)
    model.layer.bias.requires_grad_(False)
    compare(model, batch, model)
    with torch.no_grad():
        assert model(batch).shape == (8, 6)
    model.layer.requires_grad_(False)
    assert not model(batch).requires_grad


def test_an_unknown_keyword_is_torchs_own_error():
    layer, batch, _ = made("linear")
    model = Called(layer, "wrong")
    GradQueue(model, n_clusters=2, features="layer").attach(torch.optim.SGD(model.parameters()))
    with pytest.raises(TypeError, match="unexpected keyword argument 'wrong'"):
        model(batch)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_parameter_that_came_later_is_refused_in_words(replaced):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = GradQueue(model, n_clusters=2, features="0").attach(optimizer)
    batch, others = torch.randn(8, 3), copy.deepcopy(model)
    weights = dict(others.named_parameters())
    if replaced:
        model[0].weight = weights["0.weight"]
    given = {} if replaced else weights
    with pytest.raises(RuntimeError, match=r"the model has a parameter of shape \(4, 3\) that its"):
        torch.func.functional_call(model, given, (batch,))
    handle.remove()
    torch.func.functional_call(model, weights, (batch,)).sum().backward()
    assert weights["2.bias"].grad is not None
