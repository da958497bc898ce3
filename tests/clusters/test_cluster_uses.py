# Gradients, layers and labels are there after a backward pass, whatever their types say.
# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportIndexIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false
"""Layers and forward passes used several times or not at all, and several owners of a model."""

import copy
import gc
import weakref

import pytest
import torch
from cluster_cases import MLP, Judge
from torch import nn

from gq_triton import GradQueue
from gq_triton.cluster_grad import Step
from gq_triton.cluster_grad.standins import meet
from gq_triton.grouping import Groups

F64 = torch.float64
LABELS = torch.tensor([0, 2, 2, 0, 4, 0, 0, 2, 2])


def batches(count=5):
    torch.manual_seed(7)
    return [torch.randn(9, 6, dtype=F64) for _ in range(count)]


def square(model, batch):
    return (model(batch) - 1).square().mean(dim=1)


def make(kind=MLP):
    torch.manual_seed(0)
    return kind().to(F64)


def plug(model, **options):
    options = {"n_clusters": 5, "features": "features", "queue_length": 3} | options
    queue = GradQueue(model, clusterer=lambda f: LABELS[: len(f)], **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return queue, optimizer, queue.attach(optimizer)


def newest(queue, step):
    """Return the gradients that were queued last, by parameter name."""
    return {name: ring[step % 3] for name, ring in queue.state_dict()["queue"].items()}


def assert_queued_is_grad(queue, model, step):
    """Check, with rho = 1, that the queued gradients are those that the optimizer used."""
    for name, ring in newest(queue, step).items():
        torch.testing.assert_close(ring, model.get_parameter(name).grad, rtol=1e-10, atol=1e-13)


def test_a_use_without_gradient_is_no_use():
    class Detached(MLP):
        def forward(self, x):
            hidden = self.features(x).relu()
            with torch.no_grad():
                self.features(x * 2)
            return self.head(hidden) - 0.1 * self.head(2 * hidden).detach()

    Judge(make(Detached), LABELS, 5).steps(square, batches())


def test_two_views_in_one_backward_pass_are_both_queued():
    model = make()
    queue, optimizer, _ = plug(model, rho=1.0)
    for step, batch in enumerate(batches()):
        optimizer.zero_grad()
        (square(model, batch).mean() + square(model, -batch).mean()).backward()
        optimizer.step()
        assert_queued_is_grad(queue, model, step)


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("probed", [False, True])
def test_probes_and_clipping_between_micro_batches(clipped, probed):
    model, plain = make(), make()
    queue, optimizer, _ = plug(model, rho=1.0, accumulation_steps=2)
    for step, batch in enumerate(batches()):
        optimizer.zero_grad(set_to_none=bool(step % 2))
        plain.zero_grad()
        for part in (batch, -batch):
            (square(model, part).mean() / 2).backward()
            (square(plain, part).mean() / 2).backward()
            if clipped:
                nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            if probed:
                x = part.clone().requires_grad_()
                torch.autograd.grad(square(model, x).mean(), x)
        optimizer.step()
        plain.load_state_dict(model.state_dict())
        for name, ring in newest(queue, step).items():
            raw = plain.get_parameter(name).grad
            torch.testing.assert_close(ring, raw, rtol=1e-10, atol=1e-13)


def test_autograd_grad_leaves_p_grad_alone():
    model = make()
    plug(model)
    found = torch.autograd.grad(square(model, batches(1)[0]).mean(), list(model.parameters()))
    assert all(param.grad is None for param in model.parameters())
    assert all(grad.abs().max() > 0 for grad in found)


def test_layers_unfrozen_later_are_clustered():
    model = make()
    model.features[0].requires_grad_(False)
    judge = Judge(model, LABELS, 5)
    judge.steps(square, batches(1))
    assert judge.queue.report()["features.0.weight"] == "frozen"
    for m in (model, judge.twin):
        m.features[0].requires_grad_(True)
    judge.steps(square, batches())
    assert judge.queue.report()["features.0.weight"] == "clusters (Linear)"


def test_zeros_of_a_layer_that_a_step_does_not_use_are_no_gradient_of_the_whole_batch():
    """Heads that take turns have them after zero_grad(set_to_none=False); strict refused them."""
    model = nn.ModuleDict({"body": nn.Linear(3, 4), "a": nn.Linear(4, 2), "b": nn.Linear(4, 2)})
    model.forward = lambda x, head: model[head](model["body"](x))
    queue = GradQueue(model, n_clusters=2, features="body", strict=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    queue.attach(optimizer)
    for head in "abba":
        optimizer.zero_grad(set_to_none=False)
        model(torch.randn(6, 3), head).square().mean().backward()
        optimizer.step()
    assert set(queue.report().values()) == {"clusters (Linear)"}


def test_a_queue_that_is_attached_again_weights_again():
    model = make()
    queue, optimizer, handle = plug(model)
    handle.remove()
    queue.attach(optimizer)
    for batch in batches(2):
        optimizer.zero_grad()
        square(model, batch).mean().backward()
        assert all(bool(param.grad.any()) for param in model.parameters())
        optimizer.step()
    assert set(queue.state_dict()["queue"]) == {name for name, _ in model.named_parameters()}


def test_a_copy_can_have_a_plug_in_of_its_own():
    model = make()
    plug(model)
    judge = Judge(copy.deepcopy(model), LABELS, 5)
    judge.twin = make()
    judge.steps(square, batches())


def test_a_plug_in_whose_optimizer_is_gone_gives_way():
    model = make()
    plug(model)
    gc.collect()
    judge = Judge(model, LABELS, 5)
    judge.twin = make()
    judge.steps(square, batches())


def test_two_plug_ins_do_not_share_a_layer():
    model = make(lambda: nn.Sequential(MLP(), nn.Linear(3, 3)))
    _keep, _alive, handle = plug(model, features="0.features")
    part = GradQueue(model[0], n_clusters=2, features="features")
    others = torch.optim.SGD(model[1].parameters(), lr=0.1)
    with pytest.raises(ValueError, match="attached already"):
        part.attach(torch.optim.SGD(model[0].parameters(), lr=0.1))
    handle.remove()
    handle = GradQueue(model, n_clusters=2, features="0.features").attach(others)
    with pytest.raises(ValueError, match="attached already"):
        part.attach(torch.optim.SGD(model[0].parameters(), lr=0.1))
    handle.remove()
    part.attach(torch.optim.SGD(model[0].parameters(), lr=0.1))


def test_models_go_when_nobody_holds_them():
    references = []
    for _ in range(3):
        model = make()
        _, optimizer, _ = plug(model)
        square(model, batches(1)[0]).mean().backward()
        optimizer.step()
        references.append(weakref.ref(model))
    del model, optimizer, _
    gc.collect()
    assert [reference() for reference in references] == [None] * 3


class Positions(nn.Module):
    """A model that looks up positions once for all samples, as nanoGPT does."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.features, self.places = nn.Linear(6, 6), nn.Embedding(18, 6)

    def forward(self, x):
        return self.features(x) + self.places(torch.arange(18).view(self.shape)).sum(dim=-2)


class OwnPositions(Positions):
    """A model that counts each sample's positions, as OPT does, or expands those of all."""

    def __init__(self, shape):
        super().__init__(shape)
        self.places = nn.Embedding(18, 6, padding_idx=1)

    def forward(self, x):
        places = torch.arange(18).view(self.shape).expand(9, -1)
        return (self.features(x)[:, None] + self.places(places)).square().sum(dim=1)


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.features, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.features(x).expand(18, 9, 6)).mean(dim=0)


class Shuffled(TimeFirst):
    def forward(self, x):
        rows = self.features(x).repeat(2, 1)[torch.arange(18).flip(0)]
        return self.head(rows).flip(0)[:9]


@pytest.mark.parametrize("kind", [lambda: Positions((18,)), lambda: Positions((1, 18))])
def test_positions_of_all_samples_are_clustered(kind):
    judge = Judge(make(kind), LABELS, 5, strict=True)
    judge.steps(square, batches())


@pytest.mark.parametrize("shape", [(1, 18), (9, 2)])
def test_positions_of_each_sample_are_those_of_its_lookups(shape, monkeypatch):
    """They need no sums of the size K times all rows, as what is computed in other ways does."""
    monkeypatch.setattr(meet, "routed", None)
    Judge(make(lambda: OwnPositions(shape)), LABELS, 5, strict=True).steps(square, batches())


def test_rows_that_are_shown_to_be_time_major_are_clustered():
    Judge(make(TimeFirst), LABELS, 5, strict=True).steps(square, batches())


def test_rows_that_are_not_sample_after_sample_are_one_cluster():
    model = make(Shuffled)
    queue, _, _ = plug(model)
    with pytest.warns(
        UserWarning, match=r"head\.weight, head\.bias \(head saw rows in no known order"
    ):
        square(model, batches(1)[0]).mean().backward()
    assert queue.report()["head.weight"].startswith("whole batch (head saw rows in no known order")
    assert queue.report()["features.weight"] == "clusters (Linear)"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rms_norm_of_half_types_is_torchs_own(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.RMSNorm(8)).to(dtype)
    x = (torch.randn(9, 8) * 0.02).to(dtype)
    expected = model(x)
    plug(model, features="0")
    assert torch.equal(model(x), expected)


def test_labels_of_the_host_go_to_the_features(monkeypatch):
    """Labels of scikit-learn are on the host. The device ``meta`` stands for a GPU."""
    queue, _, _ = plug(make())
    clusters = queue._clusters
    seen = []
    monkeypatch.setattr(Groups, "of", lambda *args: seen.append(args))
    monkeypatch.setattr(clusters.labeller, "_checked", lambda labels: (labels, 5, None))
    clusters.assign(Step(clusters.assign, features=torch.zeros(9, 6, device="meta")))
    assert seen[0][0].device.type == "meta"


def test_a_refused_state_changes_nothing():
    def trained(clusters):
        model = make()
        queue = GradQueue(model, n_clusters=clusters, features="features", queue_length=3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        queue.attach(optimizer)
        for batch in batches(2):
            optimizer.zero_grad()
            square(model, batch).mean().backward()
            optimizer.step()
        return queue

    three, four = trained(3), trained(4)
    before = four.digest()
    with pytest.raises(ValueError, match="cluster_centers must have 4 entries, got 3"):
        four.load_state_dict(three.state_dict())
    assert four.digest() == before


def test_more_errors_say_what_to_do():
    model = make()
    queue, optimizer, handle = plug(model)
    batch = batches(1)[0]
    with pytest.raises(ValueError, match="at least one sample"):
        model(batch[:0])
    queue.set_sample_weights(torch.ones(5))
    with pytest.raises(ValueError, match=r"each of the 9 samples, got \(5,\)"):
        square(model, batch).mean().backward()
    queue.set_sample_weights(None)
    loss = square(model, batch).mean()
    handle.remove()
    with pytest.raises(RuntimeError, match="was removed: run the forward pass anew"):
        loss.backward()
    model.zero_grad()
    wrong = GradQueue(model, n_clusters=2, features="features", clusterer=lambda f: LABELS - 1)
    wrong.attach(optimizer)
    with pytest.raises(ValueError, match="labels >= 0, got -1"):
        square(model, batch).mean().backward()


def test_microbatch_mode_notices_a_plain_backward_pass():
    model = make()
    _, optimizer, _ = plug(model, mode="microbatch")
    square(model, batches(1)[0]).mean().backward()
    with pytest.raises(RuntimeError, match=r"GradQueue\.backward\(losses\)"):
        optimizer.step()


@pytest.mark.parametrize("kind", ["dict", "tuple", "loss first"])
def test_output_gradient_of_structured_outputs(kind):
    class Structured(MLP):
        def forward(self, x):
            out = super().forward(x)
            wrapped = {"dict": {"logits": out}, "tuple": (out, x), "loss first": (out.sum(), out)}
            return wrapped[kind]

    seen = []
    model = make(Structured)
    queue = GradQueue(model, n_clusters=5, features="output_gradient",
                      clusterer=lambda f: (seen.append(f), LABELS)[1])  # fmt: skip
    queue.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    out = model(batches(1)[0])
    out = {"dict": lambda: out["logits"], "tuple": lambda: out[0]}.get(kind, lambda: out[1])()
    (out - 1).square().mean().backward()
    torch.testing.assert_close(seen[0], (2 * (out - 1) / out.numel()).detach())
