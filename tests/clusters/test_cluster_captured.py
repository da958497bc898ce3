# pyright: reportAttributeAccessIssue=false
"""A clustered step that is replayed, as a CUDA graph does it: no Python runs in between."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import INTERPRETED, QUIET
from replay import captured
from torch import nn

from gq_triton import GradQueue
from gq_triton.cluster_grad import passes
from gq_triton.cluster_grad.layers import conv, embedding, linear, rows
from gq_triton.replayed import to_be_replayed
from gq_triton.variance import NoiseScale

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="Kernels are compiled here, for CUDA."),
    *QUIET,
]
SAMPLES, CLUSTERS, LENGTH = 6, 3, 2


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


class Loop:
    """A loop over batches of symbols; ``step`` is the whole step."""

    def __init__(self, *, scaled=False, parts=1, **options):
        torch.manual_seed(0)
        self.model, self.parts = Model(), parts
        self.optimizer: Any = torch.optim.SGD(
            self.model.parameters(), lr=0.1, momentum=0.9, fused=scaled
        )
        self.scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=8.0)
        if options.pop("own", False):
            options["clusterer"] = lambda features: by_order(features[:, 0])
        if not options.get("labels"):
            options.setdefault("features", "features")
        self.labels = options.get("labels")
        self.queue = GradQueue(
            self.model, n_clusters=CLUSTERS, queue_length=LENGTH, backend="triton",
            accumulation_steps=parts, **options,
        )  # fmt: skip
        self.handle = self.queue.attach(self.optimizer, self.scaler)

    def step(self, symbols):
        self.optimizer.zero_grad()
        total = torch.zeros(())
        for part in symbols.chunk(self.parts):
            if self.labels:
                self.queue.set_labels(by_order(part[:, 0]))
            logits = self.model(part)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), part.flatten()) / self.parts
            self.scaler.scale(loss).backward()
            total = total + loss.detach()
        self.queue.record_loss(total)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return total

    def holders(self):
        return (self.optimizer,)  # the plug-in is found

    def tensors(self):
        yield from self.model.parameters()
        for state in self.optimizer.state.values():
            yield from filter(torch.is_tensor, state.values())
        yield from filter(torch.is_tensor, vars(self.scaler).values())
        yield from self.queue._tensors()


def by_order(numbers):
    """Return labels that depend on the batch; none is missing, so that K stays, as on a GPU."""
    return numbers.argsort(stable=True) % CLUSTERS


def batch(number, size=SAMPLES):
    return torch.randint(5, (size, 2), generator=torch.Generator().manual_seed(number))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    for module in (conv, embedding, linear, rows):
        monkeypatch.setattr(module, "launches_cost", lambda tensor: True)


def same(ours, twin):
    for p, q in zip(ours.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p.grad, q.grad)
    assert ours.queue.digest() == twin.queue.digest()
    assert ours.queue.metrics() == twin.queue.metrics()
    assert torch.equal(ours.queue.labels_, twin.queue.labels_)
    states = [loop.queue.state_dict().get("clusters") for loop in (ours, twin)]
    assert str(states[0]) == str(states[1])


CASES: dict[str, Any] = {
    "k-means, scaled": (6, {"loss_window": 2, "min_queue_length": 1, "scaled": True}),
    "labels, accumulated": (4, {"labels": True, "parts": 2, "match_norm": True}),
    "own, of the output's gradient": (4, {"features": "output_gradient", "own": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_replays_are_steps(as_on_a_gpu, case):
    """The queue becomes full in replays, a batch is smaller, and the graph goes on behind it."""
    number_of_steps, options = CASES[case]
    ours, twin, log = Loop(**options), Loop(**options), []
    step = captured(ours, warmup=2, log=log)
    for number in range(number_of_steps):
        x = batch(number, 4 if number == 4 else SAMPLES)
        assert torch.equal(step(x), twin.step(x))
        same(ours, twin)
    whole = ["step", "step", "capture", "replay", "replay", "step", "replay"]
    assert log == whole[: number_of_steps + 1]
    assert not step._graph.recording.dangling()


class Cheap:
    """A loop in plain torch on a small model, for what is refused before any kernel runs."""

    def __init__(self, model: nn.Module | None = None, **options: Any):
        self.model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)) if model is None else model
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        if "labels" not in options:
            options["features"] = "1"
        self.queue = GradQueue(self.model, n_clusters=2, backend="torch", **options)
        self.handle = self.queue.attach(self.optimizer)
        self.inside: Callable[..., Any] = lambda x: None
        self.run: Callable[..., torch.Tensor] = self.model

    def step(self, x):
        self.optimizer.zero_grad()
        self.inside(x)
        loss = self.run(x).square().mean()
        loss.backward()
        self.optimizer.step()
        return loss

    def holders(self):
        return (self.optimizer,)

    def tensors(self):
        yield from self.model.parameters()
        yield from self.queue._tensors()


def refused(loop, match, before=lambda: None):
    """Assert that the first or second call is refused."""
    step = captured(loop)

    def twice():
        for _ in range(2):
            before()
            step(torch.randn(8, 4))

    with pytest.raises(RuntimeError, match=match):
        twice()


def test_what_is_given_between_two_calls_is_refused():
    loop = Cheap()
    refused(
        loop, "^set_sample_weights was called between two",
        lambda: loop.queue.set_sample_weights(torch.ones(8)),
    )  # fmt: skip
    loop = Cheap(labels=True)
    refused(loop, "^set_labels was called between", lambda: loop.queue.set_labels([0, 1] * 4))


def test_weights_that_the_step_sets_are_taken():
    loop = Cheap()
    loop.inside = lambda x: loop.queue.set_sample_weights(x[:, 0].abs())
    step = captured(loop)
    step(torch.randn(8, 4))
    step(torch.randn(8, 4))


class Recurrent(nn.Module):
    """Its sums by cluster need a run of it for each cluster."""

    def __init__(self):
        super().__init__()
        self.layer = nn.GRU(4, 3, batch_first=True)

    def forward(self, x):
        return self.layer(x[:, None])[0][:, 0]


def test_what_the_host_reads_is_refused_in_the_warm_up():
    layers = Recurrent(), nn.LayerNorm(3)
    refused(Cheap(nn.Sequential(*layers)), "^cuda_graph cannot.*GRU runs again for each")
    loop = Cheap(mode="microbatch")
    loop.run = lambda x: loop.queue.backward(loop.model(x).square().mean(1)) or x
    refused(loop, 'mode="microbatch" reads the sizes')
    loop = Cheap()
    loop.inside = lambda x: loop.queue.record_loss(0.5)
    loop.queue._queues.options = loop.queue._queues.options.__class__(loss_window=2)
    refused(loop, "record_loss gets a number of the host")


def test_a_graph_of_torch_compile_is_refused():
    with to_be_replayed(), pytest.raises(RuntimeError, match="compile has the host wait"):
        passes.param_grads(torch.tensor(0), torch.tensor(0), [], [], traced=True)


def test_a_meter_is_refused():
    loop = Cheap()
    meter = NoiseScale(loop.model)
    refused(loop, "NoiseScale counts forward passes in Python; call remove")
    meter.remove()
