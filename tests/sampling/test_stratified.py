"""StratifiedBatchSampler: rounds, weights, ranks and resumption; the estimator by enumeration."""

import itertools
import time

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from gq_triton.sampling import StratifiedBatchSampler

LABELS = [0, 3, 3, 0, 7, 3, 3, 3, 0, 7]  # 3 clusters of 3, 5 and 2 samples


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sampler_of(batch_size=3, labels=LABELS, seed=0, **options):
    return StratifiedBatchSampler(labels, batch_size, seeded(seed), **options)


def draws(sampler, epochs):
    return [index for _ in range(epochs) for batch in sampler for index in batch]


# --- the estimator


def trace_variance(values):
    return float((values - values.mean(0)).square().sum(1).mean())


def exact_variance(gradients, labels):
    """Return the variance of one draw per cluster, by enumeration of all draws."""
    members = [(labels == k).nonzero().flatten() for k in labels.unique()]
    share = torch.tensor([len(m) / len(labels) for m in members], dtype=gradients.dtype)
    draws = torch.tensor(list(itertools.product(*(m.tolist() for m in members))))
    estimates = (share[:, None] * gradients[draws]).sum(1)
    torch.testing.assert_close(estimates.mean(0), gradients.mean(0), rtol=1e-12, atol=1e-14)
    return trace_variance(estimates)


def formula(gradients, labels):
    """Return proposition 3.1, ``sum_k N_k^2 V_k / N^2``."""
    parts = [gradients[labels == k] for k in labels.unique()]
    return sum(len(p) ** 2 * trace_variance(p) for p in parts) / len(labels) ** 2


def gradients_of(samples, seed=0):
    return torch.randn(samples, 3, generator=seeded(seed), dtype=torch.float64)


def test_tgc01_proposition_3_1_by_enumeration():
    gradients, labels = gradients_of(7), torch.tensor([0, 1, 1, 2, 0, 2, 1])
    assert exact_variance(gradients, labels) == pytest.approx(formula(gradients, labels), rel=1e-12)


def test_tgc02_golden():
    gradients = torch.tensor([[0.0], [0.0], [4.0], [6.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1])
    assert exact_variance(gradients, labels) == 0.25
    assert trace_variance(gradients) / 2 == 3.375  # a uniform batch of 2


def test_tgc03_a_cluster_per_sample_and_one_for_all():
    gradients = gradients_of(6)
    assert formula(gradients, torch.arange(6)) == 0
    one = torch.zeros(6, dtype=torch.long)
    assert formula(gradients, one) == pytest.approx(trace_variance(gradients))


def test_tgc04_the_best_partition_beats_a_uniform_batch_and_some_do_not():
    """The paper promises at most the variance of SG-K for any partition that it found."""
    gradients = gradients_of(6)
    uniform = trace_variance(gradients) / 2
    found = [
        formula(gradients, torch.tensor(labels))
        for labels in itertools.product((0, 1), repeat=6)
        if len(set(labels)) == 2
    ]
    equal = [
        formula(gradients, torch.tensor([int(i in chosen) for i in range(6)]))
        for chosen in itertools.combinations(range(6), 3)
    ]
    assert min(found) <= uniform
    assert sum(equal) / len(equal) <= uniform  # random parts of one size, on average
    assert max(found) > uniform


def test_tgc05_clusters_of_duplicates_add_no_variance():
    gradients = gradients_of(3)[[0, 0, 0, 1, 1, 2]]
    assert formula(gradients, torch.tensor([0, 0, 0, 1, 1, 2])) < 1e-30  # a mean is rounded


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 7])
def test_tgc08_weights_are_unbiased_for_any_batch_size(batch_size):
    """Every sample is drawn 1 / (M N_k) of the time, so the weighted mean is the dataset's."""
    sampler = sampler_of(batch_size)
    gradients = gradients_of(10)
    # 420 draws per cluster are whole passes of 3, 5 and 2 samples, in whole batches: no chance is
    # left.
    seen = list(itertools.islice((i for _ in iter(int, 1) for b in sampler for i in b), 1260))
    weighted = sampler.weights(seen).double()[:, None] * gradients[seen]
    torch.testing.assert_close(weighted.mean(0), gradients.mean(0), rtol=1e-6, atol=1e-8)
    assert sampler.weights([0, 1, 4]).tolist() == pytest.approx([0.9, 1.5, 0.6])


def test_tgc11_twice_the_batch_has_half_the_variance():
    gradients = gradients_of(4)

    def uniform(batch_size):
        draws = torch.tensor(list(itertools.product(range(4), repeat=batch_size)))
        return trace_variance(gradients[draws].mean(1))

    assert uniform(4) == pytest.approx(uniform(2) / 2, rel=1e-12)
    assert uniform(2) == pytest.approx(trace_variance(gradients) / 2, rel=1e-12)


def test_every_sample_is_as_likely_in_every_draw_of_the_first_round():
    """Over seeds; the first batch alone, and only a part of the round."""
    counts = torch.zeros(10)
    for seed in range(300):
        counts[next(iter(sampler_of(2, seed=seed)))] += 1
    expected = torch.tensor([1 / 3 / (3, 5, 2)[(0, 3, 7).index(k)] for k in LABELS]) * 600
    # chi-square with 9 degrees of freedom: above 27.9 once in a thousand
    assert float(((counts - expected).square() / expected).sum()) < 27.9


# --- the sequence


def test_tgc09_every_cluster_comes_once_in_m_draws_and_every_member_once_in_a_pass():
    sampler, labels = sampler_of(1), torch.tensor(LABELS)  # of larger batches the order is gone
    seen = torch.tensor(draws(sampler, 120))
    assert sampler.n_clusters == 3  # the numbers between have no sample, and are dropped
    rounds = labels[seen].view(-1, 3)
    assert rounds.sort(dim=1).values.unique(dim=0).tolist() == [[0, 3, 7]]
    assert len(rounds.unique(dim=0)) == 6  # in all orders
    for label, size in ((0, 3), (3, 5), (7, 2)):
        own = seen[labels[seen] == label]
        passes = own[: len(own) // size * size].view(-1, size)
        assert passes.sort(dim=1).values.unique(dim=0).shape == (1, size)
        assert len(passes.unique(dim=0)) > 1


@pytest.mark.parametrize("clusters", [1, 2, 900, 4500])
def test_blocks_of_any_number_of_clusters(clusters):
    labels = torch.arange(clusters).repeat(3)[torch.randperm(3 * clusters, generator=seeded())]
    sampler = StratifiedBatchSampler(labels, 2)
    seen = torch.tensor(draws(sampler, 2 if clusters > 2 else 900))
    size = 3 * clusters  # three rounds are a pass of every cluster
    for one in seen[: len(seen) // size * size].view(-1, size):
        assert one.sort().values.tolist() == list(range(size))


def test_ranks_share_the_sequence_of_one_process():
    whole = sampler_of(6, num_replicas=1, rank=0)
    parts = [sampler_of(2, num_replicas=3, rank=rank) for rank in range(3)]
    assert len(whole) == len(parts[0]) == 2
    for _ in range(100):
        together = [[*a, *b, *c] for a, b, c in zip(*parts, strict=True)]
        assert [sorted(batch, key=LABELS.__getitem__) for batch in together] == list(whole)


def test_a_batch_comes_in_the_order_of_its_clusters_and_has_the_samples_of_the_sequence():
    parts, whole = sampler_of(5), draws(sampler_of(1), 1)
    for number, batch in enumerate(parts):
        assert [LABELS[i] for i in batch] == sorted(LABELS[i] for i in batch)
        assert sorted(batch) == sorted(whole[5 * number : 5 * number + 5])


def test_the_seed_is_the_generator_s_and_is_drawn_once():
    assert draws(sampler_of(seed=1), 3) == draws(sampler_of(seed=1), 3)
    assert draws(sampler_of(seed=1), 3) != draws(sampler_of(seed=2), 3)
    generator = seeded()
    sampler = StratifiedBatchSampler(LABELS, 2, generator)
    state = generator.get_state()
    before = torch.get_rng_state()
    draws(sampler, 3)
    assert torch.equal(generator.get_state(), state)
    assert torch.equal(torch.get_rng_state(), before)
    assert draws(StratifiedBatchSampler(LABELS, 2), 3) == draws(sampler_of(2, seed=0), 3)


# --- going on


@pytest.mark.parametrize("stop", [0, 1, 3, 4, 5, 1700])
def test_a_sampler_that_is_resumed_goes_on(stop):
    def batches(sampler):
        while True:
            yield from sampler

    expected = list(itertools.islice(batches(sampler_of()), stop + 9))
    first, second = sampler_of(), sampler_of(seed=5)
    seen = list(itertools.islice(batches(first), stop))
    second.load_state_dict(first.state_dict())
    assert seen + list(itertools.islice(batches(second), 9)) == expected
    assert len(expected[0]) == 3


def test_a_sampler_that_is_resumed_between_two_blocks_knows_the_passes_that_go_on():
    labels = [0] * 11 + [1] * 4 + [2] * 17 + [3] * 5000  # the last one is long
    whole = list(StratifiedBatchSampler(labels, 4))[:1030]
    for given in (1023, 1024, 1025):  # a block has 1024 rounds of 4
        sampler = StratifiedBatchSampler(labels, 4)
        sampler.load_state_dict({**sampler.state_dict(), "given": given, "begun": True})
        assert list(itertools.islice(sampler, 5)) == whole[given : given + 5]


@pytest.mark.slow
def test_behind_worker_processes_the_batches_that_were_used_count():
    data, expected = TensorDataset(torch.arange(10)), list(sampler_of(2))
    first, second = sampler_of(2), sampler_of(2, seed=5)
    loader = DataLoader(data, batch_sampler=first, num_workers=1, prefetch_factor=3)
    seen = []
    for (batch,) in loader:
        seen.append(batch.tolist())
        if len(seen) == 2:
            break
    assert first.state_dict()["given"] > 2
    second.load_state_dict(first.state_dict(batches=2))
    assert seen + list(second) == expected


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata calls it
@pytest.mark.parametrize("workers", [0, 2])
def test_torchdata_s_loader_goes_on_in_the_middle_of_an_epoch(workers):
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is no extra")
    data = TensorDataset(torch.arange(10))

    def loader_of(seed=0):
        return stateful.StatefulDataLoader(
            data, batch_sampler=sampler_of(2, seed=seed), num_workers=workers
        )

    def epoch(loader):
        return [batch.tolist() for (batch,) in loader]

    whole = loader_of()
    expected = [epoch(whole) for _ in range(3)]
    for stop in (1, 3, 5):
        first, second = loader_of(), loader_of(seed=5)
        assert epoch(first) == expected[0]
        seen = [batch.tolist() for (batch,) in itertools.islice(first, stop)]
        second.load_state_dict(first.state_dict())
        assert seen + epoch(second) == expected[1]
        assert epoch(second) == expected[2]


def test_a_loop_that_was_left_is_followed_by_a_whole_epoch():
    sampler = sampler_of()
    assert len(list(itertools.islice(sampler, 2))) == 2
    assert len(list(sampler)) == len(sampler) == 4


def test_a_state_that_does_not_fit_is_refused():
    state = sampler_of().state_dict()
    other = sampler_of(2)
    with pytest.raises(ValueError, match="batch_size must be 2 here"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="given must be an integer from 0 to 4"):
        sampler_of().load_state_dict({**state, "given": 9})
    with pytest.raises(ValueError, match="batches must be from 0 to 0"):
        other.state_dict(batches=1)


# --- errors and time


@pytest.mark.parametrize(
    ("labels", "batch_size", "says"),
    [
        ([], 1, "labels must be integers"),
        ([[1, 2]], 1, r"labels must be integers"),
        ([0.5], 1, "labels must be integers"),
        ("abc", 1, "labels must be integers"),
        ([0, -1], 1, "labels must be at least 0, got -1"),
        ([0, 1], 3, "at least the 3 samples of a batch"),
        ([0, 1], 0, "batch_size must be an integer >= 1, got 0"),
        ([0, 1], 1.5, "batch_size must be an integer >= 1"),
    ],
)
def test_bad_arguments_are_refused(labels, batch_size, says):
    with pytest.raises(ValueError, match=says):
        StratifiedBatchSampler(labels, batch_size)


def test_indices_of_no_sample_have_no_weight():
    with pytest.raises(ValueError, match="indices must be from 0 to 9, got 0 to 10"):
        sampler_of().weights([0, 10])
    with pytest.raises(ValueError, match="got -1"):
        sampler_of().weights(torch.tensor([-1]))
    with pytest.raises(ValueError, match=r"indices must be integers, got torch.float32"):
        sampler_of().weights(torch.tensor([0.5]))


@pytest.mark.slow
def test_a_batch_of_a_million_samples_takes_at_most_a_tenth_of_a_millisecond():
    labels = torch.randint(128, (1_000_000,), generator=seeded())
    batches = iter(StratifiedBatchSampler(labels, 128))
    next(batches)  # the first shuffles all members
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(300):
            next(batches)
        times.append((time.perf_counter() - begin) / 300)
    assert min(times) <= 1e-4
