"""ImportanceLoader: the gate, what it costs, that it goes on where it was, ranks, errors."""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from importance_cases import head, loader_of, planted, run
from torch import nn
from torch.utils.data import TensorDataset

from gq_triton.sampling import (
    ImportanceLoader,
    gradient_norms,
    importance_score,
    total_variation,
    variance_reduction,
)

# --- the gate and tau


def test_tis05_tau_starts_at_0_and_forgets_a_tenth_per_step():
    loader = loader_of(tau_th=math.inf)
    x, y = planted()
    tau = 0.0
    for indices, inputs, _, weights in loader:
        assert loader.tau == pytest.approx(tau, rel=1e-12)
        assert torch.equal(inputs, x[indices])
        assert weights.tolist() == [1.0] * 4
        score = importance_score(loader.model(inputs), y[indices], "cross_entropy")
        tau = 0.9 * tau + 0.1 * variance_reduction(score)
    assert loader.tau == pytest.approx(tau, rel=1e-12)
    # constant readings: tau (1 - .9^n)
    loader = loader_of(nn.Linear(4, 2).requires_grad_(False), tau_th=math.inf)
    for param in loader.model.parameters():
        nn.init.zeros_(param)
    for number, batch in enumerate(loader):
        assert loader.tau == pytest.approx(1 - 0.9**number, rel=1e-9)
        loader.model(batch.inputs)


def test_tis12_steps_by_score_begin_when_tau_has_passed_and_are_counted():
    model, calls = head(), []
    model.register_forward_hook(lambda m, a, out: calls.append((len(out), m.training)))
    loader = loader_of(model, presample=2.5)
    x, y = planted()
    for number, (indices, inputs, targets, weights) in enumerate(loader):
        by_score = any(count == 10 for count, _ in calls)
        assert torch.equal(inputs, x[indices])
        assert torch.equal(targets, y[indices])
        assert weights.shape == (4,)
        assert loader.costs[-1].steps == number + 1
        if by_score:
            assert calls[0] == (10, False)  # one pass, in evaluation mode
            assert model.training
        calls.clear()
        model(inputs)
        assert calls == [(4, True)]
        calls.clear()
    cost = loader.costs[-1]
    assert 0 < cost.steps_by_score < cost.steps == len(loader) == 15
    assert cost.scored == 10 * cost.steps_by_score
    assert cost.trained == 4 * 15
    assert cost.equivalent == cost.trained + cost.scored / 3


def test_a_uniform_step_is_scored_here_if_the_loop_never_runs_the_model_on_it():
    loader, other = loader_of(tau_th=math.inf), loader_of(tau_th=math.inf)
    for one, _ in zip(other, loader, strict=True):
        other.model(one.inputs)
    assert loader.tau == pytest.approx(other.tau, rel=1e-6)
    assert loader.costs[-1].scored == 4 * 15
    assert other.costs[-1].scored == 0


def test_only_a_training_pass_of_the_batch_is_taken():
    loader, other = loader_of(tau_th=math.inf), loader_of(tau_th=math.inf)
    for one, two in zip(other, loader, strict=True):
        other.model(one.inputs)
        with torch.no_grad():
            loader.model(torch.randn(4, 4))  # a validation batch of the same size
        loader.model(torch.randn(7, 4))
        loader.model(two.inputs)
        loader.model(torch.randn(4, 4))
    assert loader.tau == other.tau
    assert loader.costs[-1].scored == 0


@pytest.mark.slow
def test_the_weighted_gradient_is_the_dataset_s_in_expectation():
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    data = TensorDataset(*planted())
    loader = ImportanceLoader(data, model, "cross_entropy", 6, tau_th=0, steps=500, seed=1)
    gradients = []
    for _, inputs, targets, weights in loader:
        losses = F.cross_entropy(model(inputs), targets, reduction="none")
        gradients.append(torch.autograd.grad((weights * losses).mean(), model.weight)[0].flatten())
    x, y = planted()
    expected = torch.autograd.grad(F.cross_entropy(model(x), y), model.weight)[0].flatten()
    gradients = torch.stack(gradients[1:])
    error = gradients.std(0) / len(gradients) ** 0.5
    assert bool(((gradients.mean(0) - expected).abs() < 4 * error).all())


def test_hard_samples_come_more_often_and_count_less():
    seen = run(loader_of(tau_th=0, presample=5.0, steps=20))[1:]
    indices = torch.tensor([i for one, _, _ in seen for i in one])
    weights = torch.tensor([w for _, one, _ in seen for w in one])
    hard = indices % 10 == 0
    assert hard.float().mean() > 0.5
    assert weights[hard].mean() < 0.5 < 1 < weights[~hard].max()


def test_losses_as_scores_and_the_biased_variant():
    model = head(1.0)
    x, y = planted()
    for kind, k in (("loss", 1.0), ("gradient", 0.5)):
        loader = loader_of(model, tau_th=0, score=kind, weight_power=k)
        batches = list(loader)[1:]
        for indices, _, _, weights in batches:
            logits = model(x[indices]).detach()
            score = importance_score(logits, y[indices], "cross_entropy").double()
            if kind == "loss":
                score = F.cross_entropy(logits, y[indices], reduction="none").double()
            # w is proportional to 1 / s^k
            product = weights * score**k
            torch.testing.assert_close(product, product[:1].expand(4), rtol=1e-5, atol=0)


def test_true_norms_as_scores_cost_a_backward_pass_in_every_step():
    loader = loader_of(score="norm", tau_th=1.05, batch_size=5)
    assert loader_of(score="norm", tau_th=None).tau_th == 1 + 3  # B = 3 b scored, each of 3
    steps = run(loader)
    cost = loader.costs[-1]
    assert 0 < cost.steps_by_score < cost.steps
    uniform = cost.steps - cost.steps_by_score
    assert cost.scored == 15 * cost.steps_by_score + 5 * uniform
    assert cost.equivalent == cost.trained + cost.scored
    # Weights are mean(norm) / norm, so that all weighted gradients of a step are equally long.
    indices, weights, _ = steps[-1]
    x, y = planted()
    norms = gradient_norms(loader.model, F.cross_entropy, x[indices], y[indices])
    weighted = norms * torch.tensor(weights)
    torch.testing.assert_close(weighted, weighted.mean().expand(5), rtol=1e-4, atol=0)


def test_another_gate():
    """The scores of a model that is sure are small but for every tenth sample."""
    loader = loader_of(gate=total_variation, tau_th=0.3)
    run(loader)
    assert 0 < loader.costs[-1].steps_by_score < len(loader)
    seen = []
    loader = loader_of(gate=lambda s: seen.append(len(s)) or 1 / (1e-3 + s.mean()), tau_th=1e9)
    run(loader)
    assert seen == [4] * len(loader)
    assert loader.costs[-1].steps_by_score == 0
    for wrong in (lambda s: torch.nan, lambda s: s, lambda s: None, lambda s: "half"):
        with pytest.raises(ValueError, match="gate must return a finite number"):
            run(loader_of(gate=wrong, tau_th=1.0))


def test_a_state_of_the_first_version_goes_on():
    whole, loader = loader_of(), loader_of()
    expected = run(whole)
    run(loader, stop=5)
    state = loader.state_dict()
    assert state.pop("level") == state["tau"]
    state["reading"] = state["reading"][:2]
    again = loader_of()
    again.load_state_dict(state)
    assert run(again) == expected[5:]


@pytest.mark.parametrize("schedule", ["constant_time", "constant_variance"])
def test_constant_schedules(schedule):
    loader = ImportanceLoader(
        TensorDataset(*planted()), head(), "cross_entropy", 12, tau_th=1.1, schedule=schedule,
        steps=20,
    )  # fmt: skip
    sizes = [len(indices) for indices, _, _ in run(loader)]
    assert sizes[0] == 12 > sizes[-1]
    cost = loader.costs[-1]
    assert cost.trained == sum(sizes)
    time_of_uniform = 3 * 12 * cost.steps
    if schedule == "constant_time":
        assert 0.9 * time_of_uniform < cost.scored + 3 * cost.trained <= time_of_uniform
    else:
        assert cost.scored == 12 * cost.steps_by_score


# --- going on


def fresh(seed_model=0, **options):
    torch.manual_seed(seed_model)
    return loader_of(nn.Linear(4, 2), **{"tau_th": 1.05, "seed": 5, **options})


@pytest.mark.parametrize(
    ("stop", "options"),
    # For "norm" no answer of the model tells the scores: the saved state lacked those of the batch.
    [(1, {}), (7, {}), (15, {}), (22, {}), (4, {"score": "norm", "tau_th": 1.01})],
)
def test_a_run_that_is_resumed_is_the_run(stop, options):
    whole = fresh(**options)
    expected = run(whole, epochs=3, lr=0.5)
    first = fresh(**options)
    seen, saved, model = run_until(first, stop)
    second = fresh(**options)
    second.load_state_dict(saved)
    second.model.load_state_dict(model)
    seen += run(second, epochs=3 - (stop - 1) // 15, lr=0.5)
    assert seen == expected
    assert whole.costs[1].steps_by_score > 0
    assert [vars(c) for c in second.costs] == [vars(c) for c in whole.costs[(stop - 1) // 15 :]]


def run_until(loader, stop):
    """Train as ``run``, and save within the loop after ``stop`` batches."""
    optimizer = torch.optim.SGD(loader.model.parameters(), lr=0.5)
    seen = []
    while True:
        for indices, inputs, targets, weights in loader:
            losses = F.cross_entropy(loader.model(inputs), targets, reduction="none")
            optimizer.zero_grad()
            (weights * losses).mean().backward()
            optimizer.step()
            seen.append((indices.tolist(), weights.tolist(), loader.tau))
            if len(seen) == stop:
                torch.save(loader.state_dict(), file := io.BytesIO())
                file.seek(0)
                return seen, torch.load(file), copy.deepcopy(loader.model.state_dict())


@pytest.mark.slow
def test_a_run_with_workers_is_resumed_too():
    options = {"num_workers": 1, "prefetch_factor": 3}
    expected = run(fresh(**options), epochs=2, lr=0.5)
    first = fresh(**options)
    seen, saved, model = run_until(first, 6)
    second = fresh(**options)
    second.load_state_dict(saved)
    second.model.load_state_dict(model)
    assert seen + run(second, epochs=2, lr=0.5) == expected


def test_after_a_loop_that_was_left_the_next_epoch_begins():
    loader = fresh()
    run(loader, stop=3)
    again = run(loader)
    assert len(again) == 15
    other = fresh()
    run(other, epochs=1)
    assert [c.epoch for c in loader.costs] == [0, 1]
    # uniform steps of epoch 1 read the same samples in both
    assert again[0][0] == run(other)[0][0]


def test_a_second_loop_ends_the_first():
    loader = fresh()
    first = iter(loader)
    next(first)
    next(iter(loader))
    with pytest.raises(RuntimeError, match="another loop"):
        next(first)


def test_a_state_that_does_not_fit_is_refused():
    state = fresh().state_dict()
    for change, says in (
        ({"samples": 61}, "samples must be 60 here"),
        ({"tau": -1.0}, "tau must be a finite number >= 0"),
        ({"plans": [[1]]}, "plans"),
    ):
        loader = fresh()
        with pytest.raises(ValueError, match=says):
            loader.load_state_dict({**state, **change})
        assert loader.state_dict() == state


# --- ranks


def test_ranks_read_disjoint_parts_whose_mean_is_unbiased():
    seen = []
    for rank in range(7):
        loader = loader_of(num_replicas=7, rank=rank, batch_size=8, tau_th=math.inf, steps=9)
        indices = {i for batch in loader for i in batch.indices.tolist()}
        seen.append(indices)
        # 60 samples: parts of 9 and 8
        assert loader._correction == pytest.approx(7 * (9 if rank < 4 else 8) / 60)
    assert sum(map(len, seen)) == len(set().union(*seen))
    assert len(set().union(*seen)) > 50


def test_a_rank_with_a_smaller_part_counts_less_also_by_score():
    model = head(0.0)  # all scores are alike
    for rank, own in ((0, 9), (6, 8)):
        loader = loader_of(model, num_replicas=7, rank=rank, batch_size=2, tau_th=0)
        for batch in loader:
            assert batch.weights.tolist() == pytest.approx([7 * own / 60] * 2)
        assert loader.costs[-1].steps_by_score > 0


# --- errors


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be an integer >= 1, got 0"),
        ({"batch_size": 61}, ValueError, "at least the 61 samples of a batch"),
        ({"presample": 1.0}, ValueError, "must exceed batch_size"),
        ({"presample": math.nan}, ValueError, "presample must be a number"),
        ({"tau_th": -1}, ValueError, "tau_th must be a number >= 0"),
        ({"schedule": "fast"}, ValueError, "schedule must be one of constant_batch"),
        ({"schedule": "constant_time", "presample": 4.0}, ValueError, "leave presample out"),
        ({"score": "acc"}, ValueError, "score must be one of gradient, loss, norm"),
        ({"score": "norm", "forward": len}, ValueError, "leave schedule and forward out"),
        ({"score": "norm", "schedule": "constant_time"}, ValueError, "leave schedule and"),
        ({"gate": "exp", "tau_th": 1.0}, ValueError, "gate must be a function of scores"),
        ({"gate": len}, ValueError, "gate needs tau_th"),
        ({"weight_power": 2}, ValueError, "weight_power"),
        ({"power": -1}, ValueError, "power must be a number from 0 to 1"),
        ({"smooth": -1.0, "steps": 0}, ValueError, "smooth must .*; steps must"),
        ({"rank": 1}, ValueError, "given together"),
        ({"rank": 2, "num_replicas": 2}, ValueError, "rank must be an integer from 0"),
        ({"shuffle": True}, TypeError, "unexpected keyword argument 'shuffle'"),
        ({"loss": None}, TypeError, "loss must be"),
        ({"model": len}, TypeError, "torch.nn.Module"),
        ({"dataset": iter([])}, TypeError, "map-style"),
        ({"dataset": []}, ValueError, "got 0"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(change, error, says):
    arguments = {
        "dataset": TensorDataset(*planted()),
        "model": head(),
        "loss": F.cross_entropy,
        "batch_size": 4,
        **change,
    }
    with pytest.raises(error, match=says):
        ImportanceLoader(**arguments)


def test_a_model_that_diverged_is_named():
    model = head()
    nn.init.constant_(model.bias, math.nan)
    with pytest.raises(ValueError, match="scores of a batch must be finite"):
        run(loader_of(model))


def test_a_batch_that_is_no_pair_is_refused():
    loader = ImportanceLoader(planted()[0], head(), "cross_entropy", 4)
    with pytest.raises(ValueError, match="say with split="):
        next(iter(loader))
