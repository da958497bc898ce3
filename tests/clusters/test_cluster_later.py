# Gradients exist after a backward pass, although their types allow None.
# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportCallIssue=false
"""Gradients that wait for one another until the backward pass ends, as on a GPU.

Here the CPU waits as a GPU does, in plain torch. What is compared is the same step with each
parameter weighted at once; `test_cluster_grad.py` compares that one with the oracle.
"""

import copy
from collections import OrderedDict

import pytest
import torch
from cluster_cases import MLP, Judge
from kernel_cases import INTERPRETED, QUIET
from test_cluster_grad import LABELS, images, next_token, square, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

from gq_triton import GradQueue
from gq_triton.cluster_grad import forming, later
from gq_triton.engines import eager

pytestmark = QUIET
OPTIONS = {
    "n_clusters": 5, "features": "features", "clusterer": lambda features: LABELS,
    "queue_length": 2, "backend": "torch",
}  # fmt: skip


@pytest.fixture(autouse=True)
def cpu_waits(monkeypatch):
    monkeypatch.setattr(later.Later, "serves", lambda self, device: True)


@pytest.fixture
def weighed(monkeypatch):
    """Return a list that gets, for each time that waiting parameters are weighted, their names."""
    found, weigh = [], later.Later._weigh_batch

    def noted(self, batch):
        found.append([one.name for one in batch])
        weigh(self, batch)

    monkeypatch.setattr(later.Later, "_weigh_batch", noted)
    return found


class Pair:
    """A model whose gradients may wait, and its twin, each gradient of which is made at once."""

    def __init__(self, model, **options):
        self.models = model.double(), copy.deepcopy(model)
        self.queues = [GradQueue(each, **OPTIONS | options) for each in self.models]
        self.optimizers = [torch.optim.SGD(each.parameters(), lr=0.05) for each in self.models]
        for queue, optimizer in zip(self.queues, self.optimizers, strict=True):
            queue.attach(optimizer)
        accumulator = self.queues[1]._clusters.accumulator
        accumulator._sink.later = None

    def each(self, run):
        """Run a function on both sides: called with the model and its optimizer."""
        for model, optimizer in zip(self.models, self.optimizers, strict=True):
            torch.manual_seed(1)
            run(model, optimizer)

    def assert_same(self):
        (one, other), (mine, theirs) = self.models, self.queues
        for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            assert p.grad is None or torch.equal(p.grad, q.grad), name
            assert torch.equal(p, q), name
        assert mine.digest() == theirs.digest()
        assert mine.metrics() == theirs.metrics()


def untouched(model):
    pass


def train(loss, batch, before=untouched):
    def run(model, optimizer):
        optimizer.zero_grad()
        before(model)
        loss(model, batch).mean().backward()
        optimizer.step()

    return run


def compare(make, batches, loss=square, before=untouched, run=train, **options):
    """Return a pair after three steps, which are the same on both sides."""
    torch.manual_seed(0)
    pair = Pair(make(), **options)
    for batch in batches[:3]:
        pair.each(run(loss, batch, before))
        pair.assert_same()
    return pair


class Tied(nn.Module):
    """A table that is also the head, and one of which each step touches a few rows."""

    def __init__(self):
        super().__init__()
        self.tokens, self.rare = nn.Embedding(11, 4), nn.Embedding(60, 4)
        self.features = nn.LayerNorm(4)
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens):
        return self.head(self.features(self.tokens(tokens) + self.rare(tokens)))


class Image(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.features, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.features(self.norm(self.conv(x)).relu()).flatten(1))


CASES = {
    "mlp": (MLP, [x.flatten(1)[:, :6] for x in images()], square),
    "tables": (Tied, tokens(), next_token),
    "images": (Image, images(), square),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_that_do_not_wait(case, weighed):
    compare(*CASES[case])
    assert len(weighed) == 3  # once in each step
    assert len(weighed[-1]) == {"mlp": 6, "tables": 3, "images": 6}[case]


@pytest.mark.skipif(not INTERPRETED, reason="Kernels are compiled here, for CUDA.")
@pytest.mark.slow
def test_the_kernels_against_the_oracle():
    torch.manual_seed(0)
    judge = Judge(MLP().double(), LABELS, 5, backend="triton")
    judge.steps(square, CASES["mlp"][1][:5])


def waited(weighed, before=untouched, run=train, **options):
    """Return how many gradients waited in the last of three steps of an MLP."""
    counts = [0]

    def counted(loss, batch, before):
        counts.append(sum(map(len, weighed)))
        return run(loss, batch, before)

    compare(*CASES["mlp"], before, counted, **options)
    return sum(map(len, weighed)) - counts[-1]


def test_autograd_takes_the_memory_without_a_copy(monkeypatch):
    """A copy would be of memory without values, and a launch."""
    places, arrived = {}, later.Later.arrived

    def seen(self, name, grad):
        places[name] = self._places[name].address == grad.data_ptr()
        arrived(self, name, grad)

    monkeypatch.setattr(later.Later, "arrived", seen)
    for model, (_, batches, loss) in (
        (MLP(), CASES["mlp"]),
        (Image(), CASES["images"]),
    ):
        places.clear()
        model = model.double().to(memory_format=torch.channels_last)
        queue = GradQueue(model, **OPTIONS)
        queue.attach(torch.optim.SGD(model.parameters(), lr=0.05))
        loss(model, batches[0]).mean().backward()
        assert places == dict.fromkeys(dict(model.named_parameters()), True)
        assert not any(param.grad._is_view() for param in model.parameters())


def test_a_full_room_is_weighted_at_once(monkeypatch, weighed):
    monkeypatch.setattr(later, "ROOM", 500)
    compare(*CASES["mlp"])
    assert len(weighed) > 2 * 3


@pytest.fixture
def formed(monkeypatch):
    """Return a list that gets, for each call of ``sums_all``, the number of its layers."""
    found, sums_all = [], eager.sums_all

    def noted(layers, order, offsets):
        found.append(len(layers))
        sums_all(layers, order, offsets)

    monkeypatch.setattr(eager, "sums_all", noted)
    return found


class Norms(nn.Module):
    """Norms of both layouts, with and without a bias before them, one of them used twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.group, self.again = nn.GroupNorm(2, 4), nn.LayerNorm(4)
        self.features, self.rms = nn.AdaptiveAvgPool2d(1), nn.RMSNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.group(self.norm(self.conv(x)).relu())
        x = self.again(self.features(x).flatten(1))
        return self.head(self.rms(self.again(x)))


def test_sums_of_all_layers_are_formed_together(formed):
    """The sums of a layer that is used twice are needed at its second use."""
    compare(Norms, images())
    assert formed == [5] * 3


def test_the_bias_of_a_conv1d_is_summed_without_a_copy(monkeypatch):
    """Its gradient has positions before channels where a LayerNorm of channels follows."""
    seen, begin = [], forming.Sums.__init__

    def noted(self, backend, dy, *rest, images=False, **more):
        seen.append((images, dy.is_contiguous()))
        begin(self, backend, dy, *rest, images=images, **more)

    monkeypatch.setattr(forming.Sums, "__init__", noted)
    model = nn.Sequential(OrderedDict(features=nn.Conv1d(2, 4, 3))).double()
    GradQueue(model, **OPTIONS).attach(torch.optim.SGD(model.parameters(), lr=0.05))
    batch = images()[0].flatten(2)
    rows = nn.functional.layer_norm(model(batch).mT, (4,))
    rows.square().flatten(1).mean(dim=1).mean().backward()
    assert seen == [(False, True)]


def test_a_full_room_of_what_sums_are_formed_from(monkeypatch, formed):
    monkeypatch.setattr(later, "ROOM", 9000)
    compare(Norms, images())
    assert len(formed) > 3
    assert sum(formed) == 15


def test_a_scale_whose_shift_does_not_wait(formed):
    """Both come of one operation: the hook of the shift has the scale formed, too."""

    def before(model):
        if not model.group.bias._backward_hooks or len(model.group.bias._backward_hooks) < 2:
            model.group.bias.register_hook(lambda grad: None)
            model.norm.weight.requires_grad_(False)

    compare(Norms, images(), before=before)
    assert formed == [1, 4] * 3


def test_a_gradient_that_is_changed_in_place_is_refused():
    """The sums of a layer before would be those of the changed gradient."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.other = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x):
            first, second = self.features(x), self.other(x.clone().requires_grad_())
            first.register_hook(lambda grad: grad.mul_(2))
            return first + second

    model = Shared().double()
    queue = GradQueue(model, **OPTIONS)
    queue.attach(torch.optim.SGD(model.parameters(), lr=0.05))
    with pytest.raises(RuntimeError, match="was changed in place during the backward pass"):
        square(model, CASES["mlp"][1][0]).mean().backward()


def test_a_gradient_that_is_added_to_does_not_wait(weighed):
    def twice(loss, batch, before):
        def run(model, optimizer):
            optimizer.zero_grad()
            (loss(model, batch).mean() / 2).backward()
            (loss(model, batch.flip(0)).mean() / 2).backward()
            optimizer.step()

        return run

    assert waited(weighed, run=twice, accumulation_steps=2) == 6  # in the first of both passes


def test_values_that_come_after_the_hooks_are_no_change_of_a_gradient():
    """A second pass would have the host read whether ``p.grad`` was zeroed."""
    model = MLP().double()
    queue = GradQueue(model, **OPTIONS, accumulation_steps=2)
    queue.attach(torch.optim.SGD(model.parameters(), lr=0.05))
    (square(model, CASES["mlp"][1][0]).mean() / 2).backward()
    raw = queue._clusters.accumulator.raw
    assert all(raw._goes_on(name) is True for name, _ in model.named_parameters())


def test_two_forward_passes_of_one_backward_pass():
    def both(loss, batch, before):
        def run(model, optimizer):
            optimizer.zero_grad()
            (loss(model, batch).mean() + loss(model, batch.flip(0)).mean()).backward()
            optimizer.step()

        return run

    compare(*CASES["mlp"], run=both)


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_hook_of_the_user_sees_values(weighed, kind):
    seen = [[], []]

    def before(model):
        if not getattr(model, "hooked", False):
            model.hooked, places = True, seen[len(seen[0]) > 0 and not seen[1]]
            weight = model.head.weight
            see = (
                (lambda grad: places.append(grad.clone()))
                if kind == "register_hook"
                else (lambda param: places.append(param.grad.clone()))
            )
            getattr(weight, kind)(see)

    assert waited(weighed, before) == 5
    assert len(seen[0]) == 3
    assert all(map(torch.equal, *seen))


def test_a_penalty_makes_the_gradient_that_of_one_cluster():
    def penalised(loss, batch, before):
        def run(model, optimizer):
            optimizer.zero_grad()
            (loss(model, batch).mean() + model.head.weight.square().sum()).backward()
            optimizer.step()

        return run

    with pytest.warns(UserWarning, match="weighted without clusters"):
        compare(*CASES["mlp"], run=penalised)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_segments(weighed, reentrant):
    class Checkpointed(MLP):
        def forward(self, x):
            x = x.detach().requires_grad_()
            h = checkpoint(self.features, x, use_reentrant=reentrant)
            return self.head(h.relu())

    compare(Checkpointed, CASES["mlp"][1])
    assert weighed


def test_anomaly_mode_looks_at_values(weighed):
    with torch.autograd.set_detect_anomaly(True):
        assert waited(weighed) == 0


def test_options_that_need_each_gradient_do_not_wait(weighed):
    compare(*CASES["mlp"], match_norm=True)

    def summed(model, batch):
        return square(model, batch) * len(batch)

    compare(MLP, CASES["mlp"][1], summed, loss_reduction="sum")
    assert not weighed


def test_gradients_of_autograd_grad_have_values(weighed):
    torch.manual_seed(0)
    pair, found = Pair(MLP()), []
    for model in pair.models:
        losses = square(model, CASES["mlp"][1][0])
        found.append(torch.autograd.grad(losses.mean(), list(model.parameters())))
    assert weighed
    assert all(map(torch.equal, *found))


def test_a_retained_graph(weighed):
    def again(loss, batch, before):
        def run(model, optimizer):
            optimizer.zero_grad()
            losses = loss(model, batch).mean()
            losses.backward(retain_graph=True)
            optimizer.zero_grad()
            losses.backward()
            optimizer.step()

        return run

    assert waited(weighed, run=again) == 12


def test_an_error_in_the_backward_pass_leaves_values(weighed):
    """What reached ``p.grad`` before the error has its values when the next pass begins."""
    torch.manual_seed(0)
    pair, batch = Pair(MLP()), CASES["mlp"][1][0]

    def fail(grad):
        raise RuntimeError("meant")

    def failing(module, args, output):
        output.register_hook(fail)

    def broken(model, optimizer):
        hook = model.features[0].register_forward_hook(failing)
        with pytest.raises(RuntimeError, match="meant"):
            square(model, batch).mean().backward()
        hook.remove()
        model(batch)

    pair.each(broken)
    assert pair.models[0].head.weight.grad is not None
    pair.assert_same()


def test_a_copy_that_autograd_made_gets_values(monkeypatch):
    """Autograd copies a gradient that somebody else holds, or whose layout it cannot keep."""
    held, take = [], later.Later.take

    def holding(self, name, groups, *sums):
        held.append(take(self, name, groups, *sums))
        return held[-1]

    monkeypatch.setattr(later.Later, "take", holding)
    compare(*CASES["mlp"])
    assert held


def test_raw_gradients_are_read_once(monkeypatch):
    """What weights them knows whether they are finite; those that are not are not queued."""
    looked, find = [], eager.all_finite
    monkeypatch.setattr(eager, "all_finite", lambda grads: looked.append(len(grads)) or find(grads))
    torch.manual_seed(0)
    pair = Pair(MLP())
    for optimizer in pair.optimizers:
        optimizer.param_groups[0]["lr"] = 0.0  # the parameters stay finite
    digests = []
    for number, batch in enumerate(CASES["mlp"][1][:4]):
        spoilt = batch * (torch.nan if number == 2 else 1.0)
        pair.each(train(square, spoilt, lambda model: model.zero_grad()))
        assert pair.queues[0].digest() == pair.queues[1].digest()
        digests.append(pair.queues[0].digest())
        for model in pair.models:
            model.load_state_dict({name: p.nan_to_num() for name, p in model.state_dict().items()})
    assert digests[1] == digests[2] != digests[3]
    assert looked == [6] * 4  # those of the twin
