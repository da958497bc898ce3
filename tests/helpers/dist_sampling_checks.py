"""The checks of the samplers that run on all ranks; see test_sampling_ranks.py."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset, TensorDataset

from gq_triton.sampling import GradientClustering, ImportanceLoader, StratifiedBatchSampler
from gq_triton.sampling.ranks import stream


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 4, generator=generator)
    y = (x[:, 0] > 0).long()
    y[::10] = 1 - y[::10]
    return TensorDataset(x, y)


def trained() -> tuple[DistributedDataParallel, ImportanceLoader]:
    torch.manual_seed(0)
    ddp = DistributedDataParallel(nn.Linear(4, 2))
    return ddp, ImportanceLoader(data(), ddp, "cross_entropy", 4, tau_th=0.3, steps=8)


def train(ddp: nn.Module, loader: ImportanceLoader, stop: int | None = None) -> list[torch.Tensor]:
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.5)
    seen: list[torch.Tensor] = []
    for indices, inputs, targets, weights in loader:
        losses = F.cross_entropy(ddp(inputs), targets, reduction="none")
        optimizer.zero_grad()
        (weights * losses).mean().backward()
        optimizer.step()
        seen.append(indices)
        if len(seen) == stop:
            break
    return seen


def of_all(tensor: torch.Tensor) -> list[torch.Tensor]:
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(found, tensor)
    return found


def check_ranks_draw_disjoint_samples_in_the_same_steps(rank: int) -> None:
    ddp, loader = trained()
    seen = torch.stack(train(ddp, loader) + train(ddp, loader))
    first, second = (set(one[:8].flatten().tolist()) for one in of_all(seen))
    assert not first & second
    cost, tau = loader.costs[-1], loader.tau
    assert 0 < loader.costs[0].steps_by_score < 8
    facts = torch.tensor([tau, cost.steps_by_score, cost.scored], dtype=torch.float64)
    one, other = of_all(facts)
    assert torch.equal(one, other)
    weight = next(ddp.parameters()).detach()
    assert torch.equal(*of_all(weight))


def check_ranks_continue_bit_for_bit(rank: int) -> None:
    ddp, loader = trained()
    expected = torch.stack(train(ddp, loader) + train(ddp, loader))
    ddp, loader = trained()
    seen = train(ddp, loader) + train(ddp, loader, stop=3)
    other_ddp, other = trained()
    # state_dict() was asked for after the loop was left, which is the same position
    other.load_state_dict(loader.state_dict())
    other_ddp.load_state_dict(ddp.state_dict())
    seen += train(other_ddp, other)
    assert torch.equal(torch.stack(seen), expected)


def check_ranks_share_the_batches_of_one_process(rank: int) -> None:
    labels = torch.arange(60) % 7
    own = torch.tensor(list(StratifiedBatchSampler(labels, 3)))
    whole = torch.tensor(list(StratifiedBatchSampler(labels, 6, num_replicas=1, rank=0)))
    together = torch.cat(of_all(own), dim=1)  # each rank's part in the order of its clusters
    order = labels[together].argsort(dim=1, stable=True)
    assert torch.equal(together.gather(1, order), whole)


class Read(TensorDataset):
    """A dataset that counts how often a sample is read."""

    def __init__(self) -> None:
        super().__init__(*data().tensors)
        self.counts = torch.zeros(50, dtype=torch.int64)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        self.counts[index] += 1
        return super().__getitem__(index)


def check_ranks_cluster_a_part_each_to_the_same_result(rank: int) -> None:
    torch.manual_seed(0)
    model, dataset = nn.Linear(4, 2), Read()
    # With these sizes the order of the samples does not matter, so that one process has the result.
    clustering = GradientClustering(model, n_clusters=4, assignment="kmeans", rank=2)
    clustering.fit(DataLoader(dataset, batch_size=6))
    counts = of_all(dataset.counts)
    # 11 passes over a half, and the first 4 samples on both ranks
    assert [int(one.sum()) for one in counts] == [11 * 25 + 4] * 2
    assert torch.equal(*of_all(clustering.labels_))
    whole = GradientClustering(model, n_clusters=4, assignment="kmeans", rank=2)
    order = torch.randperm(50, generator=stream(0, 0, "order"))
    x, y = data().tensors
    whole.fit([(x[order], y[order])])
    assert torch.equal(whole.labels_, clustering.labels_[order])
    assert abs(whole.objective_ / clustering.objective_ - 1) < 1e-5
    assert abs(whole.uniform_ / clustering.uniform_ - 1) < 1e-5


def check_datasets_of_other_lengths_are_refused(rank: int) -> None:
    model, dataset = nn.Linear(4, 2), Subset(data(), range(50 - rank))
    said = f"got 49 to 50 samples, and {50 - rank} on this rank"
    with pytest.raises(ValueError, match=said):
        GradientClustering(model, n_clusters=4).fit(DataLoader(dataset, batch_size=6))
    with pytest.raises(ValueError, match=said):
        next(iter(ImportanceLoader(dataset, model, "cross_entropy", 4)))


CHECKS = [
    check_datasets_of_other_lengths_are_refused,
    check_ranks_cluster_a_part_each_to_the_same_result,
    check_ranks_share_the_batches_of_one_process,
    check_ranks_draw_disjoint_samples_in_the_same_steps,
    check_ranks_continue_bit_for_bit,
]
