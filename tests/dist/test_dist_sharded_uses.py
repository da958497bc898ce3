# What the ranks hold are DTensors, whatever their types say.
# pyright: reportAttributeAccessIssue=false
"""Clusters on FSDP2: other losses, layers without a family, compiled models, bad gradients."""

import math
import warnings

import pytest
import torch
from sharded_cluster_cases import Images, Twins, Words
from torch import nn
from torch.distributed.fsdp import FSDPModule

pytestmark = pytest.mark.slow

UNEVEN = [6, 9]


class Sum(Twins):
    """The loss is a sum over samples, and the ranks' gradients are added up."""

    def __post_init__(self):
        super().__post_init__()
        for module in self.sharded.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)

    def loss(self, model, batch):
        return (model(batch) - 0.3).square().mean(dim=1).sum()


class PartOfMean(Sum):
    """The sum is divided by the number of samples on all ranks."""

    def loss(self, model, batch):
        return super().loss(model, batch) / sum(self.sizes)


class Weighted(Twins):
    """The samples count unequally in the mean."""

    def loss(self, model, batch):
        weights = batch[:, 0].abs() + 0.1
        queue = self.queue if model is self.sharded else self.plain
        queue.set_sample_weights(weights)
        losses = (model(batch) - 0.3).square().mean(dim=1)
        return (losses * weights).sum() / weights.sum()


class Scaled(nn.Module):
    """A parameter that no layer alone holds."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        return self.linear(x) * self.scale


class Foreign(Images):
    def __init__(self):
        super().__init__()
        self.mix = Scaled()


SUM = {"loss_reduction": "sum"}
LOSSES = {
    "sum": (Sum, {"lr": 0.01, "options": SUM}),
    "sum_power": (Sum, {"lr": 0.01, "options": {**SUM, "population_power": 0.5}}),
    "sum_match_norm": (Sum, {"lr": 0.01, "options": {**SUM, "match_norm": True}}),
    "part_of_mean": (PartOfMean, {"options": SUM}),
    "weighted": (Weighted, {}),
}


def check_loss(rank, kind, case):
    twins = kind(rank, (2,), sizes=UNEVEN, **case)
    twins.run()
    assert twins.plain.metrics()["mean_weight"] != 1


@pytest.mark.parametrize(("kind", "case"), LOSSES.values(), ids=LOSSES)
def test_losses_that_are_no_plain_mean(ranks, kind, case):
    ranks(2).run(check_loss, kind, case)


def check_foreign(rank):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="weighted without clusters")
        Twins(rank, (2,), model=Foreign, options={"strict": False}).run()


def test_layers_without_a_family_are_weighted_as_one_cluster(ranks):
    ranks(2).run(check_foreign)


def compile_blocks(model):
    for block in model.blocks:
        block.compile(backend="aot_eager")


def check_compiled(rank):
    Twins(rank, (2,), model=Words, wrap=compile_blocks).run()


def test_compiled_blocks(ranks):
    ranks(2).run(check_compiled)


def check_not_finite(rank):
    """A NaN on one rank keeps the gradient out of the queue of all."""
    twins = Twins(rank, (2,), lr=0.0)
    twins.run(steps=4)
    batch = twins.batch

    def bad(step, of):
        values = batch(step, of)
        if of == 1:
            values[2, 3] = math.nan
        return values

    twins.batch = bad
    before = twins.queue.digest()
    twins.zero_grad()
    twins.backward(4)
    for name, one, other in twins.pairs():
        assert torch.equal(one.grad.full_tensor().isnan(), other.grad.isnan()), name
    twins.step()
    assert twins.queue.digest() == before


def test_a_gradient_that_is_not_finite_is_queued_nowhere(ranks):
    ranks(2).run(check_not_finite)
