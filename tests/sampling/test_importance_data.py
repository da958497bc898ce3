"""ImportanceLoader: what datasets and batches it reads, and what scoring leaves alone."""

import copy
import io
import time
from typing import Any

import pytest
import torch
from importance_cases import head, loader_of, planted
from torch import nn
from torch.utils.data import TensorDataset

from gq_triton.sampling import ImportanceLoader

# --- data


class Dicts(torch.utils.data.Dataset):
    def __init__(self):
        self.x, self.y = planted()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i) -> Any:
        return {"a": self.x[i, :2], "b": self.x[i, 2:], "labels": self.y[i]}


class Lists(Dicts):
    def __getitem__(self, i):
        return [self.x[i, :2], self.x[i, 2:], self.y[i]]


class Nested(Dicts):
    def __getitem__(self, i):
        return (self.x[i, :2], {"b": self.x[i, 2:], "name": str(i)}), int(self.y[i])


class Joined(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = head()

    def forward(self, a, b):
        b = b["b"] if isinstance(b, dict) else b
        return self.head(torch.cat([a, b], 1))


@pytest.mark.parametrize("kind", [Dicts, Lists, Nested])
def test_dicts_lists_and_strings(kind):
    data, model = kind(), Joined()
    loader = ImportanceLoader(data, model, "cross_entropy", 4, tau_th=0)
    by_score = 0
    for indices, inputs, targets, _ in loader:
        found = list(inputs.values()) if isinstance(inputs, dict) else list(inputs)
        if kind is Nested:
            assert found[1]["name"] == [str(i) for i in indices.tolist()]
            assert torch.equal(found[1]["b"], data.x[indices, 2:])
        else:
            assert torch.equal(found[1], data.x[indices, 2:])
        assert torch.equal(targets, data.y[indices])
        by_score = loader.costs[-1].steps_by_score
    assert by_score == 14


def time_major(samples):
    """Return inputs ``(T, B)`` with T = 12: as many steps as a presample has samples."""
    x = torch.stack([x.repeat(3) for x, _ in samples], dim=1)
    return {"x": x, "note": object()}, torch.stack([y for _, y in samples])


class TimeMajor(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = head()

    def forward(self, x, note):
        return self.head(x[:4].T)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_any_collate_fn_also_in_workers(workers):
    """12 samples of 12 steps: the first dimension is not that of the samples."""
    x, y = planted()
    loader = ImportanceLoader(
        TensorDataset(x, y), TimeMajor(), "cross_entropy", 4, tau_th=0, num_workers=workers,
        collate_fn=time_major if not workers else time_major_plain,
    )  # fmt: skip
    for indices, inputs, targets, _ in loader:
        assert torch.equal(inputs["x"][:4].T, x[indices])
        assert torch.equal(targets, y[indices])
        loader.model(**inputs)
    assert loader.costs[-1].steps_by_score > 5


def time_major_plain(samples):
    inputs, targets = time_major(samples)
    return {**inputs, "note": 0}, targets


def test_split_and_forward():
    x, y = planted()
    calls = []

    def forward(model, inputs):
        calls.append(len(inputs))
        return model(inputs)

    loader = ImportanceLoader(
        TensorDataset(y, x), head(), "cross_entropy", 4, tau_th=0, forward=forward,
        split=lambda batch: (batch[1], batch[0]),
    )  # fmt: skip
    for indices, inputs, targets, _ in loader:
        assert torch.equal(inputs, x[indices])
        assert torch.equal(targets, y[indices])
    assert set(calls) == {12, 4}


# --- what scoring leaves alone


def test_scoring_changes_no_mode_no_buffer_and_no_random_number():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    model[1].eval()
    loader = loader_of(model, tau_th=0)
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    state = torch.get_rng_state()
    modes = [m.training for m in model.modules()]
    for batch in loader:
        assert [m.training for m in model.modules()] == modes
        assert batch.weights.grad_fn is None
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert loader.costs[-1].scored > 0
    assert not model._forward_hooks


def test_a_copy_and_a_file_of_the_model_hold_no_loader():
    loader = loader_of()
    for batch in loader:
        twin = copy.deepcopy(loader.model)
        torch.save(loader.model, file := io.BytesIO())
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        twin(batch.inputs)
        loaded(batch.inputs)
        assert loader._gate._answer is None
        loader.model(batch.inputs)
        break


@pytest.mark.slow
def test_scoring_takes_at_most_1_1_forward_passes():
    layers = [nn.Linear(1024, 1024), nn.ReLU()] * 3
    model = nn.Sequential(*layers, nn.Linear(1024, 10))
    x, y = torch.randn(768, 1024), torch.randint(10, (768,))
    loader = ImportanceLoader(TensorDataset(x, y), model, "cross_entropy", 256)
    loader.costs.append(None)  # type: ignore[arg-type]
    loader.costs[-1] = type("Cost", (), {"scored": 0})()  # type: ignore[assignment]
    own, plain = [], []
    for _ in range(9):
        begin = time.perf_counter()
        loader._gate.run(x, y, 768)
        own.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        with torch.no_grad():
            model(x)
        plain.append(time.perf_counter() - begin)
    assert min(own) <= 1.1 * min(plain)
