"""The number of operations in a clustered step: on a GPU each one costs the host time."""

from collections import Counter
from typing import Any

import pytest
import torch
from cluster_cases import GPT, MLP, Judge, ResNet
from kernel_cases import INTERPRETED, QUIET
from test_cluster_grad import LABELS, images, next_token, square, tokens
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gq_triton import GradQueue
from gq_triton.cluster_grad.layers import conv, embedding, linear, rows
from gq_triton.cluster_grad.standins import meet
from gq_triton.queues import Queues

F64 = torch.float64
pytestmark = QUIET
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
    for module in (linear, conv, embedding, rows, meet):
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
    """A block of a Linear and a LayerNorm, two parameters each, takes 11 launches.

    Linear: 1 for the forward pass, 1 for the input's gradient, 1 each for the sums of weight and
    bias, 1 each to weight them. LayerNorm: 1, 1, 1 for the sums of both, 2. The number does not
    depend on that of the clusters.
    """
    two, four = count(monkeypatch, 2), count(monkeypatch, 4)
    assert four[0] - two[0] <= 2 * 11
    # For the loss, the clusters of the batch, and what is once for all parameters.
    assert two[0] <= 2 * 11 + 31
    # Flags, the check for values that are not finite, one copy, counters, the statistics.
    assert four[1] == two[1] <= 5


@pytest.mark.parametrize("case", ["mlp", "gpt", "resnet"])
def test_models_where_launches_cost(launches_cost, case):
    torch.manual_seed(0)
    model, batches, loss = {
        "mlp": (MLP, [x.flatten(1)[:, :6] for x in images()], square),
        "gpt": (GPT, tokens(), next_token),
        "resnet": (lambda: ResNet(lambda c: nn.GroupNorm(2, c)), images(), square),
    }[case]
    Judge(model().to(F64), LABELS, 5).steps(loss, batches)


class Convolutions(nn.Module):
    """Convolutions of all kinds, kernels in two memory formats, and a column-major weight."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        weight = self.first.weight.data.to(memory_format=torch.channels_last)
        self.first.weight.data = weight
        self.depthwise = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.same = nn.Conv2d(4, 3, (3, 2), padding="same", dilation=2, padding_mode="circular")
        self.line = nn.Conv1d(3, 2, 3, stride=2)
        self.features = nn.Linear(2, 3)
        self.features.weight = nn.Parameter(self.features.weight.detach().t().contiguous().t())

    def forward(self, x):
        x = self.depthwise(self.first(x).tanh()).tanh()
        x = self.line(self.same(self.up(x).tanh()).tanh().flatten(2)).tanh()
        return self.features(x.mean(dim=2))


@pytest.mark.skipif(not INTERPRETED, reason="The layers' tensors are on the CPU.")
@pytest.mark.parametrize("backend", [pytest.param("triton", marks=pytest.mark.slow), "torch"])
def test_convolutions_where_launches_cost(launches_cost, backend):
    torch.manual_seed(0)
    steps = 1 if backend == "triton" else 5  # interpreted kernels take seconds for a step
    Judge(Convolutions().to(F64), LABELS, 5, backend=backend).steps(square, images(steps))


INTERPRETED_ONLY = pytest.mark.skipif(not INTERPRETED, reason="Kernels are compiled here.")


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend",
    [None, "torch", "of a part", pytest.param("triton", marks=[INTERPRETED_ONLY, *QUIET])],
)
def test_a_table_with_more_rows_than_lookups(request, monkeypatch, backend):
    """Only the rows that were looked up are weighted. The padding row gets no gradient.

    With a backend the lookups are those of a device where launches cost; a rank that holds a part
    of the ring sums them for the whole table.
    """
    if backend is not None:
        request.getfixturevalue("launches_cost")
    if backend == "of a part":
        monkeypatch.setattr(Queues, "whole", False)
        monkeypatch.setattr(Queues, "combine_rows", None)
        backend = "torch"

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.features = nn.Embedding(60, 4, padding_idx=3), nn.Linear(4, 3)

        def forward(self, tokens):
            return self.features(torch.tanh(self.table(tokens)).mean(dim=1))

    torch.manual_seed(0)
    options: Any = {} if backend is None else {"backend": backend}
    Judge(Table().to(F64), LABELS, 5, **options).steps(square, tokens())
