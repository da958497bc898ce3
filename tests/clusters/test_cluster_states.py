"""Recurrent layers whose first state is a parameter, and modules used on results of their own."""

import pytest
import torch
import torch.nn.functional as F
from test_cluster_users import WIDTH, Model, case, linear, sequences
from torch import nn
from zoo_oracle import WHOLE, judge

from gq_triton import register_layer


class Counting(nn.Module):
    """A module whose runs cannot be repeated: they change a buffer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x):
        self.runs += 1
        return (x @ self.weight).tanh()


class Dropping(Counting):
    """A module whose runs can be repeated once it is known that they draw random numbers."""

    def forward(self, x):
        return F.dropout((x @ self.weight).tanh(), 1e-9)


register_layer(Counting)
register_layer(Dropping)


def layered(model, x):
    states = [state.expand(1, len(x), WIDTH).contiguous() for state in (model.first, model.second)]
    return model.head(model.core(model.enter(x), tuple(states))[0][:, -1])


def celled(model, x):
    state = model.first[0].expand(len(x), WIDTH)
    for step in model.enter(x).unbind(1):
        state = model.core(step, state)
    return model.head(state)


def looped(model, x):
    state = model.enter(x).mean(1)
    for _ in range(3):
        state = model.core(state)
    return model.head(state)


def state():
    return nn.Parameter(torch.randn(1, 1, WIDTH))


@pytest.mark.parametrize(("build", "whole"), [
    (lambda: Model(layered, core=nn.LSTM(WIDTH, WIDTH, batch_first=True), head=linear(3),
                   first=state(), second=state()), {"first", "second"}),
    (lambda: Model(celled, core=nn.GRUCell(WIDTH, WIDTH), head=linear(3), first=state()),
     {"first"}),
    (lambda: Model(looped, core=Counting(), head=linear(3)), {"core.weight"}),
    (lambda: Model(looped, core=Dropping(), head=linear(3)), set[str]()),
], ids=["LSTM", "GRUCell", "changes a buffer", "draws numbers"])  # fmt: skip
def test_a_module_that_runs_again_may_be_used_again(build, whole):
    """The first two could not be trained: rows of a state that all samples share are their rows.

    The others could not either: products with the last result went back through earlier uses.
    """
    verdict = judge(case(build, sequences, "enter"), backend="torch")
    assert verdict.problems() == []
    assert {name for name, tier in verdict.tiers.items() if tier == WHOLE} == whole
