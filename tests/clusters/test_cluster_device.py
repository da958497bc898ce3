# pyright: basic, reportOptionalMemberAccess=false
"""Clusters on a device for whose numbers the host does not wait."""

import pytest
import torch
from kernel_cases import DEVICE, INTERPRETED
from meta_steps import step_of, watched
from torch import nn

from gq_triton import GradQueue
from gq_triton.cluster_grad.step import Step

# The interpreter warns of what a GPU computes in silence.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="Kernels are compiled here, for CUDA.")


def model_of(device=DEVICE):
    torch.manual_seed(0)
    layers = nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)
    return nn.Sequential(*layers).to(device)


def squared(outputs, targets):
    return (outputs - targets).square().mean()


def random_labels(features):
    return torch.zeros(len(features), dtype=torch.int64, device=features.device)


@interpreted
@pytest.mark.parametrize(
    "options",
    [{}, {"features": "output_gradient"}, {"clusterer": random_labels}, {"loss_reduction": "sum"},
     {"mode": "one_backward", "population_power": 0.0}],
)  # fmt: skip
def test_a_step_reads_nothing(options):
    model, x = model_of("meta"), torch.empty(9, 6, device="meta")
    step = step_of(model, (x, x[:, :3]), squared, **{"n_clusters": 4, "features": "0"} | options)
    seen = watched(step)
    assert not seen.reads
    assert not seen.copies


def steps_of(queue, model, batches):
    """Train on batches; yield the labels after each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    queue.attach(optimizer)
    for x in batches:
        optimizer.zero_grad()
        squared(model(x), 1.0).backward()
        optimizer.step()
        yield queue.labels_


def plugged(backend, **options):
    model = model_of()
    given = {"n_clusters": 4, "features": "0", "queue_length": 2} | options
    return GradQueue(model, backend=backend, **given), model


@pytest.mark.slow
def test_k_means_in_kernels_trains_as_plain_torch_does():
    batches = [torch.randn(20, 6, device=DEVICE) for _ in range(3)]
    runs = [plugged("triton"), plugged("torch")]
    for labels, expected in zip(*[steps_of(*run, batches) for run in runs], strict=True):
        assert torch.equal(labels, expected)
    for ours, right in zip(*[model.parameters() for _, model in runs], strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)
    assert runs[0][0].cluster_sizes_ == runs[1][0].cluster_sizes_


def test_features_that_are_not_finite_are_told_where_sizes_are_read():
    """Such a batch is one cluster, and leaves the centres alone."""
    clusters = plugged("triton")[0]._clusters
    good = torch.randn(20, 5, device=DEVICE)
    bad = good.clone()
    bad[3, 2] = torch.inf
    assert sum(clusters.assign(Step(clusters.assign, features=good)).sizes) == 20
    before = clusters.labeller.kmeans.cluster_centers_.clone()
    groups = clusters.assign(Step(clusters.assign, features=bad))
    assert groups.labels.tolist() == [0] * 20
    assert torch.equal(clusters.labeller.kmeans.cluster_centers_, before)
    with pytest.raises(ValueError, match="features must be finite"):
        _ = groups.sizes
    assert groups.sizes == [20, 0, 0, 0]  # raised once
    again = clusters.assign(Step(clusters.assign, features=good))
    assert sum(again.sizes) == 20
    assert max(again.sizes) < 20


@pytest.mark.gpu
def test_labels_beyond_the_clusters_are_told_where_sizes_are_read():
    queue, model = plugged("auto", clusterer=lambda x: torch.arange(len(x), device=x.device) % 5)
    list(steps_of(queue, model, [torch.randn(20, 6, device=DEVICE)]))
    with pytest.raises(ValueError, match="labels from 0 to n_clusters - 1 = 3"):
        _ = queue.cluster_sizes_
