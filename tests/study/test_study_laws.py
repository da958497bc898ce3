"""The laws of the study's arms and controls: the gradients that the optimizer gets."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from gq_triton import reference
from gq_triton.study.design.law import StudyLaw
from gq_triton.study.trials.altered import AlteredWeights, _by_rank
from gq_triton.study.trials.backward import build_backward
from gq_triton.study.trials.clusterer import StudyClusterer
from gq_triton.study.trials.optimizers import OPTIMIZERS

QUEUE = StudyLaw("queue", queue_length=3)
FEATURES = "1"


def model():
    torch.manual_seed(0)
    layers = nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)
    return nn.Sequential(*layers).double()


def gradients(law, steps=7, batch=24):
    """Return every step's gradients and measures under a law, for a model that does not move."""
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    backward = build_backward(law, net, optimizer, FEATURES, seed=0)
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(steps):
        inputs = torch.randn(batch, 6, generator=generator, dtype=torch.float64)
        labels = torch.randint(3, (batch,), generator=generator)
        optimizer.zero_grad()
        outputs = net(inputs)
        losses = nn.functional.cross_entropy(outputs, labels, reduction="none")
        backward.backward(outputs, losses, labels)
        optimizer.step()
        grads = [p.grad.clone() for p in net.parameters() if p.grad is not None]
        assert len(grads) == 4
        found.append((grads, backward.metrics()))
    return found


VARIANTS = [
    QUEUE,
    replace(QUEUE, match_norm=True),
    replace(QUEUE, queue_length=5, loss_window=2),
    replace(QUEUE, n_clusters=4),
    replace(QUEUE, n_clusters=4, match_norm=True, centroid_scale="standard_error"),
    replace(QUEUE, n_clusters=4, cluster_by="output_gradient", population_power=0.0),
    replace(QUEUE, n_clusters=4, cluster_by="labels"),
    replace(QUEUE, n_clusters=4, cluster_by="random"),
    replace(QUEUE, n_clusters=4, rho=1.0, population_power=0.0),
]


@pytest.mark.slow
@pytest.mark.parametrize("law", VARIANTS, ids=lambda law: repr(law).replace("queue", ""))
def test_untampered_weights_are_those_of_the_plug_in(law):
    # The plug-in computes sqrt(B / n_k) in float32.
    rtol = 1e-5 if law.centroid_scale == "standard_error" else 1e-10
    ours = gradients(replace(law, kind="untampered"))
    for (grads, measured), (expected, of_plug_in) in zip(ours, gradients(law), strict=True):
        for grad, other in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, other, rtol=rtol, atol=1e-14)
        assert measured == pytest.approx(of_plug_in, rel=10 * rtol)


def test_shuffled_and_constant_weights_keep_what_they_promise():
    plain = gradients(StudyLaw())[-1][0]
    weighted, measured = gradients(QUEUE)[-1]
    shuffled = gradients(replace(QUEUE, kind="shuffled"))[-1][0]
    constant, of_constant = gradients(replace(QUEUE, kind="constant"))[-1]
    for raw, own, permuted, even in zip(plain, weighted, shuffled, constant, strict=True):
        weights = [(part / raw).flatten() for part in (own, permuted, even)]
        torch.testing.assert_close(weights[0].sort().values, weights[1].sort().values)
        assert not torch.allclose(weights[0], weights[1])
        torch.testing.assert_close(weights[2], weights[0].mean().expand_as(weights[2]))
    assert of_constant["mean_weight"] == pytest.approx(measured["mean_weight"])


def weights_and_z(law, steps=7):
    """Yield a parameter's weights of the last step, flat, and the oracle's z over the raw queue."""
    raw = [grads for grads, _ in gradients(StudyLaw(), steps)]
    last = gradients(law, steps)[-1][0]
    for number, altered in enumerate(last):
        queue = torch.stack([grads[number] for grads in raw[-1 - law.queue_length : -1]])
        z = reference.scarcity_weight(raw[-1][number], queue, rho=1e30)
        yield (altered / raw[-1][number]).flatten(), z.flatten()


def test_one_weight_per_tensor_is_the_mean_of_the_oracles():
    for weights, z in weights_and_z(replace(QUEUE, kind="constant")):
        expected = z.clamp(1 / 3, 3).mean()
        torch.testing.assert_close(weights, expected.expand_as(weights))


def test_one_weight_per_tensor_by_its_norm():
    raw = [grads for grads, _ in gradients(StudyLaw())]
    for number, altered in enumerate(gradients(replace(QUEUE, kind="magnitude"))[-1][0]):
        norms = torch.stack([grads[number].norm() for grads in raw])
        expected = reference.scarcity_weight(norms[-1], norms[-4:-1])
        weights = altered / raw[-1][number]
        torch.testing.assert_close(weights, expected.expand_as(weights))


def test_weights_by_rank_are_always_the_same_and_ordered_by_z():
    for weights, z in weights_and_z(replace(QUEUE, kind="rank", rho=2.0)):
        cells = torch.linspace(-1, 1, 2 * len(z) + 1, dtype=torch.float64)[1::2]
        torch.testing.assert_close(weights[z.argsort()], 2.0**cells)
    (kept, _), (shuffled, _) = (
        next(weights_and_z(replace(QUEUE, kind=kind))) for kind in ("rank", "rank-shuffled")
    )
    torch.testing.assert_close(kept.sort().values, shuffled.sort().values)
    assert not torch.allclose(kept, shuffled)
    # The more unusual of two centroids gets larger weights; elements with equal z keep their order.
    z = torch.tensor([[0.1, 5.0, 0.0], [0.0, 7.0, 6.0]])
    ranks = torch.tensor([[2, 3, 0], [1, 5, 4]])
    expected = 3.0 ** ((2 * ranks.double() + 1) / 6 - 1)
    torch.testing.assert_close(_by_rank(z, 3.0), expected)


def test_the_queue_can_hold_what_was_applied():
    raw = [grads for grads, _ in gradients(StudyLaw())]
    weighted = [grads for grads, _ in gradients(replace(QUEUE, kind="weighted-queue"))]
    for number in range(4):
        queue = [grads[number] for grads in raw[:3]]  # weights are 1 until the queue is full
        for step in range(3, 7):
            expected = reference.weighted_gradient(raw[step][number], torch.stack(queue[-3:]))
            torch.testing.assert_close(weighted[step][number], expected)
            queue.append(expected)


def test_clusters_by_population_without_the_law_are_the_plain_gradient():
    for by, kind in (
        ("features", "queue"), ("random", "queue"), ("labels", "queue"),
        ("output_gradient", "queue"), ("features", "rank"),
    ):  # fmt: skip
        law = replace(QUEUE, kind=kind, n_clusters=4, cluster_by=by, rho=1.0)
        for (grads, _), (plain, _) in zip(gradients(law), gradients(StudyLaw()), strict=True):
            for grad, other in zip(grads, plain, strict=True):
                torch.testing.assert_close(grad, other, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_takes_a_step(name):
    net = model().float()
    optimizer = OPTIMIZERS[name](net.parameters(), 0.01, 0.8)
    inputs, labels = torch.ones(4, 6), torch.zeros(4, dtype=torch.int64)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), labels).backward()
        optimizer.step()
        losses.append(nn.functional.cross_entropy(net(inputs), labels).item())
    assert losses[-1] < losses[0]


def test_laws_leave_the_global_generator_alone():
    net = model()
    before = torch.random.get_rng_state()
    law = AlteredWeights(
        replace(QUEUE, kind="shuffled", n_clusters=3, cluster_by="random"),
        net,
        FEATURES,
        torch.Generator().manual_seed(0),
    )
    inputs, labels = torch.ones(9, 6, dtype=torch.float64), torch.arange(9) % 3
    for _ in range(5):
        outputs = net(inputs)
        losses = nn.functional.cross_entropy(outputs, labels, reduction="none")
        law.backward(outputs, losses, labels)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("by", ["features", "output_gradient"])
def test_random_clusters_have_the_sizes_of_those_they_stand_for(by, monkeypatch):
    """Random clusters come from the same k-means, whose labels are permuted."""
    sizes = {}
    found = StudyClusterer.__call__
    for kind in (by, "random" if by == "features" else f"random-{by}"):
        seen = sizes[kind] = []

        def watched(grouping, features, seen=seen):
            labels = found(grouping, features)
            seen.append((features.shape[1], sorted(torch.bincount(labels).tolist())))
            return labels

        monkeypatch.setattr(StudyClusterer, "__call__", watched)
        net = model()
        law = replace(QUEUE, kind="shuffled", n_clusters=3, cluster_by=kind, rho=1.0)
        generator = torch.Generator().manual_seed(0)
        backward = build_backward(law, net, torch.optim.SGD(net.parameters(), lr=0.0), FEATURES, 0)
        inputs = torch.randn(12, 6, dtype=torch.float64, generator=generator)
        labels = torch.arange(12) % 3
        for _ in range(2):
            outputs = net(inputs)
            losses = nn.functional.cross_entropy(outputs, labels, reduction="none")
            backward.backward(outputs, losses, labels)
    first, second = sizes.values()
    assert first == second
    assert len(first) == 2
