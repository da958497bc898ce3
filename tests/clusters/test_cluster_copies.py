"""Copies, files and recordings of a model with clusters hold the model alone and leave it alone."""

import copy
import functools
import io
import pickle
import subprocess
import sys
import warnings
from functools import partial
from types import MethodType

import pytest
import torch
from cluster_cases import GPT
from torch import nn

from gq_triton import GradQueue


class Attended(nn.Module):
    """A model with a time-major layer, a hook of its user, and state of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.inner = nn.MultiheadAttention(6, 2)
        self.inner.requires_grad_(False)
        self.head = nn.Linear(6, 2)
        self.first.register_forward_hook(doubled)

    def forward(self, x):
        return self.head(self.norm(self.first(x)).relu())


def doubled(module, args, output):
    return output * 2


class WithState(nn.Module):
    """A layer that says itself what of it is kept."""

    def __init__(self):
        super().__init__()
        self.layer, self.cache = nn.Linear(4, 2), torch.ones(1)

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "cache"}

    def forward(self, x):
        return self.layer(x)


MODELS = {
    "layers": (lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), "0"),
    "attended": (Attended, "norm"),
    "output": (Attended, "output_gradient"),
    "own state": (lambda: nn.Sequential(nn.Linear(4, 4), WithState()), "0"),
}
X = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))


class Run:
    """A model with clusters in training."""

    def __init__(self, make, features):
        torch.manual_seed(0)
        self.model = make()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.queue = GradQueue(self.model, n_clusters=2, features=features, queue_length=2)
        self.handle = self.queue.attach(self.optimizer)

    def steps(self, count):
        for _ in range(count):
            self.optimizer.zero_grad()
            self.model(X).square().mean().backward()
            self.optimizer.step()


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def forward_of_class(module, x):
    return type(module).forward(module, x)


@functools.cache
def strict_export_takes_forwards_of_instances():
    """Torch 2.8 exports no model in strict mode whose modules have a ``forward`` set on them."""
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    for module in (model, model[0]):
        module.forward = MethodType(forward_of_class, module)
    try:
        torch.export.export(model, (torch.randn(2, 3),), strict=True)
    except AssertionError:
        return False
    return True


def exported(model, strict=False):
    if strict and not strict_export_takes_forwards_of_instances():
        # A limit of torch 2.8, found above without this package; docs/design.md names it.
        pytest.skip("this torch exports no model in strict mode whose modules have own forwards")
    program = torch.export.export(model, (X,), strict=strict)
    names = {str(node.target) for node in program.graph.nodes}
    assert not any("gq_triton" in name for name in names), names
    return program.module()


def traced(model):
    with warnings.catch_warnings():  # torch recommends export
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.trace(model, X)


COPIES = [copy.deepcopy, copy.copy, saved_and_loaded, pickled]
RECORDINGS = [exported, partial(exported, strict=True), traced, torch.no_grad()(traced)]
models = pytest.mark.parametrize("kind", MODELS)


def name_of(make):
    inner = getattr(make, "func", make)
    return inner.__name__ + ("_strict" if inner is not make else "")


def assert_goes_on(run, kind):
    """The next steps are those of a run of which nobody made a copy."""
    twin = Run(*MODELS[kind])
    twin.steps(2)
    for one in (run, twin):
        one.steps(3)
    assert run.queue.digest() == twin.queue.digest()
    for param, other in zip(run.model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(param, other, rtol=0, atol=0)
    assert "forward" in vars(next(m for m in run.model.modules() if isinstance(m, nn.Linear)))


@pytest.mark.slow
@pytest.mark.parametrize("make", COPIES, ids=name_of)
@models
def test_a_copy_is_the_model_alone(kind, make):
    run = Run(*MODELS[kind])
    run.steps(2)
    made = make(run.model)
    if make is not copy.copy:  # whose layers are the model's
        assert b"gq_triton" not in pickle.dumps(made)
        made(X).square().mean().backward()
        bare = MODELS[kind][0]()
        bare.load_state_dict(run.model.state_dict())
        bare(X).square().mean().backward()
        for param, other in zip(made.parameters(), bare.parameters(), strict=True):
            if other.grad is None:
                assert param.grad is None
            else:
                torch.testing.assert_close(param.grad, other.grad, rtol=0, atol=0)
        queue = GradQueue(made, n_clusters=2, features=MODELS[kind][1])
        queue.attach(torch.optim.SGD(made.parameters(), lr=0.1))
    assert_goes_on(run, kind)


@pytest.mark.slow
@pytest.mark.parametrize("make", RECORDINGS, ids=name_of)
@models
def test_a_recording_is_of_the_model_alone(kind, make):
    run = Run(*MODELS[kind])
    run.steps(2)
    run.model.eval()
    with torch.no_grad():
        wanted = run.model(X)
        torch.testing.assert_close(make(run.model)(X), wanted)
    torch.testing.assert_close(make(run.model)(X), wanted)
    run.model.train()
    assert_goes_on(run, kind)


@pytest.mark.slow
def test_a_recording_between_a_forward_pass_and_its_backward_pass():
    run = Run(*MODELS["layers"])
    run.steps(2)
    for _ in range(3):
        run.optimizer.zero_grad()
        loss = run.model(X).square().mean()
        exported(run.model)
        traced(run.model)
        copy.deepcopy(run.model)
        loss.backward()
        run.optimizer.step()
    twin = Run(*MODELS["layers"])
    twin.steps(5)
    assert run.queue.digest() == twin.queue.digest()


def test_once_the_handle_is_removed_nothing_is_left():
    run = Run(*MODELS["attended"])
    before = [dict(vars(part)) for part in Attended().modules()]
    run.handle.remove()
    for part, names in zip(run.model.modules(), before, strict=True):
        assert vars(part).keys() == names.keys()


@pytest.mark.slow
def test_a_saved_model_needs_no_package_to_be_loaded(tmp_path):
    run = Run(*MODELS["layers"])
    run.steps(1)
    file = tmp_path / "model.pt"
    torch.save(run.model, file)
    code = f"""
import sys, torch
model = torch.load({str(file)!r}, weights_only=False)
model(torch.ones(2, 4)).sum().backward()
assert not [name for name in sys.modules if name.startswith("gq_triton")]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_state_dict_keys_are_the_models_own():
    run = Run(*MODELS["attended"])
    assert run.model.state_dict().keys() == Attended().state_dict().keys()


def test_a_model_with_tied_weights_and_positions():
    torch.manual_seed(0)
    model = GPT()
    queue = GradQueue(model, n_clusters=2, features="output_gradient")
    queue.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    made = pickled(model)
    assert made.state_dict().keys() == model.state_dict().keys()
    assert len(list(made.parameters())) == len(list(model.parameters()))
