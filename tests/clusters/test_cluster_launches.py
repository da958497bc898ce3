"""The number of operations in a clustered step: on a GPU each one costs the host time."""

from collections import Counter

import pytest
import torch
from cluster_cases import GPT, MLP, Judge, ResNet
from kernel_cases import INTERPRETED
from test_cluster_grad import LABELS, images, next_token, square, tokens
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gq_triton import GradQueue
from gq_triton.cluster_grad.layers import conv, linear
from gq_triton.grouping import Groups
from gq_triton.options import ClusterOptions

F64 = torch.float64
# Operations that only make views or allocate memory.
FREE = {
    "_local_scalar_dense", "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like",
    "empty_strided", "expand", "lift_fresh", "new_empty", "permute", "promote_types", "resize_",
    "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind",
    "unsqueeze", "view",
}  # fmt: skip


@pytest.fixture
def launches_cost(monkeypatch):
    """Make the CPU run the code for devices where each launch costs the host time."""
    for module in (linear, conv):
        monkeypatch.setattr(module, "launches_cost", lambda tensor: True)


class Counting(TorchDispatchMode):
    """A mode that counts the operations that would be launches on a GPU."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.counts = Counter()
        from triton.runtime import interpreter

        run = interpreter.GridExecutor.__call__

        def launch(grid, *args, **kwargs):
            """Count a kernel without running it: its results are whatever memory holds.

            The samples' order is found: plain torch refuses indices that there are not.
            """
            self.counts[grid.fn.__name__] += 1
            if grid.fn.__name__ == "_group_kernel":
                run(grid, *args, **kwargs)

        monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.partition(".")[0]
        if name not in FREE:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def count(monkeypatch, blocks, clusters=5):
    """Return the operations of a step's two passes, and those of queueing its gradients."""
    layers = [nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(blocks)]
    model = nn.Sequential(*layers)
    queue = GradQueue(model, n_clusters=clusters, features="0", backend="triton",
                      clusterer=lambda features: LABELS)  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    queue.attach(optimizer)
    taken = []
    for _ in range(2):
        optimizer.zero_grad()
        x = torch.randn(9, 4, 8)
        with monkeypatch.context() as patch, Counting(patch) as passes:
            model(x).square().mean().backward()
        with monkeypatch.context() as patch, Counting(patch) as pushing:
            queue._weigh(optimizer)
        taken.append((passes.counts.total(), pushing.counts.total()))
    return taken[-1]


@pytest.mark.skipif(not INTERPRETED, reason="Kernels are compiled here, for CUDA.")
def test_launches_of_a_step(monkeypatch, launches_cost):
    """A block of a Linear and a LayerNorm, two parameters each, takes 20 launches.

    Linear: 1 for the forward pass, 1 for the input's gradient, 4 for the weight's sums, 2 for the
    bias's sums, 4 to weight both. LayerNorm: 1, 1, 2 for the sums of both, 4. The number does not
    depend on that of the clusters.
    """
    two, four = count(monkeypatch, 2), count(monkeypatch, 4)
    assert four[0] - two[0] <= 2 * 20
    # For loss, optimizer and the clusters of the batch. Half are numbers per cluster on the host.
    assert two[0] <= 2 * 20 + 60
    # Flags, the check for values that are not finite, one copy, counters, the statistics.
    assert four[1] == two[1] <= 5


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("case", ["mlp", "gpt", "resnet"])
def test_models_where_launches_cost(monkeypatch, launches_cost, case, padded):
    monkeypatch.setattr(linear, "pays_padding", lambda *args: padded)
    torch.manual_seed(0)
    model, batches, loss = {
        "mlp": (MLP, [x.flatten(1)[:, :6] for x in images()], square),
        "gpt": (GPT, tokens(), next_token),
        "resnet": (lambda: ResNet(lambda c: nn.GroupNorm(2, c)), images(), square),
    }[case]
    Judge(model().to(F64), LABELS, 5).steps(loss, batches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("labels", [LABELS, torch.zeros(9, dtype=torch.int64)])
def test_padding_does_not_change_the_products(monkeypatch, labels, dtype):
    torch.manual_seed(0)
    groups = Groups.of(labels, 5, ClusterOptions())
    left, right = torch.randn(9, 4, 3).to(dtype), torch.randn(9, 4, 7).to(dtype)
    results = []
    for padded in (True, False):
        monkeypatch.setattr(linear, "pays_padding", lambda *args, padded=padded: padded)
        results.append(torch.full((5, 3, 7), torch.nan))
        linear.products_of_all(groups, left, right, results[-1])
    exact = torch.stack(
        [
            left[labels == k].flatten(0, 1).double().T @ right[labels == k].flatten(0, 1).double()
            for k in range(5)
        ]
    )
    for result in results:
        # Sums of at most 36 products of numbers of order 1.
        torch.testing.assert_close(result.double(), exact, rtol=0, atol=36 * 2e-6)


def test_padding_is_for_small_layers_and_even_clusters():
    def pays(sizes, positions, height, width):
        labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        groups = Groups.of(labels, len(sizes), ClusterOptions())
        left, right = (torch.empty(sum(sizes), positions, n) for n in (height, width))
        return linear.pays_padding(groups, left, right)

    even, uneven = [16] * 8, [100, *[4] * 7]
    assert pays(even, 32, 4096, 4096)
    assert not pays(uneven, 32, 4096, 4096)
    assert pays(uneven, 1, 256, 64)
    assert not pays([16], 1, 8, 8)


def test_a_table_with_more_rows_than_lookups():
    """Only the rows that were looked up are weighted. The padding row gets no gradient."""

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.features = nn.Embedding(60, 4, padding_idx=3), nn.Linear(4, 3)

        def forward(self, tokens):
            return self.features(torch.tanh(self.table(tokens)).mean(dim=1))

    torch.manual_seed(0)
    Judge(Table().to(F64), LABELS, 5).steps(square, tokens())
