"""A door that is used wrongly says so in one sentence, before anything is queued wrongly."""

import gc
import re

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim.optimizer import _global_optimizer_pre_hooks

from gq_triton import GradQueue
from gq_triton.dist import register
from gq_triton.grouping.feature_layer import check_features
from gq_triton.living import living

CLUSTERS = {"n_clusters": 2, "features": "0"}


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.1)


def backward(module, divisor=1, scaler=None):
    loss = module(torch.randn(6, 3)).square().mean() / divisor
    (loss if scaler is None else scaler.scale(loss)).backward()


def queued(queue):
    return {int(number) for number in queue.state_dict()["queued"].values()}


class Accumulation:
    """Steps of some backward passes each, with a plug-in that was told of another number."""

    def __init__(self, **options):
        self.model = model()
        self.optimizer = sgd(self.model)
        self.queue = GradQueue(self.model, **CLUSTERS, **options)
        self.queue.attach(self.optimizer)
        self.microbatch = options.get("mode") == "microbatch"

    def step(self, passes):
        self.optimizer.zero_grad()
        for _ in range(passes):
            if self.microbatch:
                self.queue.backward(self.model(torch.randn(6, 3)).square().mean(dim=1))
            else:
                backward(self.model, passes)
        self.optimizer.step()


@pytest.mark.parametrize("mode", ["one_backward", "microbatch"])
def test_accumulation_that_was_not_declared_is_said_once(mode):
    loop = Accumulation(mode=mode)
    loop.step(1)
    with pytest.warns(UserWarning, match=r"^3 backward passes .* is 1: .*accumulation_steps=A"):
        loop.step(3)
    loop.step(3)  # a second warning would be an error here


def test_accumulation_that_was_declared_and_does_not_happen_is_said_once():
    loop = Accumulation(accumulation_steps=4)
    with pytest.warns(UserWarning, match=r"^1 backward pass has .* accumulation_steps is 4: "):
        loop.step(1)
    loop.step(1)


def test_accumulation_as_declared_and_an_epoch_that_ends_early():
    loop = Accumulation(accumulation_steps=3)
    for passes in (3, 3, 1, 3, 2):
        loop.step(passes)
    assert queued(loop.queue) == {5}


def test_one_backward_pass_through_two_forward_passes_is_one():
    loop = Accumulation()
    for _ in range(3):
        loop.optimizer.zero_grad()
        views = [loop.model(torch.randn(6, 3)) for _ in range(2)]
        (views[0] - views[1]).square().mean().backward()
        loop.optimizer.step()


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_that_attach_was_not_given(fused):
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), fused=fused)
    queue = GradQueue(net, **CLUSTERS)
    handle = queue.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    backward(net, scaler=scaler)
    before = [param.detach().clone() for param in net.parameters()]
    with pytest.raises(RuntimeError, match=r"attach\(optimizer, grad_scaler=scaler\)"):
        scaler.step(optimizer)
    assert queued(queue) <= {0}
    for param, value in zip(net.parameters(), before, strict=True):
        torch.testing.assert_close(param.detach(), value, rtol=0, atol=0)
    handle.remove()
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    queue.attach(optimizer, grad_scaler=scaler)
    optimizer.zero_grad()
    backward(net, scaler=scaler)
    scaler.step(optimizer)
    assert queued(queue) == {1}


@pytest.mark.parametrize("options", [{}, CLUSTERS], ids=["whole", "clusters"])
def test_parameters_that_came_into_the_model_later_are_named_once(options):
    net = model()
    net[2].requires_grad_(False)
    optimizer = torch.optim.SGD(net[0].parameters(), lr=0.1)
    queue = GradQueue(net, **options)
    queue.attach(optimizer)
    # Parameters that the model had, and one that is none of the model's.
    net[2].requires_grad_(True)
    temperature = nn.Parameter(torch.ones(()))
    optimizer.add_param_group({"params": [*net[2].parameters(), temperature]})
    (net(torch.randn(6, 3)).square().mean() * temperature).backward()
    optimizer.step()
    assert queued(queue) == {1}

    net.append(nn.Linear(2, 2, bias=False))
    optimizer.add_param_group({"params": net[3].parameters()})
    backward(net)
    said = r"built before 3\.weight came into the model, and does not weight"
    with pytest.warns(UserWarning, match=said):
        optimizer.step()
    optimizer.zero_grad()
    backward(net)
    optimizer.step()  # a second warning would be an error here


def test_a_parameter_that_was_replaced_is_named():
    net = model()
    optimizer = sgd(net)
    GradQueue(net).attach(optimizer)
    net[2].bias = optimizer.param_groups[0]["params"][3] = nn.Parameter(torch.zeros(2))
    backward(net)
    with pytest.warns(UserWarning, match=r"built before 2\.bias came into the model"):
        optimizer.step()


def test_strict_refuses_parameters_that_came_later():
    net = model()
    optimizer = sgd(net)
    GradQueue(net, **CLUSTERS, strict=True).attach(optimizer)
    net.scale = nn.Parameter(torch.ones(()))
    optimizer.add_param_group({"params": net.scale})
    for _ in range(2):
        (net(torch.randn(6, 3)) * net.scale).square().mean().backward()
        with pytest.raises(RuntimeError, match="built before scale came into the model"):
            optimizer.step()


def test_a_scaler_is_found_where_the_collector_sees_nothing(monkeypatch):
    """As in a program that has frozen its objects; a class may also refuse to be compared."""

    class Compared(type):
        def __eq__(cls, other):
            raise TypeError("these classes are not compared")

        __hash__ = type.__hash__

    class Scaler(torch.amp.GradScaler, metaclass=Compared):
        __slots__ = ()

    net = model()
    optimizer, scaler = sgd(net), Scaler("cpu", init_scale=16.0)
    assert [one is scaler for one in living(torch.amp.GradScaler)].count(True) == 1
    monkeypatch.setattr("gq_triton.loss_scale.living", lambda kind: [])
    GradQueue(net, **CLUSTERS).attach(optimizer)
    backward(net, scaler=scaler)
    with pytest.raises(RuntimeError, match=r"attach\(optimizer, grad_scaler=scaler\)"):
        scaler.step(optimizer)


def test_a_scaler_that_steps_in_a_way_of_its_own(monkeypatch):
    """Where the collector sees nothing its frame tells, whose code is not that of torch's step."""

    class Patient(torch.amp.GradScaler):
        def step(self, optimizer):
            for param in optimizer.param_groups[0]["params"]:
                param.grad /= self.get_scale()
            optimizer.step()

    net = model()
    optimizer, scaler = sgd(net), Patient("cpu", init_scale=16.0)
    monkeypatch.setattr("gq_triton.loss_scale.living", lambda kind: [])
    GradQueue(net, **CLUSTERS).attach(optimizer)
    backward(net, scaler=scaler)
    with pytest.raises(RuntimeError, match=r"attach\(optimizer, grad_scaler=scaler\)"):
        scaler.step(optimizer)


def test_a_scaler_of_another_optimizer_or_one_that_is_off_is_none_of_ours():
    other, net = model(), model()
    its, ours = sgd(other), sgd(net)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    backward(other, scaler=scaler)
    scaler.step(its)
    GradQueue(net, **CLUSTERS).attach(ours)
    backward(net)
    off = torch.amp.GradScaler("cpu", enabled=False)
    off.step(ours)


def test_without_clusters_a_scaler_needs_no_word():
    net = model()
    optimizer = sgd(net)
    queue = GradQueue(net)
    queue.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    backward(net, scaler=scaler)
    scaler.step(optimizer)
    assert queued(queue) == {1}


@pytest.mark.parametrize("options", [{}, CLUSTERS], ids=["whole", "clusters"])
def test_a_scaler_that_register_was_not_given(options):
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    hooks = len(_global_optimizer_pre_hooks)
    try:
        for told in (False, True):
            net = model()
            ddp, optimizer = DDP(net), sgd(net)
            scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
            state = register(ddp, **options, **({"grad_scaler": scaler} if told else {}))
            for step in range(2):
                backward(ddp, scaler=scaler)
                if told:
                    scaler.step(optimizer)
                    scaler.update()
                elif step == 0:
                    with pytest.raises(RuntimeError, match=r"register\(model, grad_scaler=scaler"):
                        scaler.step(optimizer)
            assert state.queues.params
            # The look was one, and is over.
            assert len(_global_optimizer_pre_hooks) == hooks
            del ddp, state
        ddp = DDP(model())
        optimizer, state = sgd(ddp), register(ddp, **options)
        for _ in range(2):
            backward(ddp)
            optimizer.step()
        assert len(_global_optimizer_pre_hooks) == hooks
        del ddp, state
    finally:
        gc.collect()
        dist.destroy_process_group()


def test_copies_of_data_parallel_are_refused():
    """Else their gradients would be weighted as one batch, without a word."""
    net = model()
    handle = GradQueue(net, **CLUSTERS).attach(sgd(net))
    copy = net._replicate_for_data_parallel()  # what DataParallel does for each GPU
    with pytest.raises(RuntimeError, match="DataParallel runs copies of the model"):
        copy(torch.ones(2, 3))
    handle.remove()
    net._replicate_for_data_parallel()(torch.ones(2, 3))


class Named(nn.Module):
    """A model with layers in containers, and one layer under two names."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
        self.pooler = nn.Tanh()
        self.classifier = nn.Linear(3, 2)
        self.alias = self.classifier


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ("pooller", "features='pooller' is no submodule of the model: did you mean 'pooler'?"),
        ("layers.1", "did you mean 'encoder.layers.1'?"),
        ("module.pooler", "did you mean 'pooler'?"),
        ("_orig_mod.encoder.layers.2", "did you mean 'encoder.layers.2'?"),
        ("xyz", "name one such as 'pooler', 'classifier', 'alias'"),
        (
            "encoder.layers",
            "features='encoder.layers' is a ModuleList, which is never called and so has no "
            "output: name one such as 'encoder.layers.0', 'encoder.layers.1', 'encoder.layers.2'",
        ),
        ("encoder", "is a Module, which is never called and so has no output: name one such as"),
    ],
)
def test_a_wrong_name_of_features_gets_a_better_one(features, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        GradQueue(Named(), n_clusters=2, features=features)


def test_a_layer_in_place_of_its_name():
    net = Named()
    with pytest.raises(ValueError, match=r"the name of a submodule, got .*: give its name, "):
        check_features(net, net.pooler)
    with pytest.raises(ValueError, match=r"must be the name of a submodule, got 3$"):
        check_features(net, 3)


def test_a_second_name_of_a_layer_is_a_name():
    check_features(Named(), "alias")
    check_features(Named(), "")


def test_a_model_without_layers():
    with pytest.raises(ValueError, match='no submodule with an output, so use "" or'):
        check_features(nn.Linear(2, 2), "0")
