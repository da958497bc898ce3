"""Variances of gradient estimators, against enumerations of autograd's per-sample gradients."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from variance_cases import exact, gradients, small

from gq_triton.sampling import GradientClustering, importance_score
from gq_triton.variance import (
    SVRG,
    AnchoredBatches,
    ImportanceBatches,
    StratifiedBatches,
    UniformBatches,
    measure_variance,
)
from gq_triton.variance.frozen import Frozen
from gq_triton.variance.statistics import sampled_figures

LABELS = torch.tensor([0, 0, 1, 1, 1, 4])


def figures_of(estimates, probabilities):
    """Return average and normalised variance and noise to signal of all outcomes."""
    p = torch.tensor(probabilities, dtype=torch.float64)
    assert p.sum().item() == pytest.approx(1)
    rows = torch.stack(estimates)
    mean = p @ rows
    variance = p @ (rows - mean).square()
    normalised = (variance / (p @ rows.square())).mean()
    return variance.mean().item(), normalised.item(), (variance.sum() / mean.square().sum()).item()


def check(found, expected):
    got = found.average, found.normalised, found.noise_to_signal
    assert got == pytest.approx(expected, rel=1e-9, abs=1e-15)
    assert got == (found.paper_average, found.paper_normalised, found.paper_noise_to_signal)
    assert found.draws is None


# --- exact figures


def test_uniform_batches_by_enumeration():
    model, data = small()
    rows = gradients(model, data)
    pairs = [*itertools.product(range(6), repeat=2)]
    every = [(rows[i] + rows[j]) / 2 for i, j in pairs]
    check(exact(UniformBatches(2), model, data), figures_of(every, [1 / 36] * 36))


def test_tgc01_stratified_batches_by_enumeration():
    model, data = small()
    rows = gradients(model, data)
    members = [[0, 1], [2, 3, 4], [5]]  # of LABELS
    every = [
        sum(len(m) / 6 * rows[i] for m, i in zip(members, one, strict=True))
        for one in itertools.product(*members)
    ]
    check(exact(StratifiedBatches(LABELS), model, data), figures_of(every, [1 / 6] * 6))


@pytest.mark.parametrize("score", ["gradient", "loss", "norm"])
def test_importance_batches_by_enumeration(score):
    model, data = small(3)
    rows = gradients(model, data)
    x, y = data.tensors
    if score == "gradient":
        scores = importance_score(model(x), y, "cross_entropy")
    elif score == "norm":
        scores = rows.norm(dim=1)
    else:
        scores = F.cross_entropy(model(x), y, reduction="none").detach()
    every, probabilities = [], []
    for presample in itertools.product(range(3), repeat=4):
        own = scores[list(presample)]
        share = own / own.sum()
        for drawn in itertools.product(range(4), repeat=2):
            every.append(sum(rows[presample[j]] / (2 * 4 * share[j]) for j in drawn))
            probabilities.append(3**-4 * math.prod(share[j].item() for j in drawn))
    estimator = ImportanceBatches(2, presample=2.0, score=score)
    check(exact(estimator, model, data), figures_of(every, probabilities))


def test_a_sample_with_score_zero_adds_nothing():
    data = TensorDataset(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0], [0.0], [0.0]]))
    model = nn.Linear(1, 1, bias=False)
    found = exact(ImportanceBatches(4), model, data, "mse")
    assert 0 < found.average < exact(UniformBatches(4), model, data, "mse").average


def test_tgc11_sg_2b_has_half_the_variance_of_sg_b():
    model, data = small()
    one, two = (exact(UniformBatches(b), model, data) for b in (5, 10))
    assert one.average == 2 * two.average
    assert one.noise_to_signal == 2 * two.noise_to_signal


def test_tgc12_svrg_has_no_variance_at_the_snapshot_and_its_formula_elsewhere():
    model, data = small()
    svrg = SVRG(model, "cross_entropy", data, every=10)
    svrg.snapshot()
    assert exact(AnchoredBatches(svrg, 2), model, data).average == 0
    assert exact(AnchoredBatches(svrg, 2), model, data).noise_to_signal == 0
    past = gradients(model, data)
    with torch.no_grad():
        for param in model.parameters():
            param += 0.3 * torch.randn_like(param)
    rows = gradients(model, data)
    # Unbiased: the mean over all batches is the gradient of the dataset.
    every = [
        (rows[i] + rows[j] - past[i] - past[j]) / 2 + past.mean(0)
        for i, j in itertools.product(range(6), repeat=2)
    ]
    torch.testing.assert_close(torch.stack(every).mean(0), rows.mean(0), atol=1e-12, rtol=0)
    found = exact(AnchoredBatches(svrg, 2), model, data)
    check(found, figures_of(every, [1 / 36] * 36))
    trace = (rows - past).var(0, correction=0).sum() / 2
    assert found.average == pytest.approx(trace.item() / rows.shape[1], rel=1e-9)


def test_true_gradients_count_for_clusters_not_their_rank_1_centres():
    model, data = small(40)
    clustering = GradientClustering(model, n_clusters=4, max_iter=2)
    clustering.fit(torch.utils.data.DataLoader(data, batch_size=20))
    rows = gradients(model, data)
    clusters = [rows[clustering.labels_ == k] for k in range(4)]
    parts = [(len(own) / 40) ** 2 * own.var(0, correction=0).mean().item() for own in clusters]
    found = exact(StratifiedBatches(clustering.labels_), model, data)
    assert found.average == pytest.approx(sum(parts), rel=1e-9)


def test_duplicates_in_a_cluster_of_their_own_have_no_variance():
    model, data = small(2)
    data = TensorDataset(*(t.repeat_interleave(50, 0) for t in data.tensors))
    labels = torch.arange(2).repeat_interleave(50)
    assert exact(StratifiedBatches(labels), model.float(), _float(data)).average == 0


def _float(data):
    x, y = data.tensors
    return TensorDataset(x.float(), y)


def test_a_model_that_vmap_does_not_follow_has_the_same_gradients():
    class Branching(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) if x.sum().item() < 1e9 else x

    model, data = small()
    expected = exact(UniformBatches(2), model, data)
    assert exact(UniformBatches(2), Branching(model), data) == expected


def test_a_recurrent_model_says_nothing_and_has_autograd_s_gradients():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.layer(x)[0][:, -1])

    torch.manual_seed(0)
    data = TensorDataset(torch.randn(5, 4, 2), torch.tensor([0, 1, 1, 0, 1]))
    model = Recurrent()
    rows = gradients(model, data).double()
    found = exact(UniformBatches(2), model, data)
    expected = rows.var(0, correction=0).mean().item() / 2
    assert found.average == pytest.approx(expected, rel=1e-5)


def test_frozen_weights_and_unused_ones_and_dicts():
    class Named(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.unused = inner, nn.Parameter(torch.zeros(5))

        def forward(self, x):
            return self.inner(x)

    class Dicts(torch.utils.data.Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, index):
            return {"x": data.tensors[0][index], "labels": data.tensors[1][index]}

    model, data = small()
    model[0].weight.requires_grad_(False)
    expected = exact(UniformBatches(2), model, data)
    found = exact(UniformBatches(2), Named(model), Dicts())
    rows = gradients(model, data)
    assert rows.shape[1] == 4 + 15
    # The unused parameter's five zeros are coordinates without variance.
    assert found.average == pytest.approx(expected.average * 19 / 24, rel=1e-12)
    assert found.normalised == pytest.approx(expected.normalised * 19 / 24, rel=1e-12)
    assert found.noise_to_signal == pytest.approx(expected.noise_to_signal, rel=1e-12)


# --- sampled figures, and what is wrong with the paper's


def test_tgc13_noise_alone_reads_more_than_1_in_the_paper_s_normalised_variance():
    # [M] 1.1256 at n = 10: exactly 1 + 1/(n-2). The paper concludes that noise is stronger than
    # the gradient where it reads more than 1.
    generator = torch.Generator().manual_seed(0)
    draws, size = 10, 200_000
    noise = torch.randn(2 * draws, size, dtype=torch.float64, generator=generator)
    found = sampled_figures(noise, draws)
    error = 4 / size**0.5
    assert found.paper_normalised == pytest.approx(1 + 1 / (draws - 2), abs=error)
    assert found.paper_average == pytest.approx(1 + 1 / draws, abs=error)
    assert found.average == pytest.approx(1, abs=error)
    assert found.noise_to_signal > 100


def test_signal_as_strong_as_noise_reads_more_than_a_half_in_the_paper_s_form():
    generator = torch.Generator().manual_seed(1)
    rows = 1 + torch.randn(20, 100_000, dtype=torch.float64, generator=generator)
    found = sampled_figures(rows, 10)
    assert found.paper_normalised == pytest.approx(0.6, abs=0.01)
    assert found.noise_to_signal == pytest.approx(1, abs=0.01)
    assert found.normalised == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 1e6])
def test_tgc14_normalised_variance_is_at_most_1(scale):
    generator = torch.Generator().manual_seed(2)
    for shift in (0.0, 1.0):
        rows = scale * (shift + torch.randn(6, 50, dtype=torch.float64, generator=generator))
        assert 0 <= sampled_figures(rows, 3).normalised <= 1


def test_the_paper_s_form_hides_small_gradients():
    # The authors' code adds 1e-7 to the sum of squares.
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(20, 1000, dtype=torch.float64, generator=generator)
    large, small_ones = sampled_figures(rows, 10), sampled_figures(rows * 1e-6, 10)
    assert small_ones.normalised == pytest.approx(large.normalised, rel=1e-9)
    assert small_ones.paper_normalised < 1e-3 * large.paper_normalised


class Table:
    """Gradients and scores that are known, in place of a model."""

    def __init__(self, rows, scores):
        self.samples, self._rows, self._scores = len(rows), rows, scores

    def gradient(self, indices, weights=None):
        found = self._rows[indices]
        return found.mean(0) if weights is None else weights @ found

    def scores(self, indices, score):
        return self._scores[indices]


@pytest.mark.parametrize(
    "estimator", [UniformBatches(3), StratifiedBatches(LABELS), ImportanceBatches(3)]
)
def test_draws_have_the_exact_moments(estimator):
    model, data = small()
    frozen: Any = Frozen(model, "cross_entropy", data)
    moments = estimator.moments(frozen)
    expected = gradients(model, data)
    torch.testing.assert_close(moments.mean, expected.mean(0), atol=1e-12, rtol=0)
    table: Any = Table(expected, frozen.scores(torch.arange(6), "gradient"))
    generator = torch.Generator().manual_seed(0)
    rows = torch.stack([estimator.estimate(table, generator) for _ in range(3000)])
    error = (moments.variance / 3000).sqrt()
    assert ((rows.mean(0) - moments.mean).abs() <= 4.5 * error).all()
    assert rows.var(0).sum() == pytest.approx(moments.variance.sum().item(), rel=0.1)
    torch.manual_seed(0)
    first = estimator.estimate(frozen, generator.manual_seed(0))
    torch.testing.assert_close(first, rows[0], atol=1e-12, rtol=0)


def test_draws_of_svrg_are_what_the_formula_says():
    model, data = small()
    svrg = SVRG(model, "cross_entropy", data, every=10)
    svrg.snapshot()
    past = gradients(model, data)
    with torch.no_grad():
        for param in model.parameters():
            param += 0.3
    rows, frozen = gradients(model, data), Frozen(model, "cross_entropy", data)
    found = AnchoredBatches(svrg, 3).estimate(frozen, torch.Generator().manual_seed(5))
    drawn = torch.randint(6, (3,), generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(found, (rows - past)[drawn].mean(0) + past.mean(0))
    assert all(module.training for module in svrg.anchor.model.modules())


def test_sampled_figures_are_repeatable_and_close_to_the_exact_ones():
    model, data = small()
    both = {"SG-B": UniformBatches(3), "GC": StratifiedBatches(LABELS)}

    def measured(**options):
        return measure_variance(model, "cross_entropy", data, both, **options)

    first = measured(draws=40)
    assert first == measured(draws=40)
    assert first != measured(draws=40, seed=1)
    for name, figures in measured(exact=True).items():
        assert first[name].average == pytest.approx(figures.average, rel=0.4)
        assert first[name].draws == 40
