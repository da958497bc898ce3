"""HistoryBatchSampler: chances and weights, ranks, resumption, what is refused."""

import itertools

import pytest
import torch

from gq_triton.sampling import HistoryBatchSampler, history

SCORES = torch.arange(10.0) + (torch.arange(10) == 9) * 20  # 0, 1, ..., 8, 29


def told(samples=10, batch_size=3, **options):
    """Return a sampler that knows all scores, at the beginning of its second epoch."""
    sampler = HistoryBatchSampler(samples, batch_size, **options)
    for _ in sampler:
        pass
    own = torch.arange(sampler.rank, samples, sampler.num_replicas)
    sampler.update(own, SCORES[own % 10])
    return sampler


def test_the_first_epoch_has_every_sample_and_weighs_none():
    sampler = HistoryBatchSampler(10, 3)
    batches = list(sampler)
    assert [len(batch) for batch in batches] == [3] * len(sampler) == [3] * 4
    assert sorted(itertools.chain(*batches[:3], batches[3][:1])) == list(range(10))
    assert sampler.weights(batches[1]).tolist() == [1.0] * 3


def test_samples_come_as_often_as_their_last_scores_say(monkeypatch):
    monkeypatch.setattr(history, "BLOCK", 4)
    sampler, counts = told(), torch.zeros(10)
    chances = 0.8 * SCORES / SCORES.sum() + 0.02
    for _ in range(150):
        for batch in sampler:
            counts += torch.bincount(torch.tensor(batch), minlength=10)
            torch.testing.assert_close(sampler.weights(batch), 0.1 / chances[batch])
    expected = chances * 150 * 4 * 3
    # chi-square with 9 degrees of freedom: above 27.9 once in a thousand
    assert float(((counts - expected).square() / expected).sum()) < 27.9


def test_weights_are_those_of_the_draw_and_scores_that_nobody_told_are_the_mean():
    sampler = HistoryBatchSampler(4, 2)
    for _ in sampler:
        pass
    sampler.update([0, 2], torch.tensor([1.0, 3.0]))
    batch = next(iter(sampler))
    assert sampler.state_dict()["scores"].tolist() == [1, 2, 3, 2]
    sampler.update(range(4), torch.tensor([50.0, 0.0, 0.0, 0.0]))  # as workers read ahead
    before = 0.8 * torch.tensor([1.0, 2.0, 3.0, 2.0]) / 8 + 0.05
    torch.testing.assert_close(sampler.weights(torch.tensor(batch)), 0.25 / before[batch])
    sampler.update(range(4), torch.zeros(4))  # all learnt: uniform
    batch = next(iter(sampler))
    assert sampler.weights(batch).tolist() == [1.0, 1.0]


def test_ranks_draw_disjoint_parts_and_a_smaller_part_counts_less():
    seen = []
    for rank in range(3):
        sampler = told(num_replicas=3, rank=rank, batch_size=2)
        indices = set()
        for _ in range(10):
            for batch in sampler:
                indices |= set(batch)
                chances = 0.8 * SCORES[batch] / SCORES[rank::3].sum() + 0.2 / (
                    4 if rank == 0 else 3
                )
                torch.testing.assert_close(sampler.weights(batch), 0.3 / chances)
        seen.append(indices)
    assert sorted(itertools.chain(*seen)) == list(range(10))


@pytest.mark.parametrize("stop", [0, 2, 4, 5])
def test_a_sampler_that_is_resumed_goes_on(stop):
    def batches(sampler):
        while True:
            for batch in sampler:
                yield batch, sampler.weights(batch).tolist()
                sampler.update(batch, SCORES[batch] + 1)

    whole = list(itertools.islice(batches(HistoryBatchSampler(10, 3)), stop + 6))
    first, second = (HistoryBatchSampler(10, 3, torch.Generator().manual_seed(s)) for s in (0, 5))
    running = batches(first)
    seen = list(itertools.islice(running, stop))
    if stop:
        first.update(seen[-1][0], SCORES[seen[-1][0]] + 1)
    second.load_state_dict(first.state_dict())
    assert seen + list(itertools.islice(batches(second), 6)) == whole


def test_what_is_wrong_is_refused():
    sampler = told()
    state = sampler.state_dict()
    batch = next(iter(sampler))
    sampler.weights(batch)
    for call, says in (
        (lambda: HistoryBatchSampler(3, 4), "samples must be at least the 4 of a batch"),
        (lambda: HistoryBatchSampler(3, 1, uniform=0.0), "uniform must be a number from 1e-06"),
        (lambda: sampler.weights(batch), "asked for once, got"),
        (lambda: sampler.update([1], torch.tensor([torch.nan])), "scores must be finite and >= 0"),
        (lambda: sampler.update([10], torch.ones(1)), "indices must be from 0 to 9"),
        (lambda: sampler.update([1], torch.ones(2)), "one for each of the 2 scores"),
        (lambda: told(num_replicas=2, rank=0).update([1], torch.ones(1)), "of this process's"),
        (lambda: told(batch_size=2).load_state_dict(state), "batch_size must be 2 here"),
        (lambda: sampler.load_state_dict({**state, "scores": -SCORES}), "scores must be a float64"),
        (lambda: sampler.state_dict(batches=9), "batches must be from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=says):
            call()
