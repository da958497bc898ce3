# Gradients and labels exist after a backward pass, although their types allow None.
# pyright: reportOptionalMemberAccess=false, reportArgumentType=false
"""Clusters that the loader brings with the batch, against one backward pass per cluster."""

import copy
from collections import Counter

import pytest
import torch
from cluster_cases import GPT, MLP, Judge, ResNet, cluster_means
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gq_triton import GradQueue, reference
from gq_triton.grouping import Groups
from gq_triton.options import ClusterOptions
from gq_triton.sampling import GradientClustering, StratifiedBatchSampler

F64 = torch.float64
MIXED = torch.tensor([0, 2, 2, 0, 4, 0, 0, 2, 2])  # clusters 1 and 3 are empty, 4 has one sample
IN_ORDER = MIXED.sort().values


def square(model, batch):
    return (model(batch) - 1).square().flatten(1).mean(dim=1)


CASES = {
    "mlp": (MLP, lambda: torch.randn(9, 6, dtype=F64)),
    "convolutions": (
        lambda: ResNet(lambda c: nn.GroupNorm(2, c)),
        lambda: torch.randn(9, 2, 8, 8, dtype=F64),
    ),
    "gpt": (GPT, lambda: torch.randint(0, 9, (9, 5))),
}


def small(kind=MLP, **options):
    """Return a model with a plug-in that is told the labels, and its optimizer."""
    torch.manual_seed(0)
    model = kind().to(F64)
    options = {"n_clusters": 5, "labels": True, "queue_length": 3} | options
    queue = GradQueue(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    queue.attach(optimizer)
    return queue, model, optimizer


@pytest.mark.parametrize("labels", [MIXED, IN_ORDER], ids=["mixed", "in order"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_pass_per_cluster(case, labels):
    kind, make = CASES[case]
    torch.manual_seed(0)
    judge = Judge(kind().to(F64), labels, 5, brings=True)
    judge.steps(square, [make() for _ in range(5)])
    assert torch.equal(judge.queue.labels_, labels)
    assert judge.queue.cluster_sizes_ == [4, 0, 4, 0, 1]


def test_microbatch_mode_takes_the_same_labels():
    pairs = [small(), small(mode="microbatch")]
    for batch in [torch.randn(9, 6, dtype=F64) for _ in range(5)]:
        for queue, model, optimizer in pairs:
            optimizer.zero_grad()
            queue.set_labels(MIXED.tolist())
            losses = square(model, batch)
            losses.mean().backward() if queue is pairs[0][0] else queue.backward(losses)
            optimizer.step()
        for p, q in zip(pairs[0][1].parameters(), pairs[1][1].parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-13)


def test_each_forward_pass_of_a_step_has_labels_of_its_own():
    """With rho = 1 and powers of the sizes the mixture alone depends on the labels."""
    queue, model, _ = small(rho=1.0, population_power=0.5, accumulation_steps=2)
    twin = copy.deepcopy(model)
    other = GradQueue(
        twin, n_clusters=5, features="features", clusterer=lambda f: next(turns),
        rho=1.0, population_power=0.5, accumulation_steps=2, queue_length=3,
    )  # fmt: skip
    other.attach(torch.optim.SGD(twin.parameters(), lr=0.05))
    batches = [torch.randn(9, 6, dtype=F64) for _ in range(2)]
    turns = iter([MIXED, IN_ORDER])
    total = []
    for batch, labels in zip(batches, (MIXED, IN_ORDER), strict=True):
        queue.set_labels(labels)
        total.append(square(model, batch).mean() / 2)
        (square(twin, batch).mean() / 2).backward()
    torch.stack(total).sum().backward()  # both forward passes came before
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-13)


@pytest.mark.slow
def test_a_compiled_model_takes_the_labels_of_each_step():
    torch.manual_seed(0)
    judge = Judge(MLP().to(F64), MIXED, 5, brings=True)
    compiled = torch.compile(judge.model, fullgraph=True, backend="aot_eager")
    for labels in (MIXED, IN_ORDER, MIXED.flip(0)):
        judge.labels = labels
        judge.steps(
            lambda m, b: square(compiled if m is judge.model else m, b),
            [torch.randn(9, 6, dtype=F64) for _ in range(2)],
        )


def test_rows_in_the_order_of_their_clusters_are_not_copied():
    options = ClusterOptions(n_clusters=5, labels=True)
    rows = torch.randn(9, 2, 3)
    views = [Groups.of(labels, 5, options).per_row(9) for labels in (IN_ORDER, MIXED)]
    for groups, kept in zip(views, (True, False), strict=True):
        for parts in (groups.sorted(rows), list(groups.each(rows))):
            assert [len(part) for part in parts] == [4, 0, 4, 0, 1]
            here = rows.untyped_storage().data_ptr()
            assert all((p.untyped_storage().data_ptr() == here) == kept for p in parts if len(p))
            assert torch.equal(torch.cat(parts), rows[groups.labels.argsort(stable=True)])


def test_strata_of_gradients_are_the_clusters_of_the_law():
    """A stratum's mean gradient is weighted by itself, and counts by the stratum's samples."""
    queue, model, optimizer = small(n_clusters=4)
    inputs, targets = torch.randn(60, 6, dtype=F64), torch.randint(3, (60,))
    data = torch.utils.data.TensorDataset(inputs, targets)
    clustering = GradientClustering(model, n_clusters=4)
    clustering.fit(torch.utils.data.DataLoader(data, batch_size=20))
    sampler = StratifiedBatchSampler(clustering.labels_, batch_size=12)
    rings = {name: reference.Ring(3) for name, _ in model.named_parameters()}
    batches = iter(sampler)
    for indices in [next(batches) for _ in range(5)]:
        labels, weights = clustering.labels_[indices], sampler.weights(indices).to(F64)
        twin = copy.deepcopy(model)
        losses = nn.functional.cross_entropy(
            twin(inputs[indices]), targets[indices], reduction="none"
        )
        means, _ = cluster_means(twin, losses, labels, 4)
        counts = [float(weights[labels == k].sum()) for k in range(4)]
        optimizer.zero_grad()
        queue.set_labels(labels)
        queue.set_sample_weights(weights)
        losses = nn.functional.cross_entropy(
            model(inputs[indices]), targets[indices], reduction="none"
        )
        (weights * losses).mean().backward()
        assert queue.cluster_sizes_ == [3, 3, 3, 3]
        for name, param in model.named_parameters():
            expected = reference.cluster_gradient(means[name], counts, rings[name].newest())
            torch.testing.assert_close(param.grad, expected, rtol=1e-9, atol=1e-12)
            shares = torch.tensor(counts, dtype=F64) / sum(counts)
            rings[name].push(torch.tensordot(shares, means[name], dims=1))
        optimizer.step()


class Calls(TorchDispatchMode):
    """Counts the calls of torch's operations."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_a_stratified_batch_needs_no_copy_in_the_order_of_its_clusters():
    """The same samples in another order take one copy more for each factor of a layer."""
    inputs = torch.randn(60, 6, dtype=F64)
    labels = torch.arange(60) % 4
    batch = torch.tensor(next(iter(StratifiedBatchSampler(labels, batch_size=12))))
    counts, grads = [], []
    for indices in (batch, batch.flip(0)):
        queue, model, _ = small(n_clusters=4)
        queue.set_labels(labels[indices])
        loss = square(model, inputs[indices]).mean()
        with Calls() as calls:
            loss.backward()
        counts.append(calls.counts)
        grads.append([p.grad for p in model.parameters()])
    assert counts[0]["index_select"] < counts[1]["index_select"]
    assert sum(counts[0].values()) < sum(counts[1].values())
    torch.testing.assert_close(*grads)


def test_a_fit_of_clusters_in_gradient_space_is_no_training():
    torch.manual_seed(0)
    model = MLP().to(F64)
    queue = GradQueue(model, n_clusters=3, features="features", queue_length=3)
    queue.attach(torch.optim.SGD(model.parameters(), lr=0.05))
    inputs, targets = torch.randn(30, 6, dtype=F64), torch.randint(3, (30,))
    nn.functional.cross_entropy(model(inputs), targets).backward()
    before, labels = queue.state_dict()["clusters"], queue.labels_
    data = torch.utils.data.TensorDataset(inputs + 1, targets)
    clustering = GradientClustering(model, n_clusters=4, max_iter=1)
    clustering.fit(torch.utils.data.DataLoader(data, batch_size=20))
    assert queue.state_dict()["clusters"] == before
    assert torch.equal(queue.labels_, labels)


def test_what_is_not_labels_is_refused():
    queue, model, _ = small()
    batch = torch.randn(9, 6, dtype=F64)
    for wrong in (MIXED.double(), MIXED[None], [], MIXED > 1, "labels"):
        with pytest.raises(ValueError, match="set_labels must give one integer to each of at"):
            queue.set_labels(wrong)
    with pytest.raises(RuntimeError, match=r"set_labels\(labels\) before the forward pass of"):
        square(model, batch).mean().backward()
    queue.set_labels(MIXED[:5])
    with pytest.raises(ValueError, match="set_labels gave 5 labels for a batch of 9 samples"):
        model(batch)
    queue.set_labels(MIXED - 1)
    loss = square(model, batch).mean()
    with pytest.raises(ValueError, match="set_labels must give labels >= 0, got -1"):
        loss.backward()
    queue.set_labels(MIXED)
    with torch.no_grad():
        model(batch[:3])  # an evaluation takes no labels
    square(model, batch).mean().backward()
    with pytest.raises(RuntimeError, match="before the forward pass"):
        square(model, batch).mean().backward()  # labels are used once


def test_options_that_contradict_labels():
    for found in ({"features": "features"}, {"clusterer": lambda f: MIXED}):
        with pytest.raises(ValueError, match=f"labels=True takes the place of {next(iter(found))}"):
            GradQueue(MLP(), n_clusters=2, labels=True, **found)
    with pytest.raises(ValueError, match="labels needs n_clusters"):
        GradQueue(MLP(), labels=True)
    with pytest.raises(ValueError, match="or labels=True where the loader brings clusters"):
        GradQueue(MLP(), n_clusters=2)
    with pytest.raises(ValueError, match="set_labels needs labels=True"):
        GradQueue(MLP(), n_clusters=2, features="features").set_labels(MIXED)
    with pytest.raises(ValueError, match="set_labels needs n_clusters and labels=True"):
        GradQueue(MLP()).set_labels(MIXED)


def test_check_leaves_the_labels_for_training():
    queue, model, _ = small()
    batch = torch.randn(9, 6, dtype=F64)
    with pytest.raises(RuntimeError, match="before the forward pass"):
        queue.check(batch)
    queue.set_labels(MIXED)
    assert queue.check(batch).share == 1
    square(model, batch).mean().backward()
    assert torch.equal(queue.labels_, MIXED)
