"""What a call of measure_variance leaves as it is, and what it refuses."""

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from variance_cases import exact, small

from gq_triton import GradQueue
from gq_triton.variance import (
    SVRG,
    AnchoredBatches,
    ImportanceBatches,
    StratifiedBatches,
    UniformBatches,
    measure_variance,
)

# --- T-GC15: the training goes on as if nothing had been measured


class Noisy(torch.utils.data.Dataset):
    """A dataset with random numbers of every kind, as data augmentation has."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        x, y = self.data[index]
        return x + 0.1 * torch.rand(()) + 0.1 * random.random() + 0.1 * np.random.rand(), y


@pytest.mark.parametrize("exactly", [False, True])
def test_tgc15_measuring_does_not_disturb_the_training(exactly):
    data = Noisy(small(12)[1])

    def train(measures):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        layers = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 3)
        model = nn.Sequential(*layers).double()
        model[1].eval()
        model[1].train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        svrg = SVRG(copy.deepcopy(model), "cross_entropy", data, every=10)
        for x, y in torch.utils.data.DataLoader(data, batch_size=4, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            if measures:
                svrg.snapshot()
                grads = [p.grad for p in model.parameters()]
                some = {
                    "SG-B": UniformBatches(2),
                    "GC": StratifiedBatches(torch.arange(12) // 4),
                    "IS": ImportanceBatches(2),
                    "SVRG": AnchoredBatches(svrg, 2),
                }
                measure_variance(model, "cross_entropy", data, some, exactly, draws=3)
                assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
                assert all(module.training for module in model.modules())
            optimizer.step()
        last = torch.rand(3), random.random(), np.random.rand()
        return [t.clone() for t in model.state_dict().values()], last

    plain, watched = train(False), train(True)
    for one, other in zip(plain[0], watched[0], strict=True):
        assert torch.equal(one, other)
    assert torch.equal(plain[1][0], watched[1][0])
    assert plain[1][1:] == watched[1][1:]


def test_tgc15_the_clusters_of_grad_queue_do_not_notice():
    _, data = small(32)
    inputs, labels = data.tensors

    def train(measures):
        model, _ = small()
        queue = GradQueue(model, n_clusters=2, features="0", queue_length=3, backend="torch")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        queue.attach(optimizer)

        def watch():
            if measures:
                some = {"SG-B": UniformBatches(4), "IS": ImportanceBatches(4)}
                measure_variance(model, "cross_entropy", data, some, draws=3)

        for part in torch.arange(32).split(8):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs[part]), labels[part])
            watch()  # between forward and backward pass too
            loss.backward()
            watch()
            optimizer.step()
        return [p.detach() for p in model.parameters()], queue.metrics()

    (plain, figures), (watched, others) = train(False), train(True)
    assert all(map(torch.equal, plain, watched))
    assert figures == others


def test_the_loop_of_gradients_and_the_model_s_hooks_are_left_alone():
    model, data = small()
    seen = []
    next(model.parameters()).register_hook(seen.append)
    with torch.no_grad():
        measure_variance(model, "cross_entropy", data, {"SG-B": UniformBatches(2)}, draws=3)
    assert all(p.grad is None for p in model.parameters())
    assert not seen


# --- bad input


def negative(outputs, targets):
    return -outputs.square().sum(1)


def wrong_classes():
    x, y = small()[1].tensors
    return TensorDataset(x, y + 9)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"model": 3}, TypeError, "the model must be a torch.nn.Module, got int"),
        ({"loss": "hinge"}, TypeError, "loss must be a loss module"),
        ({"dataset": 3}, TypeError, "the dataset must be map-style"),
        ({"dataset": []}, ValueError, "the dataset must have at least one sample, got none"),
        ({"estimators": {}}, TypeError, "estimators must be a dict of at least one estimator"),
        ({"estimators": [1]}, TypeError, "estimators must be a dict of at least one estimator"),
        ({"estimators": {"SG": "B"}}, TypeError, r"estimators\['SG'\] must be an estimator such"),
        ({"estimators": {"SG": UniformBatches}}, TypeError, r"estimators\['SG'\] must be an"),
        (
            {"estimators": {"IS": ImportanceBatches(2, score="loss")}, "loss": negative},
            ValueError,
            "losses that are scores must be at least 0, got -",
        ),
        ({"dataset": wrong_classes()}, ValueError, "targets must be classes from 0 to 2: Target"),
        ({"draws": 2}, ValueError, "draws must be an integer >= 3, got 2"),
        ({"seed": -1}, ValueError, "seed must be an integer >= 0, got -1"),
        (
            {"estimators": {"GC": StratifiedBatches(torch.arange(5))}},
            ValueError,
            "labels must be those of the dataset's 6 samples, got 5",
        ),
        ({"model": nn.ReLU()}, ValueError, "the model must have a trained parameter"),
    ],
)
def test_bad_input_is_refused(change, error, text):
    model, data = small()
    given = {
        "model": model,
        "loss": "cross_entropy",
        "dataset": data,
        "estimators": {"SG": UniformBatches(2)},
        "draws": 3,
    }
    with pytest.raises(error, match=text):
        measure_variance(**given | change)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: UniformBatches(0), "batch_size must be an integer >= 1, got 0"),
        (lambda: ImportanceBatches(2, presample=0.5), "presample must be a number from 1 to"),
        (
            lambda: ImportanceBatches(2, score="x"),
            "score must be one of gradient, loss, norm",
        ),
        (lambda: StratifiedBatches(torch.ones(3)), "labels must be integers"),
        (lambda: StratifiedBatches(torch.tensor([-1])), "labels must be at least 0, got -1"),
    ],
)
def test_bad_estimators_are_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_anchored_batches_need_an_anchor_of_the_model():
    model, data = small()
    svrg = SVRG(nn.Linear(3, 3).double(), "cross_entropy", data, every=10)
    with pytest.raises(ValueError, match=r"svrg must have an anchor: call its snapshot\(\) first"):
        AnchoredBatches(svrg, 2)
    wrong: Any = model
    with pytest.raises(TypeError, match="svrg must be an SVRG, got"):
        AnchoredBatches(wrong, 2)
    svrg.snapshot()
    with pytest.raises(ValueError, match="svrg must be of this model with 31 trained parameters"):
        exact(AnchoredBatches(svrg, 2), model, data)
