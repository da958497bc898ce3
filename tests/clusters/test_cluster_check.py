# Gradients are there after a backward pass, whatever their types say.
# pyright: reportOptionalMemberAccess=false, reportArgumentType=false
"""``GradQueue.check``: what it leaves alone, and what it refuses."""

import pytest
import torch
from torch import nn

from gq_triton import GradQueue


def test_check_leaves_everything_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.Dropout(), nn.Flatten())
    queue = GradQueue(model, n_clusters=2, features="0")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    queue.attach(optimizer)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    batch = torch.randn(6, 3, 5)
    before, random, digest = model.state_dict(), torch.get_rng_state(), queue.digest()
    before = {name: value.clone() for name, value in before.items()}
    frozen = model[1].bias.requires_grad_(False)
    shown = queue.check(batch)
    assert [row.how for row in shown.rows] == [
        "clusters (Conv1d)", "clusters (Conv1d)", "clusters (BatchNorm1d)", "frozen"
    ]  # fmt: skip
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model[0].weight.grad.eq(1).all()
    assert frozen.grad is None
    assert queue.digest() == digest
    assert queue.labels_ is None
    assert torch.equal(random, torch.get_rng_state())
    # BatchNorm1d runs no training step in it: what is queued is the next batch alone.
    optimizer.zero_grad()
    model(torch.randn(6, 3, 5)).square().mean().backward()
    optimizer.step()
    assert {int(count) for count in queue.state_dict()["queued"].values()} == {1}


def test_check_refuses_in_one_message_before_training():
    class Bypassed(nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            penalty = sum(param.square().mean() for param in self.parameters())
            return self.head(self.features(x)) + penalty

    queue = GradQueue(Bypassed(), n_clusters=2, features="features", strict=True)
    with pytest.raises(RuntimeError, match=r"(?s)features\.weight: whole.*head\.bias: whole"):
        queue.check({"x": torch.randn(6, 3)})
    assert "forward" not in vars(queue._clusters.model)
    with pytest.raises(ValueError, match="n_clusters"):
        GradQueue(nn.Linear(2, 2)).check(torch.ones(3, 2))
