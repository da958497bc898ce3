# Gradients, layers and labels are there after a backward pass, whatever their types say.
# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportIncompatibleMethodOverride=false
"""A parameter is clustered only where its whole gradient came through clustered layers."""

import pytest
import torch
from cluster_cases import Judge, cluster_means
from torch import nn

from gq_triton import reference

F64 = torch.float64
LABELS = torch.tensor([0, 2, 2, 0, 4, 0, 0, 2, 2])


class ScaledEmbedding(nn.Embedding):
    def forward(self, tokens):
        return super().forward(tokens) * 4


class Tied(nn.Module):
    """An embedding that overrides ``forward``, tied to the head, as in Bart and Gemma."""

    def __init__(self, embedding=ScaledEmbedding):
        super().__init__()
        self.table, self.features = embedding(11, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 11)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        return self.head(self.features(self.table(tokens)).relu())


class Bypassed(Tied):
    """A model whose head uses the table's weight without a layer."""

    def __init__(self):
        super().__init__(nn.Embedding)
        self.head = nn.Identity()

    def forward(self, tokens):
        hidden = self.features(self.table(tokens)).relu()
        return nn.functional.linear(hidden, self.table.weight)


class TiedAndBypassed(Tied):
    """A model with two uses of the table in layers, and one without a layer."""

    def __init__(self):
        super().__init__(nn.Embedding)

    def forward(self, tokens):
        return super().forward(tokens) + self.table.weight.mean()


class NeverCalled(nn.Module):
    """A model that uses the weight of its last layer without calling the layer."""

    def __init__(self):
        super().__init__()
        self.table, self.features = nn.Embedding(11, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, tokens):
        hidden = self.features(self.table(tokens)).relu()
        return nn.functional.linear(hidden, self.head.weight, self.head.bias)


class WholeJudge(Judge):
    """A judge whose oracle takes the gradients of some parameters as those of one cluster."""

    def __init__(self, model, whole, **options):
        super().__init__(model, LABELS, 5, **options)
        self.whole, self.runs = whole, model

    def run(self, model, batch):
        return square(self.runs if model is self.model else model, batch)

    def expected(self, losses):
        one = torch.zeros_like(self.labels)
        means, _ = cluster_means(self.twin, losses, one, 1)
        rings = {name: self.rings[name].newest() for name in self.whole}
        grads = super().expected(losses)
        for name, newest in rings.items():
            grads[name] = reference.cluster_gradient(means[name], [9], newest, **self.law)
        return grads

    def assert_queued(self):
        for name, ring in self.queue.state_dict()["queue"].items():
            newest = ring[(int(self.queue.state_dict()["queued"][name]) - 1) % len(ring)]
            torch.testing.assert_close(
                newest, self.rings[name].gradients[-1], rtol=1e-9, atol=1e-12
            )


def batches(count=5):
    torch.manual_seed(7)
    return [torch.randint(0, 11, (9, 4)) for _ in range(count)]


def square(model, batch):
    return (model(batch) - 1).square().flatten(1).mean(dim=1)


def judged(kind, whole, compiled=False, **options):
    torch.manual_seed(0)
    judge = WholeJudge(kind().to(F64), whole, **options)
    if compiled:
        judge.runs = torch.compile(judge.model, backend="aot_eager")
    return judge


CASES = {
    "bypassed": (Bypassed, ["table.weight"]),
    "tied and bypassed": (TiedAndBypassed, ["table.weight"]),
    "never called": (NeverCalled, ["head.weight", "head.bias"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_uses_past_the_layer_make_a_parameter_one_cluster_in_a_compiled_model(case):
    kind, whole = CASES[case]
    torch._dynamo.reset()
    judge = judged(kind, whole, compiled=True)
    with pytest.warns(UserWarning, match=f"without clusters.*{whole[0]}.*% of the trainable"):
        judge.steps(judge.run, batches(1))
    judge.steps(judge.run, batches()[1:])  # the warning comes once
    judge.assert_queued()
    for name, how in judge.queue.report().items():
        assert how.startswith("whole batch (used past " if name in whole else "clusters ("), name


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_uses_past_the_layer_are_followed_from_the_second_step_on(case):
    """In the first step the queue is empty: whole batch and clusters are the same then."""
    judge = judged(CASES[case][0], [], strict=True)
    judge.steps(judge.run, batches())
    judge.assert_queued()
    assert all(how.startswith("clusters") for how in judge.queue.report().values())
    judge.handle.remove()
    assert not any("weight" in vars(module) for module in judge.model.modules())


@pytest.mark.parametrize("options", [{}, {"centroid_scale": "standard_error"}])
def test_a_scaled_embedding_tied_to_the_head(options):
    judge = judged(Tied, [], strict=True, **options)
    judge.steps(judge.run, batches())
    judge.assert_queued()
    assert judge.queue.report()["table.weight"] == "clusters (Linear)"


def test_strict_refuses_what_is_not_known_by_cluster():
    judge = judged(NeverCalled, [], strict=True)

    def run():
        penalty = judge.model.head.weight.square().sum()
        (judge.run(judge.model, batches(1)[0]).mean() + penalty).backward()

    run()  # the head is followed from now on
    with pytest.raises(RuntimeError, match=r"strict=True.*: head\.weight \(used past Linear"):
        run()


def test_a_penalty_on_the_weights_belongs_to_no_cluster():
    judge = judged(lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)),
                   ["0.weight"], features="0")  # fmt: skip
    inputs = [torch.randn(9, 6, dtype=F64) for _ in range(5)]

    def run(model, batch):
        return square(model, batch) + 0.1 * model[0].weight.square().sum()

    with pytest.warns(UserWarning, match=r"0\.weight"):
        judge.steps(run, inputs)
    judge.assert_queued()
    # Each step is judged by itself: without the penalty the parameter is clustered again.
    judge.whole = []
    judge.steps(square, inputs)
    assert judge.queue.report()["0.weight"] == "clusters (Linear)"


def test_a_hook_of_the_user_sees_the_weighted_gradient():
    """The order in which hook and plug-in were registered does not matter."""
    torch.manual_seed(0)
    model, seen = nn.Sequential(nn.Linear(6, 4)).to(F64), []
    model[0].weight.register_hook(lambda grad: seen.append(grad.clone()))
    judge = Judge(model, LABELS, 5, features="0")
    judge.twin = nn.Sequential(nn.Linear(6, 4)).to(F64)
    judge.steps(square, [torch.randn(9, 6, dtype=F64) for _ in range(5)])
    model[0].weight.register_hook(lambda grad: grad * 2)
    batch = torch.randn(9, 6, dtype=F64)
    judge.sync()
    expected = judge.expected(square(judge.twin, batch))["0.weight"]
    judge.optimizer.zero_grad()
    square(model, batch).mean().backward()
    torch.testing.assert_close(seen[-1], expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model[0].weight.grad, 2 * expected, rtol=1e-10, atol=1e-12)
    judge.handle.remove()
    assert len(model[0].weight._backward_hooks) == 2
