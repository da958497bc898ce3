# Gradients are there after a backward pass, whatever their types say.
# pyright: reportOptionalMemberAccess=false, reportArgumentType=false
"""Models that put their samples in another order before a layer, which no graph shows."""

import copy
import random

import pytest
import torch
from torch import nn

from gq_triton import GradQueue

F64 = torch.float64
LABELS = torch.tensor([0, 1, 2, 0, 1, 0, 0, 2, 1])


def by_size(x):
    return x.flatten(1).sum(dim=1).argsort()


class Model(nn.Module):
    """A model that takes its samples in the order ``order(x)``, and may put them back."""

    def __init__(self, order=by_size, scale=1, back=False):
        super().__init__()
        self.stem, self.order, self.scale, self.back = nn.Identity(), order, scale, back
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)

    def forward(self, x):
        order = self.order(self.stem(x))
        x = self.last(self.norm(self.first(x[order] * self.scale)).tanh())
        return x[order.argsort()] if self.back else x


def batches(number):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(9, 4, dtype=F64, generator=generator) for _ in range(number)]


def train(model, queue, prepare=lambda queue, x: None, steps=4):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    queue.attach(optimizer)
    for x in batches(steps):
        optimizer.zero_grad()
        prepare(queue, x)
        (model(x) - 1).square().sum(dim=1).mean().backward()
        optimizer.step()


def with_weights(queue, x):
    queue.set_sample_weights(torch.ones(9))


def with_labels(queue, x):
    queue.set_labels(LABELS)


CASES = {
    "labels": (False, {"labels": True}, with_labels, "first sees the samples in another order"),
    "weights": (False, {"features": "first"}, with_weights, "first sees the samples in another"),
    "output": (True, {"features": "output_gradient"}, lambda queue, x: None, "gives its output in"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_training_notices_inputs_in_another_order_and_takes_one_cluster(case):
    """It once gave each sample the cluster of another one, without a word."""
    back, options, prepare, said = CASES[case]
    torch.manual_seed(0)
    model = Model(back=back).to(F64)
    twin, strict = copy.deepcopy(model), copy.deepcopy(model)
    options = {"n_clusters": 3, "queue_length": 2} | options
    queue = GradQueue(model, **options)
    with pytest.warns(UserWarning, match=rf"as one batch: .*{said}.*; 100% of the trainable"):
        train(model, queue, prepare)
    assert all("another order" in how for how in queue.report().values())
    train(twin, GradQueue(twin, queue_length=2))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
    with pytest.raises(RuntimeError, match=f"strict=True, .*{said}"):
        train(strict, GradQueue(strict, strict=True, **options), prepare)


@pytest.mark.parametrize("features", ["first", "output_gradient"])
def test_features_behind_the_change_of_order_are_right(features):
    """A model whose loader sorts the batch has the same gradients."""
    torch.manual_seed(0)
    model = Model(scale=2).to(F64)
    twin = copy.deepcopy(model)
    twin.order = lambda x: torch.arange(len(x))
    options = {"n_clusters": 3, "queue_length": 2, "features": features, "strict": True}
    train(model, GradQueue(model, **options))
    inner = type(twin).forward
    twin.forward = lambda x: inner(twin, x)
    twin.register_forward_pre_hook(lambda _, args: args[0][by_size(args[0])])
    train(twin, GradQueue(twin, **options))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


ORDERS = {
    "by size": by_size,
    "drawn": lambda x: torch.randperm(len(x)),
    "drawn by Python": lambda x: torch.tensor(random.sample(range(len(x)), len(x))),
    "rolled": lambda x: torch.arange(len(x)).roll(1),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "options", [{"labels": True}, {"features": "stem"}], ids=["labels", "stem"]
)
def test_check_names_the_layers_that_see_another_order(order, options):
    torch.manual_seed(0)
    random.seed(0)
    model = Model(ORDERS[order], scale=0.5).to(F64)
    before = random.getstate()
    queue = GradQueue(model, n_clusters=3, **options)
    strict = GradQueue(model, n_clusters=3, strict=True, **options)
    if "labels" in options:
        with_labels(queue, None)
        with_labels(strict, None)
    shown = queue.check(batches(1)[0])
    assert shown.reordered == [name for name, _ in model.named_parameters()]
    assert shown.share == 0
    assert random.getstate() == before
    with pytest.raises(
        RuntimeError, match=r"first\.weight: reordered \(first has sample \d in row"
    ):
        strict.check(batches(1)[0])


def test_check_believes_features_that_are_reordered_like_the_layers():
    torch.manual_seed(0)
    model = Model(scale=0.5).to(F64)
    queue = GradQueue(model, n_clusters=3, features="last")
    assert queue.check(batches(1)[0]).share == 1
    queue.set_sample_weights(torch.ones(9))
    assert queue.check(batches(1)[0]).share == 0


def test_check_sees_the_layers_that_are_in_order():
    """Beside a branch that is not; samples that a norm without a gradient mixes are in order."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixed = nn.BatchNorm1d(4).requires_grad_(False)
            self.right, self.wrong, self.last = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x, lengths):
            x = self.mixed(x)
            return self.last(self.right(x)) + self.wrong(x[lengths.argsort()])[:, :2]

    torch.manual_seed(0)
    queue = GradQueue(Branches().to(F64), n_clusters=3, features="right")
    lengths = torch.tensor([3, 1, 4, 15, 9, 2, 6, 5, 35])
    shown = queue.check({"x": batches(1)[0], "lengths": lengths})
    assert shown.reordered == ["wrong.weight", "wrong.bias"]
