"""ImportanceLoader: the gate, what it costs, what it reads, and that it goes on where it was."""

import copy
import io
import math
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from gq_triton.sampling import ImportanceLoader, importance_score, variance_reduction


def planted(samples=60, dtype=torch.float32):
    """Return data of which every tenth sample is hard: its class is the wrong one."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 4, generator=generator, dtype=dtype)
    y = (x[:, 0] > 0).long()
    y[::10] = 1 - y[::10]
    return x, y


def head(scale=20.0):
    """Return a model that answers the planted rule, and is sure of it."""
    model = nn.Linear(4, 2)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
        model.weight[:, 0] = torch.tensor([-scale, scale])
    return model


def loader_of(model=None, **options):
    options = {"batch_size": 4, "tau_th": 1.2, **options}
    data = TensorDataset(*planted())
    return ImportanceLoader(data, model or head(), F.cross_entropy, **options)


def run(loader, epochs=1, lr=0.0, stop=None):
    """Train; return of every step what identifies it: indices, weights and tau before it."""
    optimizer = torch.optim.SGD(loader.model.parameters(), lr=lr)
    seen = []
    for _ in range(epochs):
        for indices, inputs, targets, weights in loader:
            losses = F.cross_entropy(loader.model(inputs), targets, reduction="none")
            optimizer.zero_grad()
            (weights * losses).mean().backward()
            optimizer.step()
            seen.append((indices.tolist(), weights.tolist(), loader.tau))
            if stop is not None and len(seen) == stop:
                return seen
    return seen


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


# --- data


class Dicts(torch.utils.data.Dataset):
    def __init__(self):
        self.x, self.y = planted()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i) -> Any:
        return {"a": self.x[i, :2], "b": self.x[i, 2:], "labels": self.y[i]}


class Lists(Dicts):
    def __getitem__(self, i):
        return [self.x[i, :2], self.x[i, 2:], self.y[i]]


class Nested(Dicts):
    def __getitem__(self, i):
        return (self.x[i, :2], {"b": self.x[i, 2:], "name": str(i)}), int(self.y[i])


class Joined(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = head()

    def forward(self, a, b):
        b = b["b"] if isinstance(b, dict) else b
        return self.head(torch.cat([a, b], 1))


@pytest.mark.parametrize("kind", [Dicts, Lists, Nested])
def test_dicts_lists_and_strings(kind):
    data, model = kind(), Joined()
    loader = ImportanceLoader(data, model, "cross_entropy", 4, tau_th=0)
    by_score = 0
    for indices, inputs, targets, _ in loader:
        found = list(inputs.values()) if isinstance(inputs, dict) else list(inputs)
        if kind is Nested:
            assert found[1]["name"] == [str(i) for i in indices.tolist()]
            assert torch.equal(found[1]["b"], data.x[indices, 2:])
        else:
            assert torch.equal(found[1], data.x[indices, 2:])
        assert torch.equal(targets, data.y[indices])
        by_score = loader.costs[-1].steps_by_score
    assert by_score == 14


def time_major(samples):
    """Return inputs ``(T, B)`` with T = 12: as many steps as a presample has samples."""
    x = torch.stack([x.repeat(3) for x, _ in samples], dim=1)
    return {"x": x, "note": object()}, torch.stack([y for _, y in samples])


class TimeMajor(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = head()

    def forward(self, x, note):
        return self.head(x[:4].T)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_any_collate_fn_also_in_workers(workers):
    """12 samples of 12 steps: the first dimension is not that of the samples."""
    x, y = planted()
    loader = ImportanceLoader(
        TensorDataset(x, y), TimeMajor(), "cross_entropy", 4, tau_th=0, num_workers=workers,
        collate_fn=time_major if not workers else time_major_plain,
    )  # fmt: skip
    for indices, inputs, targets, _ in loader:
        assert torch.equal(inputs["x"][:4].T, x[indices])
        assert torch.equal(targets, y[indices])
        loader.model(**inputs)
    assert loader.costs[-1].steps_by_score > 5


def time_major_plain(samples):
    inputs, targets = time_major(samples)
    return {**inputs, "note": 0}, targets


def test_split_and_forward():
    x, y = planted()
    calls = []

    def forward(model, inputs):
        calls.append(len(inputs))
        return model(inputs)

    loader = ImportanceLoader(
        TensorDataset(y, x), head(), "cross_entropy", 4, tau_th=0, forward=forward,
        split=lambda batch: (batch[1], batch[0]),
    )  # fmt: skip
    for indices, inputs, targets, _ in loader:
        assert torch.equal(inputs, x[indices])
        assert torch.equal(targets, y[indices])
    assert set(calls) == {12, 4}


# --- what scoring leaves alone


def test_scoring_changes_no_mode_no_buffer_and_no_random_number():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    model[1].eval()
    loader = loader_of(model, tau_th=0)
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    state = torch.get_rng_state()
    modes = [m.training for m in model.modules()]
    for batch in loader:
        assert [m.training for m in model.modules()] == modes
        assert batch.weights.grad_fn is None
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert loader.costs[-1].scored > 0
    assert not model._forward_hooks


def test_a_copy_and_a_file_of_the_model_hold_no_loader():
    loader = loader_of()
    for batch in loader:
        twin = copy.deepcopy(loader.model)
        torch.save(loader.model, file := io.BytesIO())
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        twin(batch.inputs)
        loaded(batch.inputs)
        assert loader._answer is None
        loader.model(batch.inputs)
        break


@pytest.mark.slow
def test_scoring_takes_at_most_1_1_forward_passes():
    layers = [nn.Linear(1024, 1024), nn.ReLU()] * 3
    model = nn.Sequential(*layers, nn.Linear(1024, 10))
    x, y = torch.randn(768, 1024), torch.randint(10, (768,))
    loader = ImportanceLoader(TensorDataset(x, y), model, "cross_entropy", 256)
    loader.costs.append(None)  # type: ignore[arg-type]
    loader.costs[-1] = type("Cost", (), {"scored": 0})()  # type: ignore[assignment]
    own, plain = [], []
    for _ in range(9):
        begin = time.perf_counter()
        loader._run(x, y, 768)
        own.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        with torch.no_grad():
            model(x)
        plain.append(time.perf_counter() - begin)
    assert min(own) <= 1.1 * min(plain)


# --- going on


def fresh(seed_model=0, **options):
    torch.manual_seed(seed_model)
    return loader_of(nn.Linear(4, 2), tau_th=1.05, seed=5, **options)


@pytest.mark.parametrize("stop", [1, 7, 15, 22])
def test_a_run_that_is_resumed_is_the_run(stop):
    whole = fresh()
    expected = run(whole, epochs=3, lr=0.5)
    first = fresh()
    seen, saved, model = run_until(first, stop)
    second = fresh()
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
        ({"score": "norm"}, ValueError, "score must be one of gradient, loss"),
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
