"""Gradients are weighted once: two doors over the same parameters are refused, in either order."""

import copy
import gc

import pytest
import torch
from one_rank import one_rank
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from gq_triton import GQSGD, GQAdamW, GradQueue
from gq_triton.claims import HOOK, claim
from gq_triton.dist import GradQueueState, grad_queue_hook, register


def model():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.1)


CLUSTERS = {"n_clusters": 2, "features": "0"}


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, CLUSTERS], ids=["whole", "clusters"])
def test_the_hook_and_attach(options):
    with one_rank():
        ddp = DDP(model())
        optimizer = sgd(ddp)
        state = register(ddp, **options)
        with pytest.raises(ValueError, match=r"gq_triton\.dist weights these parameters already"):
            GradQueue(ddp.module).attach(optimizer)
        net = model()
        handle = GradQueue(net, **options).attach(sgd(net))
        other = DDP(net)
        with pytest.raises(ValueError, match=r"attach weights .* already, and the hook"):
            register(other)
        handle.remove()
        register(other, **options)
        del state


@pytest.mark.slow
@pytest.mark.parametrize("kind", [GQSGD, GQAdamW])
def test_the_hook_and_our_optimizers(kind):
    with one_rank():
        ddp = DDP(model())
        register(ddp)
        with pytest.raises(ValueError, match=r"use torch\.optim\.SGD or torch\.optim\.AdamW"):
            kind(ddp.parameters(), lr=0.1)
        ddp = DDP(model())
        optimizer = kind(ddp.parameters(), lr=0.1)
        with pytest.raises(ValueError, match=r"weights these parameters already, and the hook"):
            register(ddp)
        state = GradQueueState(ddp)
        ddp.register_comm_hook(state, grad_queue_hook)
        with pytest.raises(ValueError, match=r"weights these parameters already, and the hook"):
            ddp(torch.ones(2, 3)).sum().backward()
        del optimizer


def test_attach_and_our_optimizers():
    net = model()
    handle = GradQueue(net).attach(sgd(net))
    with pytest.raises(ValueError, match=r"attach weights these parameters already, and GQSGD"):
        GQSGD(net.parameters(), lr=0.1)
    handle.remove()
    optimizer = GQSGD(net.parameters(), lr=0.1)
    again = GQSGD(net.parameters(), lr=0.2)  # an optimizer that replaces the first one
    with pytest.raises(ValueError, match=r"already, and GradQueue\.attach would"):
        GradQueue(net).attach(sgd(net))
    del optimizer, again
    GradQueue(net).attach(sgd(net))  # optimizers that are gone have no claims


def steps(module, optimizer, count):
    for _ in range(count):
        optimizer.zero_grad()
        module(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()


@pytest.mark.slow
def test_layers_are_torchs_own_again_once_the_optimizer_is_gone():
    """Else a gradient would be weighted by a queue that nobody feeds, and by the next one too."""
    net = model()
    optimizer = sgd(net)
    GradQueue(net, queue_length=2, **CLUSTERS).attach(optimizer)
    steps(net, optimizer, 3)
    del optimizer
    gc.collect()
    twin, batch = copy.deepcopy(net), torch.randn(4, 3)
    keep = GQAdamW(net.parameters())
    for module in (net, twin):
        module.zero_grad()
        module(batch).square().mean().backward()
    for param, other in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(param.grad, other.grad, rtol=0, atol=0)
    del keep


def test_a_part_of_a_model_and_later_all_of_it():
    net = model()
    part = net[:2]
    optimizer = sgd(part)
    GradQueue(part, **CLUSTERS).attach(optimizer)
    steps(part, optimizer, 1)
    optimizer = sgd(net)
    GradQueue(net, **CLUSTERS).attach(optimizer)
    steps(net, optimizer, 1)


def test_an_optimizer_that_ends_between_a_forward_pass_and_its_backward_pass():
    """As where the garbage collector comes: the two passes are still those of the clusters."""
    net = nn.Linear(3, 2)
    optimizer = sgd(net)
    GradQueue(net, n_clusters=2, features="").attach(optimizer)
    steps(net, optimizer, 1)
    loss = net(torch.randn(4, 3)).square().mean()
    del optimizer
    gc.collect()
    loss.backward()
    steps(net, sgd(net), 1)
    assert "forward" not in vars(net)


def test_layers_are_torchs_own_again_once_the_state_is_gone():
    net = model()
    with one_rank():
        ddp = DDP(net)
        register(ddp, **CLUSTERS)
        ddp(torch.ones(2, 3)).sum().backward()
        del ddp
        gc.collect()
    steps(net, GQSGD(net.parameters(), lr=0.1), 1)


def test_an_optimizer_that_could_not_be_built_weights_nothing():
    net = model()
    groups = [{"params": net[0].parameters()}, {"params": net[2].parameters(), "rho": 0.5}]
    with pytest.raises(ValueError, match="rho") as kept:
        GQSGD(groups, lr=0.1)
    GradQueue(net).attach(sgd(net))
    del kept


def test_whether_a_claim_holds_is_asked_once_for_all_its_parameters():
    """It may take long: a state of the hook looks for its DDP module among all objects."""
    net, asked = model(), []

    def active():
        asked.append(1)
        return False

    claim(net.parameters(), net, HOOK, active)
    GQSGD(net.parameters(), lr=0.1)
    assert len(asked) <= 2  # before and after a collection


def test_one_attach_for_each_part_of_a_model():
    net = model()
    queue = GradQueue(net)
    queue.attach(sgd(net[0]))
    handle = queue.attach(sgd(net[2]))
    with pytest.raises(ValueError, match="attached already"):
        queue.attach(sgd(net))
    handle.remove()
    queue.attach(sgd(net[2]))


def test_clusters_attached_before_ddp_wraps():
    """Every rank would queue its own gradients only, so the first forward pass is refused."""
    with one_rank():
        net = model()
        handle = GradQueue(net, **CLUSTERS).attach(sgd(net))
        ddp = DDP(net)
        with pytest.raises(RuntimeError, match=r"wrapped in DistributedDataParallel after"):
            ddp(torch.ones(2, 3))
        net(torch.ones(2, 3)).sum().backward()
        handle.remove()
        ddp(torch.ones(2, 3)).sum().backward()


class Wrapper(torch.optim.Optimizer):
    """A wrapper as Accelerate's: an optimizer by type that never called torch's constructor."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def __repr__(self):
        return "Wrapper"

    @property
    def param_groups(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.optimizer.param_groups

    def step(self, closure=None):
        return self.optimizer.step()


def test_attach_finds_the_optimizer_in_wrappers():
    net = model()
    inner = sgd(net)
    queue = GradQueue(net, queue_length=2)
    handle = queue.attach(Wrapper(Wrapper(inner)))
    for _ in range(3):
        net(torch.ones(2, 3)).sum().backward()
        Wrapper(inner).step()
    assert queue.metrics()["mean_weight"] != 1
    with pytest.raises(ValueError, match="attached already"):
        queue.attach(inner)
    handle.remove()
    with pytest.raises(ValueError, match="GQSGD weights its gradients itself"):
        queue.attach(Wrapper(GQSGD(net.parameters(), lr=0.1)))
