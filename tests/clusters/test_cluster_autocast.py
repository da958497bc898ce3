# Gradients are there after a backward pass, whatever their types say.
# pyright: reportOptionalMemberAccess=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false
"""Autocast: a model has the same types as without the plug-in, and sums are not narrowed."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cluster_cases import GPT, MLP, ResNet, ViT
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from gq_triton import GradQueue
from gq_triton.cluster_grad.layers import norm

LABELS = torch.tensor([0, 2, 2, 0, 4, 0, 0, 2, 2])
BF16 = torch.bfloat16


def inputs(kind):
    torch.manual_seed(7)
    vectors, tokens = torch.randn(9, 6), torch.randint(0, 9, (9, 5))
    return {MLP: vectors, GPT: tokens}.get(kind, torch.randn(9, 2, 8, 8))


@pytest.mark.parametrize("kind", [MLP, GPT, ViT, lambda: ResNet(lambda c: nn.GroupNorm(2, c))])
def test_a_backward_pass_inside_autocast_narrows_nothing(kind):
    """Per-sample sums are in float32. Autocast would form products of them in bfloat16."""
    torch.manual_seed(0)
    models = [kind()]
    models.append(copy.deepcopy(models[0]))
    for model, inside in zip(models, (False, True), strict=True):
        queue = GradQueue(
            model, n_clusters=5, features="features", clusterer=lambda f: LABELS, rho=1.0
        )
        queue.attach(torch.optim.SGD(model.parameters(), lr=0.1))
        with torch.autocast("cpu", dtype=BF16):
            loss = (model(inputs(kind)).float() - 1).square().mean()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
    for actual, expected in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(actual.grad, expected.grad)


class Context:
    """The context of an autograd function of which only the input's gradient is wanted."""

    needs_input_grad = (True, *[False] * 6)
    saved_tensors: tuple[Any, ...] = ()

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors


class Types(TorchDispatchMode):
    """A mode that notes the types given to the normalisations that take no mixture on a GPU."""

    def __init__(self):
        super().__init__()
        self.seen: list[set[torch.dtype]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "native_layer_norm" in str(func) or "native_group_norm" in str(func):
            self.seen.append({a.dtype for a in args if isinstance(a, torch.Tensor)})
        return func(*args, **(kwargs or {}))


Layer = tuple[Callable[..., Tensor], Any, tuple[Any, ...]]
CALL = None, None
# The plain layer of input, weight and bias; our function; the further arguments of our function.
LAYERS: dict[str, Layer] = {
    "layer": (lambda x, *p: F.layer_norm(x, (8,), *p), norm._LayerNorm, (1e-5, CALL)),
    "rms": (lambda x, *p: F.rms_norm(x, (8,), *p), norm._RMSNorm, (None, CALL)),
    "group": (lambda x, *p: F.group_norm(x, 2, *p), norm._GroupNorm, (2, 1e-5, CALL)),
    "batch": (
        lambda x, *p: F.batch_norm(x, None, None, *p, training=True),
        norm._BatchNorm,
        ((None, None, True, 0.1, 1e-5), CALL),
    ),
}


@contextmanager
def autocast_of_a_gpu() -> Iterator[None]:
    """Enable autocast for CUDA; ``torch.autocast("cuda")`` refuses to without a GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    try:
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", BF16)
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


# The warning is that of torch's rms_norm, in the plain layer too, where autocast lacks it (2.11).
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.parametrize("weight_type", [torch.float32, BF16])
@pytest.mark.parametrize("input_type", [torch.float32, BF16])
@pytest.mark.parametrize("kind", LAYERS)
def test_types_on_a_gpu_are_those_of_the_plain_layer(kind, input_type, weight_type):
    """Fake tensors are subject to the lists of CUDA's autocast on any machine."""
    plain, function, rest = LAYERS[kind]
    types, context = Types(), Context()
    with FakeTensorMode(), torch.no_grad(), types:
        shape = (4, 8, 3) if kind in ("group", "batch") else (4, 3, 8)
        x = torch.empty(shape, device="cuda", dtype=input_type)
        params = [torch.empty(8, device="cuda", dtype=weight_type) for _ in range(2)]
        params = params[:1] if kind == "rms" else params
        with autocast_of_a_gpu():
            expected = plain(x, *params)
            out = function.forward(context, x, *params, *rest)
        assert out.dtype == expected.dtype
        assert context.saved_tensors[0].dtype == input_type  # saved in the type it came in
        grad = function.backward(context, torch.empty_like(out))[0]
    assert grad.dtype in (input_type, out.dtype)  # autograd converts it to the input's type
    assert all(len(seen) == 1 for seen in types.seen), types.seen
