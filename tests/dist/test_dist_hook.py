"""The DDP hook: the law on the averaged gradient, whatever DDP does around it.

A check runs on every rank; all checks of a number of ranks share one spawn.
"""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dist_checks import THREE_RANKS, TWO_RANKS, check_law_off_and_warm_up_are_plain_ddp
from dist_hooked import LENGTH, TINY, hooked, queued, same_parameters, saved, train
from dist_models import TwoHeads, batch, mlp
from one_rank import one_rank
from rank_checks import checks, folder_for
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from gq_triton.dist import GradQueueState, grad_queue_hook, register
from gq_triton.testing import spawn


@pytest.mark.slow
@checks(TWO_RANKS)
def test_two_ranks(ranks, check, tmp_path):
    ranks(2).run(check, *folder_for(check, tmp_path))


@pytest.mark.slow
@checks(THREE_RANKS, rare=[check_law_off_and_warm_up_are_plain_ddp])  # where no order matters
def test_three_ranks(ranks, check):
    ranks(3).run(check)


class Trainer:
    """An object that keeps the wrapped model where Hugging Face and Lightning do."""

    def __init__(self, **handles: nn.Module) -> None:
        vars(self).update(handles)


@pytest.mark.slow
def test_register_finds_the_ddp_module_and_refuses_what_cannot_work():
    with one_rank():
        model = mlp()
        wrappers: list[Callable[[DDP], object]] = [
            lambda ddp: ddp,
            lambda ddp: torch.compile(ddp),
            lambda ddp: nn.ModuleDict({"_forward_module": ddp, "_original": ddp.module}),
            lambda ddp: Trainer(model=ddp.module, model_wrapped=ddp),
            lambda ddp: Trainer(model=ddp),
        ]
        for wrap in wrappers:
            ddp = DDP(model)
            state = register(wrap(ddp), rho=2.0)
            with pytest.raises(ValueError, match="has a communication hook already"):
                register(ddp)
            with pytest.raises(RuntimeError, match="Python reducer"):
                grad_queue_hook(state, (torch.ones(2), torch.ones(2)))
            assert state.ddp is ddp
            assert state.queues.options.rho == 2.0
            assert list(state.queues.params) == [name for name, _ in model.named_parameters()]
        with pytest.raises(ValueError, match="no DistributedDataParallel module in Sequential"):
            register(model)
        with pytest.raises(ValueError, match="no DistributedDataParallel module in Trainer"):
            register(Trainer(model=model))
        with pytest.raises(ValueError, match="2 DistributedDataParallel modules"):
            register(nn.ModuleList([DDP(mlp()), DDP(mlp())]))
        ddp = DDP(mlp())
        ddp._use_python_reducer = True
        with pytest.raises(ValueError, match="Python reducer"):
            register(ddp)
        ddp = DDP(mlp())
        ddp.mixed_precision = torch.distributed.fsdp.MixedPrecision()  # type: ignore[assignment]
        with pytest.raises(ValueError, match="mixed_precision"):
            register(ddp)
        ddp = DDP(mlp())
        with pytest.raises(ValueError, match="rho must be"):
            register(ddp, rho=0.5)
        register(ddp)  # a bad option leaves nothing behind


@pytest.mark.slow
def test_names_are_those_of_the_bare_model():
    bare = list(GradQueueState(mlp()).queues.params)
    assert bare == ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]
    assert list(GradQueueState(torch.compile(mlp())).queues.params) == bare  # type: ignore[arg-type]
    wrapped = nn.ModuleDict({"module": nn.ModuleDict({"module": mlp()})})
    assert list(GradQueueState(wrapped).queues.params) == bare
    part = mlp()
    part[2] = torch.compile(part[2])  # type: ignore[index]
    assert list(GradQueueState(part).queues.params) == bare
    with one_rank():
        assert list(GradQueueState(DDP(mlp())).queues.params) == bare
        assert list(GradQueueState(DDP(torch.compile(mlp()))).queues.params) == bare  # type: ignore[arg-type]


def test_state_is_built_and_loaded_before_the_group_exists():
    with one_rank():
        ddp, state = hooked(mlp())
        train(ddp, state, range(5))
        file = saved(state)
        parameters = copy.deepcopy(ddp.module.state_dict())
        train(ddp, state, range(5, 9))
    model = mlp(seed=7)
    later = GradQueueState(model, queue_length=LENGTH, backend="torch")
    later.load_state_dict(file)
    later.record_loss(1.0)
    assert later.process_group is None
    with one_rank():
        again = DDP(model, bucket_cap_mb=TINY)
        again.module.load_state_dict(parameters)
        again.register_comm_hook(later, grad_queue_hook)
        train(again, later, range(5, 9))
        assert same_parameters(ddp, again)
        assert later.digest() == state.digest()


def test_another_models_state_is_refused_and_changes_nothing():
    with one_rank():
        ddp, state = hooked(mlp())
        train(ddp, state, range(2))
        before = state.digest()
        other, other_state = hooked(TwoHeads())
        train(other, other_state, range(2))
        with pytest.raises(ValueError, match=r"'body\.weight' that this model lacks"):
            state.load_state_dict(saved(other_state))
        with pytest.raises(ValueError, match="queue_length of options must be 5 here, got 3"):
            GradQueueState(mlp()).load_state_dict(saved(state))
        assert state.digest() == before


def test_saving_does_not_change_the_digest():
    state = GradQueueState(mlp(), loss_window=1)
    before = state.digest()
    assert set(queued(state).values()) == {0}
    assert state.digest() == before


def test_options_that_cannot_hold():
    cases: list[tuple[dict[str, Any], str]] = [
        ({"n_clusters": 4}, "n_clusters needs features"),
        ({"features": "0"}, "features needs n_clusters"),
        ({"verify_every": -1}, "verify_every must be an integer >= 0, got -1"),
        ({"rho": 0.5}, "rho must be a finite number >= 1"),
        ({"queue_length": 0}, "queue_length must be an integer >= 1"),
        ({"backend": "cuda"}, "backend must be one of"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            GradQueueState(mlp(), **options)
    with pytest.raises(ValueError, match="weight must have a real floating type"):
        GradQueueState(nn.Linear(2, 2, dtype=torch.complex64))


def test_a_parameter_with_holes_that_the_ring_would_order_otherwise_is_refused():
    with one_rank():
        layer = nn.Linear(4, 3)
        layer.weight = nn.Parameter(torch.ones(8, 3).t()[:, ::2].as_strided((3, 4), (1, 6)))
        ddp, _ = hooked(layer)
        with pytest.raises(ValueError, match=r"weight of strides .* has holes in memory"):
            ddp(torch.ones(2, 4)).sum().backward()


def test_state_is_neither_pickled_nor_copied_and_holds_no_module():
    with one_rank():
        ddp, state = hooked(mlp())
        train(ddp, state, range(2))
        # A copy of the DDP module has no hook: its training leaves the queue alone.
        before = state.digest()
        average = copy.deepcopy(ddp)
        average(batch(2, 0)).square().mean().backward()
        assert state.digest() == before
        assert state.ddp is ddp
        with pytest.raises(TypeError, match=r"save state\.state_dict\(\)"):
            pickle.dumps(state)
        alive = weakref.ref(ddp)
        del ddp, average
        gc.collect()
        assert alive() is None


@pytest.mark.slow
def test_spawn_reports_every_rank():
    with pytest.raises(AssertionError, match=r"rank1:\n(.|\n)*rank 1 says no"):
        spawn(2, refuse)
    with pytest.raises(AssertionError, match=r"Timeout(.|\n)*in linger"):
        spawn(1, linger, timeout=2.0)


def refuse(rank: int) -> None:
    if rank == 1:
        raise ValueError("rank 1 says no")
    dist.barrier()


def linger(rank: int) -> None:
    while True:
        pass
