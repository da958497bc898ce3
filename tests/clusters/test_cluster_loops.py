# Gradients, layers and labels are there after a backward pass, whatever their types say.
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false
"""Clustered gradients in the loops that people write: nothing else about the loop changes."""

import copy
import io

import pytest
import torch
from cluster_cases import GPT, MLP, Judge
from loop_cases import F64, LABELS, batches, make, square
from torch import nn
from torch.utils.checkpoint import checkpoint

from gq_triton import GradQueue


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    class Checkpointed(MLP):
        def forward(self, x):
            hidden = checkpoint(self.features, x.requires_grad_(), use_reentrant=use_reentrant)
            return self.head(hidden.relu())

    judge = Judge(make(kind=Checkpointed), LABELS, 5)
    judge.twin = make()
    judge.steps(square, batches())


def test_saved_tensors_on_the_cpu():
    class Norms(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.group = nn.Conv1d(1, 4, 3, padding=1), nn.GroupNorm(2, 4)
            self.features, self.rms = nn.LayerNorm(6), nn.RMSNorm(6)
            self.head = nn.Linear(24, 3)

        def forward(self, x):
            with torch.autograd.graph.save_on_cpu():
                x = self.rms(self.features(self.group(self.conv(x[:, None])).tanh()).tanh())
                return self.head(x.flatten(1))

    Judge(make(kind=Norms), LABELS, 5).steps(square, batches())


def test_a_hook_that_is_lost_is_told():
    model = make()
    queue = GradQueue(model, n_clusters=2, features="head", backend="torch")
    queue.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    square(model, batches()[0]).mean().backward()
    model.head.weight._backward_hooks.clear()
    loss = square(model, batches()[1]).mean()
    with pytest.raises(RuntimeError, match=r"head.weight has lost the hook that clusters"):
        loss.backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_the_whole_model_under_a_checkpoint(use_reentrant):
    judge = Judge(make(), LABELS, 5)

    def run(model, batch):
        if model is judge.twin:
            return square(model, batch)
        batch = batch.clone().requires_grad_()
        return (checkpoint(model, batch, use_reentrant=use_reentrant) - 1).square().mean(dim=1)

    judge.steps(run, batches())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_layer_used_twice_in_checkpointed_segments(use_reentrant):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.shared = nn.Linear(6, 6), nn.Linear(6, 6)
            self.head = nn.Linear(6, 3)

        def forward(self, x):
            x = self.features(x).relu()
            for _ in range(2):
                # The oracle calls torch.autograd.grad, which supports only the other kind.
                reentrant = use_reentrant and self is judge.model
                x = checkpoint(self.shared, x, use_reentrant=reentrant).relu()
            return self.head(x)

    judge = Judge(make(kind=Twice), LABELS, 5)
    judge.steps(square, batches())


def test_a_use_that_takes_no_part_in_the_backward_pass():
    class Spare(MLP):
        def forward(self, x):
            self.features[2](self.features[1](self.features[0](x)))
            return super().forward(x)

    Judge(make(kind=Spare), LABELS, 5).steps(square, batches(), after_step=True)


def test_frozen_layers_stay_plain():
    model = make()
    model.features[0].requires_grad_(False)
    model.head.bias.requires_grad_(False)
    judge = Judge(model, LABELS, 5)
    judge.steps(square, batches())
    report = judge.queue.report()
    assert report["features.0.weight"] == report["head.bias"] == "frozen"
    assert report["head.weight"] == "clusters (Linear)"


def test_evaluation_between_steps_changes_nothing():
    model, twin = make(kind=lambda: nn.Sequential(MLP())), make(kind=lambda: nn.Sequential(MLP()))
    digests = []
    for m, evaluates in ((model, True), (twin, False)):
        judge = Judge(m, LABELS, 5, features="0.features")
        for batch in batches():
            judge.optimizer.zero_grad(set_to_none=evaluates)
            loss = square(m, batch).mean()
            if evaluates:
                m.eval()
                with torch.no_grad():
                    m(batch[:2])
                m.train()
            loss.backward()
            if evaluates:
                with torch.no_grad():
                    m(batch[:3])
            judge.optimizer.step()
        digests.append(judge.queue.digest())
    assert digests[0] == digests[1]


def test_two_losses_in_one_step_are_two_weighted_passes():
    judge = Judge(make(), LABELS, 5)
    for number, batch in enumerate(batches()):
        judge.sync()
        first = judge.expected_without_push(square(judge.twin, batch))
        second = judge.expected_without_push(judge.twin(batch).abs().mean(dim=1))
        judge.optimizer.zero_grad()
        out = judge.model(batch)
        (out - 1).square().mean(dim=1).mean().backward(retain_graph=True)
        out.abs().mean(dim=1).mean().backward()
        judge.compare({name: first[name] + second[name] for name in first}, 1e-10, str(number))
        both = square(judge.twin, batch) + judge.twin(batch).abs().mean(dim=1)
        judge.expected(both)
        judge.optimizer.step()


def test_a_skipped_step_leaves_no_trace_in_the_queue():
    model = make()
    judge = Judge(model, LABELS, 5)
    for number, batch in enumerate(batches()):
        for reset in (True, False):
            judge.optimizer.zero_grad(set_to_none=reset)
            (square(model, batch) * 100).mean().backward()
        judge.sync()
        expected = judge.expected(square(judge.twin, batch))
        judge.optimizer.zero_grad(set_to_none=bool(number % 2))
        square(model, batch).mean().backward()
        judge.compare(expected, 1e-10)
        judge.optimizer.step()
    names = {name for name, _ in model.named_parameters()}
    for name in names:
        newest = judge.queue.state_dict()["queue"][name][(5 - 1) % 3]
        torch.testing.assert_close(newest, judge.rings[name].gradients[-1], rtol=1e-9, atol=1e-12)


def test_removing_restores_the_model():
    model = make(kind=GPT)
    keys, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    judge = Judge(model, LABELS, 5)
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == classes
    judge.handle.remove()
    assert not any("forward" in vars(m) for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    tokens = torch.randint(0, 9, (9, 5))
    for m in (model, judge.twin):
        m.zero_grad()
        m(tokens).square().mean().backward()
    for actual, expected in zip(model.parameters(), judge.twin.parameters(), strict=True):
        assert torch.equal(actual.grad, expected.grad)


def test_a_copy_of_the_model_is_plain():
    judge = Judge(make(kind=GPT), LABELS, 5)
    tokens = torch.randint(0, 9, (9, 5))
    square(judge.model, tokens).mean().backward()
    copied = copy.deepcopy(judge.model)
    judge.twin.load_state_dict(copied.state_dict())
    for m in (copied, judge.twin):
        m.zero_grad()
        square(m, tokens).mean().backward()
    for actual, expected in zip(copied.parameters(), judge.twin.parameters(), strict=True):
        assert torch.equal(actual.grad, expected.grad)


def test_match_norm_keeps_every_parameters_norm():
    judge = Judge(make(), LABELS, 5, match_norm=True)
    for batch in batches():
        judge.sync()
        square(judge.twin, batch).mean().backward()
        judge.optimizer.zero_grad()
        square(judge.model, batch).mean().backward()
        for actual, raw in zip(judge.model.parameters(), judge.twin.parameters(), strict=True):
            torch.testing.assert_close(actual.grad.norm(), raw.grad.norm(), rtol=1e-9, atol=0.0)
        judge.twin.zero_grad()
        judge.optimizer.step()
    assert judge.queue.metrics()["mean_weight"] != 1.0


def test_output_gradient_features():
    seen = []

    def clusterer(features):
        seen.append(features.clone())
        return LABELS

    model = make()
    queue = GradQueue(model, n_clusters=5, features="output_gradient", clusterer=clusterer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    queue.attach(optimizer)
    batch = batches(1)[0]
    out = model(batch)
    (out - 1).square().mean().backward()
    torch.testing.assert_close(seen[0], (2 * (out - 1) / out.numel()).detach())
    assert queue.labels_.tolist() == LABELS.tolist()
    assert queue.cluster_sizes_ == [4, 0, 4, 0, 1]


def test_k_means_is_the_default_and_the_generator_is_left_alone():
    model = make()
    queue = GradQueue(model, n_clusters=3, features="features")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    queue.attach(optimizer)
    inputs = batches()
    state = torch.get_rng_state()
    for batch in inputs:
        optimizer.zero_grad()
        square(model, batch).mean().backward()
        optimizer.step()
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(queue.cluster_sizes_) == 9
    assert queue.metrics()["cluster_sizes"] == queue.cluster_sizes_


def test_rows_that_no_sample_looked_up_count_as_weight_one():
    model = nn.Sequential(nn.Embedding(50, 4), nn.Flatten(), nn.Linear(12, 2))
    queue = GradQueue(model, n_clusters=2, features="0")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    queue.attach(optimizer)
    model(torch.randint(0, 9, (8, 3))).square().mean().backward()
    optimizer.step()
    assert queue.metrics()["mean_weight"] == 1.0  # the queue was empty


def test_a_saved_plug_in_goes_on_bit_for_bit():
    """The saved state holds the centres and the generator of k-means too."""
    inputs = [torch.randn(40, 6, dtype=F64) for _ in range(8)]

    def train(model, queue, optimizer, of):
        for batch in of:
            optimizer.zero_grad()
            square(model, batch).mean().backward()
            optimizer.step()
        return queue.digest(), queue.labels_

    def start():
        model = make()
        queue = GradQueue(model, n_clusters=4, features="features", queue_length=3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        queue.attach(optimizer)
        return model, queue, optimizer

    whole, part, again = start(), start(), start()
    expected = train(*whole, inputs)
    train(*part, inputs[:5])
    file = io.BytesIO()
    torch.save((part[1].state_dict(), part[0].state_dict()), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again[1].load_state_dict(saved[0])
    again[0].load_state_dict(saved[1])
    actual = train(*again, inputs[5:])
    assert actual[0] == expected[0]
    assert torch.equal(actual[1], expected[1])
    for p, q in zip(again[0].parameters(), whole[0].parameters(), strict=True):
        assert torch.equal(p, q)


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="needs features"):
        GradQueue(make(), n_clusters=2)
    with pytest.raises(ValueError, match="no submodule"):
        GradQueue(make(), n_clusters=2, features="nothing")
    with pytest.raises(ValueError, match="n_clusters must be an integer >= 1, got 0"):
        GradQueue(make(), n_clusters=0, features="features")
    with pytest.raises(ValueError, match="centroid_scale must be"):
        GradQueue(make(), n_clusters=2, features="features", centroid_scale="wrong")
    with pytest.raises(ValueError, match="loss_reduction must be"):
        GradQueue(make(), n_clusters=2, features="features", loss_reduction="none")
    model = make()
    queue = GradQueue(model, n_clusters=2, features="features", clusterer=lambda f: f[:, 0])
    queue.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="must return"):
        square(model, batches(1)[0]).mean().backward()
    with pytest.raises(ValueError, match="microbatch"):
        queue.backward(torch.zeros(9))
