"""A plan that steps reuse must not outlive the tensors that it was made from.

Every change is made to two optimizers: one keeps its plans, the other forgets them at each step.
"""

import copy
import gc
import pickle
from weakref import ref

import pytest
import torch
from kernel_cases import QUIET
from optim_cases import (
    PAIR,
    assert_same,
    both_optimizers,
    gradients_of,
    parameters,
    set_gradients,
    small_parameters,
    snapshot,
    train,
    values,
)
from torch import nn

from gq_triton import GQSGD
from gq_triton.optim import base
from gq_triton.optim.plan import Plan

pytestmark = QUIET
interpreted = pytest.param("triton", marks=pytest.mark.slow)
planned = pytest.mark.parametrize("backend", ["torch", "numba", interpreted])
# The interpreter is slow, and optimizers share the plan: in the gate it runs one of them.
both_planned = pytest.mark.parametrize(
    ("variant", "backend"),
    [
        pytest.param(
            variant, backend, id=f"{backend}-{name}",
            marks=[pytest.mark.slow] * (backend == "triton")
            + [pytest.mark.rare] * (backend == "triton" and name == "adamw"),
        )
        for backend in ("torch", "numba", "triton")
        for name, variant in PAIR.items()
    ],
)  # fmt: skip


@pytest.fixture
def plans(monkeypatch):
    """Return a list that grows with every plan."""
    made = []

    def counted(*args):
        made.append(Plan(*args))
        return made[-1]

    monkeypatch.setattr(base, "Plan", counted)
    return made


def leaves(seed=0):
    """Return dense parameters: a vector, a transposed matrix, images."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator) for shape in ((20,), (7, 5), (2, 3, 4, 4))]
    tensors[1] = tensors[1].T
    return [torch.nn.Parameter(tensor) for tensor in tensors]


def members(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


def forget(optimizer, forgets):
    if forgets:
        optimizer._plans.clear()


def new_data(optimizer):
    for param in members(optimizer):
        param.data = param.data.clone()


def other_memory_order(optimizer):
    image = members(optimizer)[2]
    image.data = image.data.contiguous(memory_format=torch.channels_last)


def same_memory_other_order(optimizer):
    """Change the strides of a matrix, but not its address."""
    matrix = members(optimizer)[1]
    matrix.data = matrix.data.as_strided((5, 7), (7, 1))


def new_state(optimizer):
    for state in optimizer.state.values():
        for name, value in state.items():
            state[name] = value.clone()


def new_storage_of_state(optimizer):
    """Give the tensors of all states new memory and keep the objects, as offloading does."""
    for state in optimizer.state.values():
        for value in state.values():
            value.data = value.data.clone()


def one_counter(optimizer):
    optimizer.state[members(optimizer)[0]]["queued"] = torch.tensor(0)


def no_state(optimizer):
    optimizer.state.clear()


def half_of_the_state(optimizer):
    del optimizer.state[members(optimizer)[1]]


def loaded(optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def wider_queue(optimizer):
    for state in optimizer.state.values():
        state["queue"].data = state["queue"].data.double()


def shorter_queue_in_place(optimizer):
    for state in optimizer.state.values():
        state["queue"].data = state["queue"].data[:2]
    optimizer.param_groups[0]["queue_length"] = 2


def another_group(optimizer):
    optimizer.add_param_group({"params": small_parameters(seed=3), "lr": 0.5})


def groups_in_another_order(optimizer):
    another_group(optimizer)
    train(optimizer, members(optimizer), 3, start=50)
    optimizer.param_groups.reverse()


def parameters_in_another_order(optimizer):
    optimizer.param_groups[0]["params"].reverse()


def other_numbers(optimizer):
    optimizer.param_groups[0].update(lr=0.3, rho=1.5, weight_decay=0.2, maximize=True)


def rate_as_a_tensor(optimizer):
    optimizer.param_groups[0]["lr"] = torch.tensor(0.3)


def momentum_off(optimizer):
    if "momentum" in optimizer.param_groups[0]:
        optimizer.param_groups[0]["momentum"] = 0.0


CHANGES = [
    new_data, other_memory_order, same_memory_other_order, new_state, new_storage_of_state,
    one_counter, no_state, half_of_the_state, loaded, wider_queue, shorter_queue_in_place,
    another_group, groups_in_another_order, parameters_in_another_order, other_numbers,
    rate_as_a_tensor, momentum_off,
]  # fmt: skip


# In the gate the interpreter meets the changes that move memory.
MOVES = new_data, new_storage_of_state, half_of_the_state, loaded
CASES = [
    pytest.param(
        change, variant, backend, id=f"{change.__name__}-{backend}-{name}",
        marks=[pytest.mark.rare] if backend == "triton" and (
            change not in MOVES or name == "adamw"
        ) else [],
    )
    for change in CHANGES
    for backend in ("torch", "numba", "triton")
    for name, variant in PAIR.items()
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("change", "variant", "backend"), CASES)
def test_a_change_between_two_steps_is_seen(change, variant, backend):
    ends = []
    for forgets in (False, True):
        params = leaves()
        optimizer = variant.build(params, queue_length=3, backend=backend)
        for step in range(4):
            forget(optimizer, forgets)
            train(optimizer, params, 1, start=step)
        before = values(params)
        held = [(param.data, param.data.clone()) for param in params]
        change(optimizer)
        moved = [p.data_ptr() != old.data_ptr() for p, (old, _) in zip(params, held, strict=True)]
        for step in range(4, 6):
            forget(optimizer, forgets)
            train(optimizer, members(optimizer), 1, start=step)
        # Memory that a parameter has left must not be written.
        left = zip(held, moved, strict=True)
        assert all(torch.equal(now, then) for (now, then), away in left if away)
        assert not torch.equal(params[0], before[0])
        ends.append(snapshot(optimizer))
    assert_same(*ends)


@both_planned
def test_gradients_come_and_go(variant, backend):
    """In every step some are missing, some in another memory order, some at new addresses."""
    ends = []
    for forgets in (False, True):
        params = leaves()
        optimizer = variant.build(params, queue_length=2, backend=backend)
        for step in range(9):
            forget(optimizer, forgets)
            set_gradients(params, step, mixed=step % 3 == 1)
            if step in (4, 5, 7):
                params[step % 3].grad = None
            optimizer.step()
        ends.append(snapshot(optimizer))
    assert_same(*ends)


@both_planned
def test_a_gradient_is_read_where_it_is_now(variant, backend):
    """It is at an earlier address with other numbers, at a new one, or comes through ``.data``."""
    ends = []
    for forgets in (False, True):
        params = leaves()
        optimizer = variant.build(params, queue_length=2, backend=backend)
        train(optimizer, params, 4, mixed=False)
        kept = gradients_of(params)
        for step in range(4, 10):
            new = set_gradients(copy_of(params), step, mixed=False)
            for param, grad, old in zip(params, new, kept, strict=True):
                param.grad = old.copy_(grad) if step % 2 else grad
                if step == 8:
                    param.grad = old
                    old.data = grad.clone()
            forget(optimizer, forgets)
            optimizer.step()
        ends.append(snapshot(optimizer))
    assert_same(*ends)


def copy_of(params):
    return [torch.nn.Parameter(param.detach().clone()) for param in params]


@both_planned
def test_steps_share_a_plan_whatever_the_gradients_addresses(variant, backend, plans):
    params = leaves()
    optimizer = variant.build(params, backend=backend, queue_length=2)
    train(optimizer, params, 3, mixed=False)
    made = len(plans)
    assert made <= 2  # momentum comes with the first step
    train(optimizer, params, 4, start=3, mixed=False)
    optimizer.param_groups[0]["lr"] = 0.3
    train(optimizer, params, 1, start=7, mixed=False)
    assert len(plans) == made
    new_data(optimizer)
    train(optimizer, params, 2, start=8, mixed=False)
    assert len(plans) == made + 1


@pytest.mark.slow
@both_optimizers
def test_parameters_of_every_memory_order_share_plans(variant, plans):
    """Strided slices are written back after every step, also with a plan."""
    ends = []
    for forgets in (False, True):
        params = parameters()
        optimizer = variant.build(params, queue_length=2, backend="triton")
        for step in range(6):
            forget(optimizer, forgets)
            train(optimizer, params, 1, start=step)
        ends.append(snapshot(optimizer))
        assert forgets or len(plans) <= 2
    assert_same(*ends)


@both_optimizers
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_steps_with_its_own_tensors(variant, copied):
    params = leaves()
    optimizer = variant.build(params, queue_length=2, backend="torch")
    train(optimizer, params, 4)
    twin, before = copied(optimizer), snapshot(optimizer)
    train(twin, members(twin), 2, start=4)
    assert_same(snapshot(optimizer), before)
    train(optimizer, params, 2, start=4)
    assert_same(snapshot(twin), snapshot(optimizer))


@both_planned
def test_a_plan_holds_no_memory(variant, backend):
    params = leaves()
    optimizer = variant.build(params, backend=backend)
    train(optimizer, params, 4)
    state = optimizer.state[params[1]]
    watched = [ref(value.untyped_storage()) for value in state.values()]
    watched += [ref(value) for value in state.values()]
    watched += [ref(params[1].grad), ref(params[1].data.untyped_storage())]
    params[1].data = params[1].data.clone()
    del state
    optimizer.state.clear()
    for param in params:
        param.grad = None
    gc.collect()
    assert [reference() for reference in watched] == [None] * len(watched)


@planned
def test_a_parameter_that_became_shorter_is_refused(backend):
    """Its address and strides are still the same, but memory after its end is not its own."""
    for variant in PAIR.values():
        params = leaves()
        optimizer = variant.build(params, backend=backend)
        train(optimizer, params, 4)
        whole = params[1].data
        rest = whole[3:].clone()
        params[1].grad = None
        params[1].data = whole[:3]
        with pytest.raises((ValueError, RuntimeError)):
            train(optimizer, params, 1, start=4)
        assert torch.equal(whole[3:], rest)


@planned
def test_a_parameter_may_be_swapped(backend):
    """torch refuses to swap a tensor that anything refers to weakly; FSDP2 swaps in ``.cpu()``."""
    ends = []
    for forgets in (False, True):
        torch.manual_seed(0)
        param = nn.Parameter(torch.randn(6))
        optimizer = GQSGD([param], lr=0.1, momentum=0.9, queue_length=2, backend=backend)
        for step in range(6):
            param.grad = torch.randn(6)
            forget(optimizer, forgets)
            optimizer.step()
            param.grad = None
            if step == 3:
                torch.utils.swap_tensors(param, nn.Parameter(torch.randn(6)))
        ends.append(param.detach().clone())
    assert torch.equal(*ends)


@planned
def test_another_shape_at_the_same_address_is_seen(backend):
    """Two slices of one tensor have equally many elements and equal strides, but other memory."""
    ends = []
    for forgets in (False, True):
        torch.manual_seed(0)
        whole, gradient = torch.randn(8, 6), torch.empty(8, 6)
        param = nn.Parameter(torch.empty(0))
        param.data = whole[:2]
        optimizer = GQSGD([param], lr=0.1, momentum=0.9, queue_length=2, backend=backend)
        for step in range(6):
            if step == 4:
                param.grad = None
                param.data = whole[:3, :4]
            gradient.normal_()
            param.grad = gradient[:2] if step < 4 else gradient[:3, :4]
            forget(optimizer, forgets)
            optimizer.step()
        ends.append(whole)
    assert torch.equal(*ends)


@planned
def test_a_momentum_that_became_shorter_is_refused(backend):
    param = nn.Parameter(torch.randn(6))
    optimizer = GQSGD([param], lr=0.1, momentum=0.9, queue_length=2, backend=backend)
    for _ in range(4):
        param.grad = torch.randn(6)
        optimizer.step()
    momentum = optimizer.state[param]["momentum_buffer"]
    momentum.data = momentum.data[:3]
    with pytest.raises((ValueError, RuntimeError)):
        optimizer.step()


@both_optimizers
def test_a_backend_that_cannot_run_is_refused_before_any_group_moves(variant, monkeypatch):
    first, second = leaves(), leaves(1)
    groups = [{"params": first}, {"params": second, "backend": "triton"}]
    optimizer = variant.build(groups)
    train(optimizer, [*first, *second], 4)
    before = snapshot(optimizer)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match='backend="triton" needs a GPU'):
        train(optimizer, [*first, *second], 1, start=4)
    assert_same(snapshot(optimizer), before)


@both_optimizers
def test_a_sparse_gradient_after_dense_ones_is_refused(variant):
    params = leaves()
    optimizer = variant.build(params)
    train(optimizer, params, 4)
    before = snapshot(optimizer)
    params[1].grad = set_gradients(params, 4)[1].to_sparse()
    with pytest.raises(ValueError, match=r"a gradient of layout torch\.sparse_coo"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)
