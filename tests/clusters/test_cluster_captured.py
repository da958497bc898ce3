"""A clustered step is recorded, then replayed as a CUDA graph does: no Python runs in between."""

import copy

import pytest
import torch
from kernel_cases import INTERPRETED, QUIET
from replay import Recording
from torch import nn

from gq_triton import GradQueue
from gq_triton.cluster_grad.layers import conv, linear

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="Kernels are compiled here, for CUDA."),
    *QUIET,
]
SAMPLES, CLUSTERS = 6, 3


class Model(nn.Module):
    """A table that is also the head, a linear layer and a norm."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.features = nn.LayerNorm(4)
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.table.weight

    def forward(self, symbols):
        return self.head(self.features(self.inner(self.table(symbols)).tanh()))


class Side:
    """A model in training, with buffers for its batches."""

    def __init__(self, model, options):
        self.model = model
        self.symbols = torch.zeros(SAMPLES, 2, dtype=torch.int64)
        self.labels = torch.zeros(SAMPLES, dtype=torch.int64)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        self.queue = GradQueue(
            model, n_clusters=CLUSTERS, features="features", queue_length=2, backend="triton",
            clusterer=lambda features: self.labels, **options,
        )  # fmt: skip
        self.queue.attach(self.optimizer)

    def step(self):
        self.optimizer.zero_grad()
        logits = self.model(self.symbols)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), self.symbols.flatten())
        self.queue.record_loss(loss.detach())
        loss.backward()
        self.optimizer.step()

    def fill(self, number):
        """Write the batch of a step to the buffers."""
        generator = torch.Generator().manual_seed(number)
        self.symbols.copy_(torch.randint(5, self.symbols.shape, generator=generator))
        self.labels.copy_(torch.randint(CLUSTERS, self.labels.shape, generator=generator))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    for module in (linear, conv):
        monkeypatch.setattr(module, "launches_cost", lambda tensor: True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"loss_window": 2, "min_queue_length": 1}, {"match_norm": True}]
)
def test_replays_are_steps(as_on_a_gpu, options):
    """The queue becomes full between the replays."""
    torch.manual_seed(0)
    model = Model()
    eager, replayed = Side(model, options), Side(copy.deepcopy(model), options)
    # Numbers of passes and layers are small tensors of the host.
    recording = Recording(on_host=("cluster_grad/passes.py", "cluster_grad/site.py"))
    for number in range(5):
        for side in (eager, replayed):
            side.fill(number)
        eager.step()
        if number == 0:
            replayed.step()
        elif number == 1:
            with pytest.MonkeyPatch.context() as patch, recording():
                for module in ("gq_triton.queues.queues.capturing", "gq_triton.ring.capturing"):
                    patch.setattr(module, lambda device: True)
                replayed.step()
        else:
            recording.replay()
    for p, q in zip(eager.model.parameters(), replayed.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert eager.queue.digest() == replayed.queue.digest()
    assert eager.queue.metrics() == replayed.queue.metrics()
