"""A step does not ask the tensors of states whether they were moved if nobody can have done so."""

from weakref import ref

import pytest
import torch
from optim_cases import set_gradients, small_parameters, train
from torch import nn

from gq_triton import GQSGD, GQAdamW
from gq_triton.optim import base, referrers
from gq_triton.optim.plan import Plan

sees_all = pytest.mark.skipif(
    referrers._counts_of_a_trial() is None, reason="this torch does not count all references"
)


def moved(tensor):
    """Give a tensor other memory of the same layout."""
    tensor.data = tensor.data.clone()


def moved_storage(storage):
    """Move the memory of all tensors of a storage."""
    storage.resize_(storage.nbytes() + 100_000)


# What a program keeps of a parameter's state, and how it later moves a tensor through that.
HOLDERS = {
    "dict": (lambda optimizer, p: optimizer.state[p], lambda held: moved(held["queue"])),
    "tensor": (lambda optimizer, p: optimizer.state[p]["queue"], moved),
    "counter": (lambda optimizer, p: optimizer.state[p]["queued"], moved),
    "weak reference": (
        lambda optimizer, p: ref(optimizer.state[p]["queue"]),
        lambda held: moved(held()),
    ),
    "another tensor in the memory": (
        lambda optimizer, p: optimizer.state[p]["queue"].view(-1)[1:],
        lambda held: moved_storage(held.untyped_storage()),
    ),
    "storage": (lambda optimizer, p: optimizer.state[p]["queue"].untyped_storage(), moved_storage),
    "weak reference to the storage": (
        lambda optimizer, p: ref(optimizer.state[p]["queue"].untyped_storage()),
        lambda held: moved_storage(held()),
    ),
    "mapping": (
        lambda optimizer, p: (optimizer.state, p),
        lambda held: moved(held[0][held[1]]["queue"]),
    ),
    "attributes": (
        lambda optimizer, p: (vars(optimizer), p),
        lambda held: moved(held[0]["state"][held[1]]["queue"]),
    ),
    "nothing": (
        lambda optimizer, p: (optimizer, p),
        lambda held: moved(held[0].state[held[1]]["queue"]),
    ),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_tensor_that_is_moved_through_what_was_kept_is_seen(monkeypatch, holder):
    """A new plan is made, with the addresses that are right now."""
    plans = []

    def counted(*args):
        plans.append(Plan(*args))
        return plans[-1]

    monkeypatch.setattr(base, "Plan", counted)
    hold, move = HOLDERS[holder]
    params = small_parameters()
    optimizer = GQSGD(params, lr=0.1, backend="torch")
    train(optimizer, params, 2, mixed=False)
    held = hold(optimizer, params[0])
    train(optimizer, params, 9, start=2, mixed=False)
    made = len(plans)
    move(held)
    train(optimizer, params, 1, start=11, mixed=False)
    assert len(plans) == made + 1


@pytest.fixture
def comparisons(monkeypatch):
    """Return a list that grows whenever a step looks at all states."""
    made, fits = [], Plan._fits

    def counted(plan, entries):
        made.append(len(entries))
        return fits(plan, entries)

    monkeypatch.setattr(Plan, "_fits", counted)
    return made


@sees_all
@pytest.mark.parametrize("kind", [GQSGD, GQAdamW])
def test_states_are_looked_at_again_after_each_access(kind, comparisons):
    params = [nn.Parameter(torch.randn(3)) for _ in range(2)]
    optimizer = kind([{"params": [params[1]]}, {"params": [params[0]]}], lr=0.1, backend="torch")

    def steps(number):
        comparisons.clear()
        for _ in range(number):
            for param in params:
                param.grad = torch.randn(3)
            optimizer.step()
        return len(comparisons)

    steps(8)
    assert steps(3) == 0
    optimizer.state_dict()
    assert steps(8) == 4  # of each group, before and when they are seen to be unshared
    kept = optimizer.state[params[0]]
    assert steps(8) == 10  # of one group twice
    assert steps(4) == 4
    del kept
    steps(16)
    assert steps(3) == 0


@sees_all
def test_a_program_that_reads_the_states_in_every_step_pays_for_no_count(monkeypatch):
    params = small_parameters()
    optimizer = GQSGD(params, lr=0.1, backend="torch")
    monkeypatch.setattr(referrers, "_counts", lambda *_: pytest.fail("references are counted"))
    for step in range(9):
        set_gradients(params, step, mixed=False)
        optimizer.step()
        assert all(state["queued"] == step + 1 for state in optimizer.state.values())


def test_without_torchs_function_all_states_are_shared(monkeypatch, comparisons):
    monkeypatch.delattr(torch._C, "_storage_Use_Count", raising=False)
    referrers._counts_of_a_trial.cache_clear()
    try:
        params = small_parameters()
        optimizer = GQSGD(params, lr=0.1, backend="torch")
        train(optimizer, params, 9)
        assert len(comparisons) >= 8
    finally:
        referrers._counts_of_a_trial.cache_clear()
