"""What a CPU without Numba is told, once per process, of the time of its steps."""

import warnings

import pytest
import torch

from gq_triton import GQSGD, GradQueue, engines

CPU = torch.device("cpu")
SAID = "steps on the CPU run on plain torch, several times slower than with Numba: pip install"


@pytest.fixture(autouse=True)
def without_numba(monkeypatch):
    """Let Numba seem absent, in a process that was told nothing yet."""
    monkeypatch.setattr(engines, "_installed", lambda package: False)
    monkeypatch.setattr(engines, "_noted", [])


def large():
    """Return one tensor that is just large enough, with memory for one element."""
    return [torch.zeros(()).expand(engines.LARGE)]


def test_a_large_model_is_told_once():
    with pytest.warns(RuntimeWarning, match=SAID):
        engines.note_plain_torch(CPU, "auto", large())
    engines.note_plain_torch(CPU, "auto", large())  # a second warning would be an error here


def test_tensors_of_one_launch_count_together():
    with pytest.warns(RuntimeWarning, match=SAID):
        engines.note_plain_torch(CPU, "auto", [tensor[::2] for tensor in large() * 2])


@pytest.mark.parametrize(
    ("device", "backend", "tensors"),
    [
        ("cpu", "auto", [torch.zeros(()).expand(engines.LARGE - 1)]),
        ("cpu", "torch", large()),
        ("cuda", "auto", large()),
    ],
    ids=["small", "by choice", "another device"],
)
def test_nothing_is_said_of(device, backend, tensors):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engines.note_plain_torch(torch.device(device), backend, tensors)
    assert engines._noted == []


def test_nothing_is_said_with_numba(monkeypatch):
    monkeypatch.setattr(engines, "_installed", lambda package: package == "numba")
    engines.note_plain_torch(CPU, "auto", large())
    assert engines._noted == []


def optimizer_step(model):
    optimizer = GQSGD(model.parameters(), lr=0.1)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()


def plug_in_step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    GradQueue(model).attach(optimizer)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("step", [optimizer_step, plug_in_step])
def test_a_step_tells(step, monkeypatch):
    monkeypatch.setattr(engines, "LARGE", 10)  # elements of the layer below
    with pytest.warns(RuntimeWarning, match=SAID):
        step(torch.nn.Linear(4, 2))
