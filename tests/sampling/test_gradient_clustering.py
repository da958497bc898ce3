"""GradientClustering: its objective, its rules of assignment, its guard, and the online mode."""

import io
import itertools
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

from gq_triton.sampling import GradientClustering, StratifiedBatchSampler
from gq_triton.sampling.centres import Centre
from gq_triton.sampling.factors import Factors, factors
from gq_triton.sampling.online import followed, revived
from gq_triton.sampling.partition import Assigner, equal_parts, fill
from gq_triton.sampling.ranks import stream
from gq_triton.sampling.watch import run_model


def task(samples=60, copies=1):
    """Return a model with one trained layer, and its data; copies of every sample are apart."""
    torch.manual_seed(0)
    x = torch.randn(samples // copies, 5, dtype=torch.float64).repeat(copies, 1)
    y = (x[:, 0] + x[:, 1] > 0).long()
    fixed = nn.Linear(5, 12).double().requires_grad_(False)
    model = nn.Sequential(fixed, nn.ReLU(), nn.Linear(12, 2, bias=False).double())
    return model, TensorDataset(x, y)


def gradients_of(model, data):
    """Return every sample's gradient of the trained layer, by autograd."""
    x, y = data.tensors
    found = []
    for xi, yi in zip(x, y, strict=True):
        loss = F.cross_entropy(model(xi[None]), yi[None])
        found.append(torch.autograd.grad(loss, model[2].weight)[0].flatten())
    return torch.stack(found)


def scatter(gradients, labels):
    """Return ``sum_k N_k sum_{i in k} ||mean_k - g_i||^2``."""
    parts = [gradients[labels == k] for k in labels.unique()]
    return sum(len(p) * float((p - p.mean(0)).square().sum()) for p in parts)


# --- the objective


@pytest.mark.parametrize("assignment", ["running", "fixed", "kmeans"])
def test_the_objective_is_that_of_true_gradients(assignment):
    """12 terms hold any centre of a 2 x 12 layer exactly."""
    model, data = task()
    clustering = GradientClustering(model, n_clusters=4, assignment=assignment, rank=12)
    loader = DataLoader(data, batch_size=7, shuffle=True)  # the last batch has 4
    assert clustering.fit(loader) is clustering
    gradients = gradients_of(model, data)
    exact = scatter(gradients, clustering.labels_)
    assert clustering.objective_ == pytest.approx(exact, rel=1e-9)
    assert clustering.objective_ == min(clustering.objectives_) < clustering.uniform_
    assert len(clustering.objectives_) == 5
    variance = float((gradients - gradients.mean(0)).square().sum(1).mean())
    assert clustering.uniform_ == pytest.approx(60**2 * variance / 4, rel=1e-9)
    assert clustering.cluster_sizes_.tolist() == clustering.labels_.bincount().tolist()
    assert not clustering.fell_back_


def test_rank_1_is_an_upper_bound_and_near():
    model, data = task()
    loader = DataLoader(data, batch_size=20)
    clustering = GradientClustering(model, n_clusters=4).fit(loader)
    exact = scatter(gradients_of(model, data), clustering.labels_)
    assert exact <= clustering.objective_ * (1 + 1e-9) <= 1.2 * exact


def test_duplicates_get_clusters_of_their_own_in_dataset_order():
    model, data = task(60, copies=10)
    clustering = GradientClustering(model, n_clusters=6, rank=12, max_iter=10)
    clustering.fit(DataLoader(data, batch_size=8, shuffle=True))
    assert clustering.objective_ < 0.2 * clustering.uniform_
    labels = clustering.labels_.view(10, 6)
    assert (labels == labels[0]).float().mean() > 0.9
    sampler = StratifiedBatchSampler(clustering.labels_, 6)
    assert len(next(iter(sampler))) == 6


def test_batches_in_one_order_and_other_batch_forms():
    model, data = task()
    x, y = data.tensors
    plain = [(x[i : i + 15], y[i : i + 15]) for i in range(0, 60, 15)]
    keyed = [{"inputs": {"input": a}, "target": b} for a, b in plain]
    one = GradientClustering(model, n_clusters=3, seed=2).fit(plain)
    other = GradientClustering(
        model, n_clusters=3, seed=2, split=lambda b: (b["inputs"], b["target"])
    ).fit(keyed)  # fmt: skip
    assert torch.equal(one.labels_, other.labels_)
    assert one.objective_ == pytest.approx(other.objective_)


def test_small_gradients_are_not_rounded_away():
    """The authors round distances to 1e-7, which makes all of them equal here."""
    model, data = task()
    loss = nn.CrossEntropyLoss(reduction="none")

    def tiny(outputs, targets):
        return 1e-9 * loss(outputs, targets)

    loader = DataLoader(data, batch_size=20)
    one = GradientClustering(model, n_clusters=4).fit(loader)
    other = GradientClustering(model, n_clusters=4, loss=tiny).fit(loader)
    assert torch.equal(one.labels_, other.labels_)


def test_a_ragged_last_batch_counts_like_any_other():
    """With the gradients of mean losses the 4 samples of the last batch would look larger."""
    model, data = task()
    x, y = data.tensors
    cut = GradientClustering(model, n_clusters=3, assignment="kmeans").fit(
        [(x[:56], y[:56]), (x[56:], y[56:])]
    )
    whole = GradientClustering(model, n_clusters=3, assignment="kmeans").fit([(x, y)])
    assert cut.objective_ == pytest.approx(whole.objective_)
    assert torch.equal(cut.labels_, whole.labels_)


def test_fitting_leaves_the_model_and_random_numbers_alone():
    model, data = task()
    model.append(nn.Dropout(0.5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    first = GradientClustering(model, n_clusters=3).fit(DataLoader(data, 9, shuffle=True))
    again = GradientClustering(model, n_clusters=3).fit(DataLoader(data, 9))
    assert torch.equal(first.labels_, again.labels_)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(m.training for m in model)


# --- rules


def test_running_sizes_grow_batch_by_batch():
    assigner = Assigner("running", torch.tensor([9.0, 9.0]))
    near = torch.tensor([[1.0, 1.5]] * 3)
    assert assigner(near).tolist() == [0, 0, 0]  # all sizes of a batch are those before it
    assert assigner(near).tolist() == [1, 1, 1]  # 4 * 1 > 1 * 1.5
    assert Assigner("fixed", torch.tensor([2.0, 1.0]))(near).tolist() == [1, 1, 1]
    assert Assigner("kmeans", torch.tensor([2.0, 1.0]))(near).tolist() == [0, 0, 0]


def test_the_paper_s_fixed_sizes_make_the_objective_larger_and_the_best_is_kept():
    """Solving equation 3 with the last sizes promises no descent."""
    worse = 0
    for seed in range(4):
        model, data = task()
        clustering = GradientClustering(
            model, n_clusters=5, assignment="fixed", rank=12, max_iter=6, seed=seed
        ).fit(DataLoader(data, batch_size=60))
        path = clustering.objectives_
        worse += sum(b > a * (1 + 1e-9) for a, b in itertools.pairwise(path))
        if not clustering.fell_back_:
            assert clustering.objective_ == min(path)
    assert worse > 0


def test_tgc10_a_split_moves_half_rounded_down():
    labels = torch.tensor([0] * 7 + [1] * 4)
    found, splits = fill(labels, torch.tensor([1.0, 9.0, 0.0]), stream(0))
    assert splits == 1
    assert found.bincount().tolist() == [7, 2, 2]  # the larger distortion, not the larger size
    found, splits = fill(labels, torch.tensor([9.0, 1.0, 0.0]), stream(0))
    assert found.bincount().tolist() == [4, 4, 3]
    assert bool((found[7:] == 1).all())


def test_every_empty_cluster_is_filled():
    """The authors' code fills one of them per iteration."""
    found, splits = fill(torch.zeros(40, dtype=torch.long), torch.eye(6)[0], stream(0))
    assert splits == 5
    assert found.bincount(minlength=6).min() >= 2
    found, _ = fill(torch.zeros(3, dtype=torch.long), torch.eye(6)[0], stream(0))
    assert found.bincount(minlength=6).sum() == 3  # as far as there are enough samples
    found, _ = fill(torch.tensor([0] * 9 + [1]), torch.ones(2), stream(0), least=3)
    assert found.bincount().tolist() == [5, 5]


def test_a_partition_worse_than_uniform_batches_is_replaced(monkeypatch):
    """Proposition 3.1 promises nothing for a partition that is not optimal."""
    model, data = task()
    gradients = gradients_of(model, data)
    lone = torch.zeros(60, dtype=torch.long)
    lone[0] = 1

    class Bad(Assigner):
        def __call__(self, distances):
            return torch.zeros(len(distances), dtype=torch.long)

    monkeypatch.setattr("gq_triton.sampling.passes.Assigner", Bad)
    monkeypatch.setattr("gq_triton.sampling.clustering.fill", lambda *_: (lone, 0))
    clustering = GradientClustering(model, n_clusters=2, rank=12).fit(DataLoader(data, 20))
    assert scatter(gradients, lone) > clustering.uniform_
    assert clustering.fell_back_
    assert clustering.cluster_sizes_.tolist() == [30, 30]
    exact = scatter(gradients, clustering.labels_)
    assert clustering.objective_ == pytest.approx(exact, rel=1e-9)


def test_equal_parts():
    labels = equal_parts(11, 3, stream(0))
    assert sorted(labels.bincount().tolist()) == [3, 4, 4]
    assert not torch.equal(labels, equal_parts(11, 3, stream(1)))


# --- online


def centre_of(*values):
    sides = (torch.tensor(value, dtype=torch.float64).view(2, 1, 1, 1) for value in values)
    return {"layer": Centre(*sides)}


def test_online_centres_are_moving_averages():
    found = {"layer": Factors(*(torch.tensor([[[[v]]], [[[3.0]]]]).double() for v in (1.0, 5.0)))}
    centres, sizes = centre_of([4.0, 8.0], [1.0, 2.0]), torch.tensor([3.0, 1.0]).double()
    moved, after = followed(centres, sizes, found, torch.tensor([0, 0]), beta=0.5)
    assert after.tolist() == [2.5, 0.5]
    # (3 * .5 * 4 + .5 * (1 + 3)) / 2.5, and the cluster without samples stays
    assert moved["layer"].inputs.flatten().tolist() == pytest.approx([3.2, 8.0])
    assert moved["layer"].outputs.flatten().tolist() == pytest.approx([(1.5 + 4) / 2.5, 2.0])


def test_online_clusters_without_samples_take_the_centre_of_the_largest_distortion():
    centres, sizes = centre_of([4.0, 8.0], [1.0, 2.0]), torch.tensor([6.0, 0.01]).double()
    found, after = revived(centres, sizes, torch.tensor([3.0, 0.0]).double())
    assert after.tolist() == [3.0, 3.0]
    assert found["layer"].inputs.flatten().tolist() == [4.0, 4.0]
    assert centres["layer"].inputs.flatten().tolist() == [4.0, 8.0]
    assert revived(centres, torch.ones(2), torch.ones(2))[1].tolist() == [1.0, 1.0]


@pytest.mark.slow
def test_partial_fit_follows_and_predict_assigns_everything():
    model, data = task(600, copies=100)
    clustering = GradientClustering(model, n_clusters=6, beta=0.9)
    with pytest.raises(RuntimeError, match="no centres yet"):
        clustering.predict(DataLoader(data, 50))
    for _ in range(10):
        for batch in DataLoader(data, 20, shuffle=True, generator=torch.Generator().manual_seed(0)):
            assert clustering.partial_fit(batch).shape == (20,)
    labels = clustering.predict(DataLoader(data, 50))
    assert clustering._sizes is not None
    assert float(clustering._sizes.sum()) == pytest.approx(20)
    gradients = gradients_of(model, TensorDataset(*(t[:6] for t in data.tensors))).repeat(100, 1)
    variance = float((gradients - gradients.mean(0)).square().sum(1).mean())
    assert scatter(gradients, labels) < 0.5 * 600**2 * variance / 6


def test_a_saved_clustering_goes_on_bit_for_bit():
    model, data = task()
    batches = [*DataLoader(data, 12)]
    first = GradientClustering(model, n_clusters=4).fit(DataLoader(data, 20))
    for batch in batches[:3]:
        first.partial_fit(batch)
    torch.save(first.state_dict(), file := io.BytesIO())
    file.seek(0)
    second = GradientClustering(model, n_clusters=4)
    second.load_state_dict(torch.load(file))
    for batch in batches[3:]:
        assert torch.equal(first.partial_fit(batch), second.partial_fit(batch))
    assert torch.equal(first.predict(batches), second.predict(batches))
    assert torch.equal(first.labels_, second.labels_)
    assert first.objective_ == second.objective_
    assert second.cluster_sizes_.tolist() == first.cluster_sizes_.tolist()


def test_a_state_that_does_not_fit_is_refused():
    model, data = task()
    state = GradientClustering(model, n_clusters=4).fit(DataLoader(data, 20)).state_dict()
    other = GradientClustering(model, n_clusters=5)
    with pytest.raises(ValueError, match="n_clusters must be 5 here"):
        other.load_state_dict(state)
    assert not other._passes.centres
    other = GradientClustering(model, n_clusters=4)
    with pytest.raises(ValueError, match="'body' that is no layer here"):
        other.load_state_dict({**state, "centres": {"body": state["centres"]["2"]}})
    fit = {**state["fit"], "labels_": state["fit"]["labels_"] + 4}
    with pytest.raises(ValueError, match="labels_"):
        other.load_state_dict({**state, "fit": fit})
    layers: list[Any] = [*model.children()]
    wide = nn.Sequential(*layers[:2], nn.Linear(layers[2].in_features, 7, bias=False))
    for other in (
        GradientClustering(wide, n_clusters=4),
        GradientClustering(model, None, 4, rank=2),
    ):
        with pytest.raises(ValueError, match="the centres of '2' must be of rank"):
            other.load_state_dict(state)
        assert not other._passes.centres
    other = GradientClustering(model, n_clusters=4)
    empty = GradientClustering(model, n_clusters=4).state_dict()
    other.load_state_dict(empty)
    assert other.state_dict() == empty


# --- errors and time


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"n_clusters": 0}, "n_clusters must be an integer >= 1"),
        ({"assignment": "soft"}, "assignment must be one of running, fixed, kmeans"),
        ({"rank": 0}, "rank must be"),
        ({"beta": 2}, "beta must be a number from 0 to 1"),
        ({"layers": "0"}, "layers must be a list"),
        ({"layers": ["body"]}, "'body' in its name"),
    ],
)
def test_bad_arguments_are_refused(change, says):
    with pytest.raises(ValueError, match=says):
        GradientClustering(task()[0], **change)


class Changing:
    """A loader with other numbers of batches when it is asked first and in later passes."""

    def __init__(self, data, first, later):
        self.data, self.counts = data, [first, first, first, later]

    def __iter__(self):
        count = self.counts[0] if len(self.counts) == 1 else self.counts.pop(0)
        return iter([self.data[20 * n : 20 * n + 20] for n in range(count)])


def test_bad_data_is_refused():
    model, data = task()
    clustering = GradientClustering(model, n_clusters=61)
    with pytest.raises(ValueError, match="at most the number of samples, got 61 > 60"):
        clustering.fit(DataLoader(data, 20))
    with pytest.raises(ValueError, match="got 61 > 60"):
        clustering.fit([data.tensors])
    with pytest.raises(TypeError, match="read several times"):
        clustering.fit(iter([data.tensors]))
    with pytest.raises(ValueError, match="partial_fit needs rank=1"):
        GradientClustering(model, rank=2).partial_fit(data.tensors)
    with pytest.raises(ValueError, match="got 10 > 4"):
        GradientClustering(model).partial_fit([t[:4] for t in data.tensors])
    with pytest.raises(ValueError, match="targets must be classes from 0 to"):
        GradientClustering(model).fit([(data.tensors[0], data.tensors[1] + 9)])
    for first, later in ((3, 2), (2, 3), (2, 1)):
        with pytest.raises(ValueError, match="the same samples in every pass, got"):
            GradientClustering(model, n_clusters=4).fit(Changing(data, first, later))
    fewer = DataLoader(data, 20, collate_fn=lambda rows: default_collate(rows[1:]))
    with pytest.raises(ValueError, match="keep every sample of a batch, got 3 of 4: look at its"):
        GradientClustering(model, n_clusters=4).fit(fewer)
    nn.init.constant_(next(model[2].parameters()), torch.nan)
    with pytest.raises(ValueError, match="gradients of all samples must be finite"):
        GradientClustering(model, n_clusters=2).fit(DataLoader(data, 20))


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("delay", [0.0, 3600.0])
def test_a_long_fit_shows_how_far_it_is(monkeypatch, delay):
    monkeypatch.setattr("gq_triton.sampling.progress.DELAY", delay)
    monkeypatch.setenv("TERM", "xterm")
    x = torch.randn(40, 3)
    data = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())
    for loader in (
        torch.utils.data.DataLoader(data, batch_size=10),
        list(zip(x.split(10), [(x[:10, 0] > 0).long()] * 4, strict=True)),
    ):
        screen = Screen()
        monkeypatch.setattr(sys, "stderr", screen)
        GradientClustering(nn.Linear(3, 2), n_clusters=4, max_iter=2).fit(loader)
        assert ("clusters of gradients" in screen.getvalue()) == (delay == 0)
    monkeypatch.setattr(sys, "stderr", plain := io.StringIO())
    GradientClustering(nn.Linear(3, 2), n_clusters=4, max_iter=2).fit(loader)
    assert plain.getvalue() == ""


@pytest.mark.slow
def test_an_a_step_takes_no_longer_than_a_backward_pass():
    """An MLP 1024 wide, K = 10: distances of 512 samples, given the factors."""
    torch.manual_seed(0)
    layers = [nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(1024, 10))
    x, y = torch.randn(512, 1024), torch.randint(10, (512,))
    clustering = GradientClustering(model)
    clustering.partial_fit((x, y))
    found = factors(model, clustering.layers, run_model, x, y, "cross_entropy")
    own, backward = [], []
    for _ in range(7):
        begin = time.perf_counter()
        clustering._passes.distances(found)
        own.append(time.perf_counter() - begin)
        loss = F.cross_entropy(model(x), y)
        begin = time.perf_counter()
        loss.backward()
        backward.append(time.perf_counter() - begin)
    assert min(own) <= min(backward)


@pytest.mark.slow
def test_the_example_draws_figure_1(tmp_path, monkeypatch, capsys):
    example = Path(__file__).resolve().parents[2] / "examples" / "gradient_clusters.py"
    monkeypatch.setattr(sys, "argv", [str(example), str(tmp_path / "figure.png")])
    runpy.run_path(str(example))
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert "variance over that of uniform batches: 0." in capsys.readouterr().out
