"""No step has become much slower than what it is compared with: ratios of one run, on the CPU.

A bound is about twice what an idle machine gives. Times are processor times of this process, the
two of a ratio take turns, and the best turn of each counts: so other work on the machine, which
cannot be told from a slow step by the clock, makes little difference.
"""

import time
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from gq_triton import GQSGD, GQAdamW
from gq_triton.bench.clusters import OURS, PASSES, PLAIN, Case, step_of
from gq_triton.bench.harness import rounds, seconds
from gq_triton.grouping import KMeans

CPU = torch.device("cpu")
TURNS = 5


def ratio(ours, rival):
    """Return the best turn of one step over that of another."""
    for step in (ours, rival):
        step()
    timed = [partial(seconds, step, clock=time.process_time) for step in (ours, rival)]
    mine, other = rounds(timed, TURNS)
    return min(mine) / min(other)


def filled(build, params, **options):
    """Return the step of an optimizer whose queue is full."""
    optimizer = build(params, **options)
    for _ in range(6):
        for param in params:
            param.grad.mul_(-0.9)
        optimizer.step()
    return optimizer.step


@pytest.mark.parametrize(
    ("ours", "rival", "backend", "bound"),
    [
        (GQAdamW, torch.optim.AdamW, "auto", 6.0),
        (partial(GQSGD, momentum=0.9), partial(torch.optim.SGD, momentum=0.9), "auto", 7.0),
        (GQAdamW, torch.optim.AdamW, "torch", 30.0),
    ],
    ids=["AdamW", "SGD", "without Numba"],
)
def test_an_optimizer_against_torchs_fused_one(ours, rival, backend, bound):
    torch.manual_seed(0)
    sets = []
    for _ in range(2):
        sets.append([nn.Parameter(torch.randn(512, 512)) for _ in range(2)])
        for param in sets[-1]:
            param.grad = torch.randn_like(param)
    steps = (
        filled(ours, sets[0], lr=1e-3, backend=backend),
        rival(sets[1], lr=1e-3, fused=True).step,
    )
    assert ratio(*steps) < bound


def net():
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
    model.append(nn.Linear(256, 10))
    model.register_module("features", model[3])
    return model


def test_a_step_with_clusters_against_the_plain_one_and_k_passes():
    case = Case(net, (1024, 256), 10)
    plain, ours, passes = (step_of(case, way, 8, CPU) for way in (PLAIN, OURS, PASSES))
    assert ratio(ours, plain) < 5
    assert ratio(ours, passes) < 0.8


def test_kmeans_against_scikit_learn():
    from sklearn.cluster import KMeans as Scikit

    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    same: dict[str, Any] = {"max_iter": 5, "tol": 0.0}
    once: dict[str, Any] = {"init": x[:8].numpy(), "n_init": 1}
    ours, theirs = KMeans(8, init=x[:8], warm_start=False, **same), Scikit(8, **once, **same)

    def scikit():
        theirs.fit(x.numpy())

    assert ratio(lambda: ours.fit(x), scikit) < 4
