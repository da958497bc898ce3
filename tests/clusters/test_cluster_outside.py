"""Layers that are called outside the model's ``forward``, and by ``torch.func``."""

import pytest
import torch
from cluster_cases import Judge
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap

from gq_triton import GradQueue

SAMPLES, WIDTH = 6, 4
F64 = torch.float64


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3))

    def forward(self, x):
        return x * self.scale


class Encoder(nn.Module):
    """A model whose ``forward`` stops before the head."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(8, 3), Scaled(), nn.LayerNorm(3))

    def forward(self, x):
        return self.features(x)


def judged(strict=False):
    torch.manual_seed(0)
    return Judge(Encoder().to(F64), torch.arange(SAMPLES) % 3, 3, strict=strict, backend="torch")


def batches(count=5):
    return [torch.randn(SAMPLES, WIDTH, dtype=F64) for _ in range(count)]


def losses(out):
    return (out - 1).square().mean(1)


def test_a_head_on_what_the_model_returns_is_part_of_its_forward_pass():
    judge = judged(strict=True)
    judge.steps(lambda model, batch: losses(model.head(model(batch))), batches())
    assert all(how.startswith("clusters") for how in judge.queue.report().values())


def test_each_view_joins_its_own_forward_pass():
    judge = judged(strict=True)
    for one, other in zip(batches(), batches(), strict=True):
        judge.sync()
        views = [losses(judge.twin.head(judge.twin(view))) for view in (one, other)]
        expected = [judge.expected_without_push(view) for view in views]
        judge.expected(sum(views))  # both gradients are queued as one
        judge.optimizer.zero_grad()
        outs = [judge.model(one), judge.model(other)]
        first, second = (losses(judge.model.head(out)).mean() for out in outs)
        (first + second).backward()
        judge.compare({name: expected[0][name] + expected[1][name] for name in expected[0]}, 1e-10)
        judge.optimizer.step()


@pytest.mark.parametrize("through", [
    lambda model, batch: model.head(model.features(batch)),
    lambda model, batch: model.head(model(batch).detach()),
])  # fmt: skip
def test_other_layers_outside_are_one_cluster(through):
    model = Encoder()
    queue = GradQueue(model, n_clusters=2, features="features", queue_length=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    queue.attach(optimizer)

    def step():
        losses(through(model, torch.randn(SAMPLES, WIDTH))).mean().backward()
        optimizer.step()

    with pytest.warns(UserWarning, match="head.0.weight.*called outside the model's forward"):
        step()
    assert queue.report()["head.0.weight"].startswith("whole batch (it was called outside")
    assert queue.metrics(per_layer=True)["head.0.weight"]


def test_strict_refuses_layers_outside():
    model = Encoder()
    queue = GradQueue(model, n_clusters=2, features="features", strict=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    queue.attach(optimizer)
    losses(model.head(model.features(torch.randn(SAMPLES, WIDTH)))).mean().backward()
    with pytest.raises(RuntimeError, match=r"features.0.weight.*called outside"):
        optimizer.step()


def test_transforms_of_functions_see_the_model_alone():
    judge = judged()
    x, params = torch.randn(2, WIDTH, dtype=F64), dict(judge.model.named_parameters())

    def total(params, x):
        return functional_call(judge.model, params, (x,)).sum()

    def transform():
        jacrev(judge.model)(x)
        vmap(grad(lambda row: judge.model(row).sum()))(x)
        grad(total)({name: param.detach() for name, param in params.items()}, x)

    def run(model, batch):
        out = losses(model.head(model(batch)))
        transform()
        return out

    judge.steps(run, batches())


@pytest.mark.filterwarnings("ignore:weighted without clusters")
def test_a_layer_inside_vmap_is_one_cluster():
    class Mapped(Encoder):
        def forward(self, x):
            return vmap(self.head[0])(self.features(x))

    model = Mapped()
    queue = GradQueue(model, n_clusters=2, features="features")
    queue.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    losses(model(torch.randn(SAMPLES, WIDTH))).mean().backward()
    assert queue.report()["head.0.weight"].startswith("whole batch")
    assert queue.report()["features.0.weight"] == "clusters (Linear)"


def test_a_step_within_the_backward_pass_is_refused():
    model = Encoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    GradQueue(model, n_clusters=2, features="features").attach(optimizer)
    weight = next(model.parameters())
    weight.register_post_accumulate_grad_hook(lambda param: optimizer.step())
    with pytest.raises(RuntimeError, match=r"within the backward pass"):
        model(torch.randn(SAMPLES, WIDTH)).square().mean().backward()
