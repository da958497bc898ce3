# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportCallIssue=false
"""Time-major batches are refused, and batches with too few samples are warned of."""

import warnings

import pytest
import torch
from torch import nn

from gq_triton import GradQueue

TIME, BATCH = 10, 12


class Pooled(nn.Module):
    """A model with features at every position and one output per sample."""

    def __init__(self, time_major):
        super().__init__()
        self.features, self.head, self.time = nn.Linear(4, 6), nn.Linear(6, 3), not time_major

    def forward(self, x):
        return self.head(self.features(x).relu()).mean(dim=int(self.time))


class Recurrent(nn.Module):
    """A model whose recurrent layer takes its batch in dimension 1, rightly or wrongly fed."""

    def __init__(self, time_major):
        super().__init__()
        self.features, self.head, self.turned = nn.Linear(4, 6), nn.Linear(6, 3), not time_major
        self.gru = nn.GRU(6, 6)

    def forward(self, x):
        x = self.features(x)
        x = x.transpose(0, 1) if self.turned else x
        x = self.gru(x)[0]
        return self.head(x.transpose(0, 1) if self.turned else x)


def attached(model, **options):
    queue = GradQueue(model, features="features", **{"n_clusters": 2} | options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    queue.attach(optimizer)
    return queue, optimizer


def test_a_time_major_model_with_an_output_per_sample_is_refused():
    for time_major in (False, True):
        model = Pooled(time_major)
        keep = attached(model)
        out = model(torch.randn(*((TIME, BATCH) if time_major else (BATCH, TIME)), 4))
        assert out.shape == (BATCH, 3)
        if not time_major:
            out.square().mean().backward()
            assert len(keep[0].labels_) == BATCH
            continue
        with pytest.raises(RuntimeError, match=r"features.*\(10, 12, 6\).*output.*12.*time-major"):
            out.square().mean().backward()


def test_a_layer_that_declares_its_batch_second_is_believed():
    for time_major in (False, True):
        model = Recurrent(time_major)
        keep = attached(model, strict=True)
        out = model(torch.randn(*((TIME, BATCH) if time_major else (BATCH, TIME)), 4))
        if not time_major:
            out.square().mean().backward()
            assert len(keep[0].labels_) == BATCH
            continue
        with pytest.raises(RuntimeError, match=r"gru has batch_first=False.*\(10, 12, 6\)"):
            out.square().mean().backward()


def test_more_clusters_than_samples_are_said_once():
    model = nn.Sequential()
    model.add_module("features", nn.Linear(4, 3))
    queue, optimizer = attached(model, n_clusters=5)
    with pytest.warns(UserWarning, match="n_clusters=5 for a batch of 3 samples"):
        model(torch.randn(3, 4)).square().mean().backward()
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(3, 4)).square().mean().backward()
        model(torch.randn(9, 4)).square().mean().backward()
    assert sum(queue.cluster_sizes_) == 9
