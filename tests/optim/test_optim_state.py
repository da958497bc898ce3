"""The rules that every optimizer of one table keeps: state and checkpoints."""

import copy
import pickle
from typing import Any

import pytest
import torch
from optim_cases import (
    PAIR,
    all_backends,
    all_variants,
    assert_same,
    both_optimizers,
    copies,
    parameters,
    save,
    small_parameters,
    snapshot,
    train,
    train_on_losses,
    values,
)
from torch.distributed.checkpoint import state_dict as dcp_state
from train_runs import start_and_listen

from gq_triton import GQSGD, GQAdamW


@all_variants
@all_backends
@pytest.mark.parametrize("copied", [True, False], ids=["deepcopy", "shared"])
def test_tgq18_a_state_dict_continues_bit_for_bit(variant, backend, copied):
    """Also without a copy, both optimizers go on without changing each other's state."""
    params = parameters()
    optimizer = variant.build(params, queue_length=3, backend=backend)
    train(optimizer, params, 5)
    state = optimizer.state_dict()
    state = copy.deepcopy(state) if copied else state
    twins = copies(params)
    resumed = variant.build(twins, lr=9.0, rho=2.0, queue_length=7, backend="torch")
    resumed.load_state_dict(state)
    at_save = snapshot(optimizer)
    train(resumed, twins, 4, start=5)
    assert_same(snapshot(optimizer), at_save)
    train(optimizer, params, 4, start=5)
    assert_same(snapshot(resumed), snapshot(optimizer))


RESUME = """
import sys
from optim_cases import resume
resume(sys.argv[1])
"""


@pytest.mark.slow
def test_tgq18_also_in_another_process(tmp_path):
    for name, variant in PAIR.items():
        params = parameters()
        optimizer = variant.build(params, loss_window=2, queue_dtype=torch.bfloat16)
        train_on_losses(optimizer, params, range(6))
        save(params, optimizer, tmp_path / f"{name}.pt")
        train_on_losses(optimizer, params, range(6, 9))
        save(params, optimizer, tmp_path / f"{name}-here.pt")
    (tmp_path / "resume.py").write_text(RESUME)
    ((code, said),) = start_and_listen(1, tmp_path / "resume.py", tmp_path)
    assert code == 0, said
    for name in PAIR:
        here = torch.load(tmp_path / f"{name}-here.pt", weights_only=True)
        there = torch.load(tmp_path / f"{name}-there.pt", weights_only=True)
        assert_same(here["params"], there["params"])
        assert_same(here["optimizer"]["state"], there["optimizer"]["state"])
        groups = (end["optimizer"]["param_groups"][0] for end in (here, there))
        assert_same(*(group.pop("losses") for group in groups))
        assert here["optimizer"]["param_groups"] == there["optimizer"]["param_groups"]


@both_optimizers
@pytest.mark.parametrize("queue_dtype", [torch.float32, None, torch.bfloat16])
def test_loading_keeps_the_types_of_the_state(variant, queue_dtype):
    """torch would cast the whole state to the parameter's type, even the counter."""
    params = small_parameters(torch.bfloat16)
    optimizer = variant.build(params, queue_length=2, queue_dtype=queue_dtype)
    train(optimizer, params, 3)
    twins = copies(params)
    resumed = variant.build(twins)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    state = resumed.state[twins[0]]
    assert state["queue"].dtype == (queue_dtype or torch.bfloat16)
    assert state["queued"].dtype == torch.int64
    train(optimizer, params, 3, start=3)
    train(resumed, twins, 3, start=3)
    assert_same(snapshot(resumed), snapshot(optimizer))


@both_optimizers
def test_the_history_of_losses_is_restored(variant):
    ends = []
    params = small_parameters()
    optimizer = variant.build(params, loss_window=2, min_queue_length=1)
    for step in range(10):
        if step == 6:
            twins = copies(params)
            resumed = variant.build(twins, loss_window=2, min_queue_length=1)
            resumed.load_state_dict(optimizer.state_dict())
            ends.append((resumed, twins))
        for either, leaves in [(optimizer, params), *ends]:
            either.record_loss(20.0 - step)
            train(either, leaves, 1, start=step)
    assert_same(snapshot(ends[0][0]), snapshot(optimizer))
    assert optimizer.param_groups[0]["losses"].tolist() == [11, 12, 13, 14, 15, 16]


@both_optimizers
@all_backends
def test_a_checkpoint_of_torch_goes_on_with_its_moments_and_an_empty_queue(variant, backend):
    theirs = small_parameters()
    plain = variant.plain(theirs, lr=0.03)
    train(plain, theirs, 4)
    ours = copies(theirs)
    optimizer = variant.build(ours, queue_length=3, rho=2.0, backend=backend)
    optimizer.load_state_dict(plain.state_dict())
    group = optimizer.param_groups[0]
    assert (group["lr"], group["queue_length"], group["rho"]) == (0.03, 3, 2.0)
    train(plain, theirs, 3, start=4)
    train(optimizer, ours, 3, start=4)
    assert_same(ours, theirs)
    assert optimizer.state[ours[0]]["queued"] == 3
    train(plain, theirs, 1, start=7)
    train(optimizer, ours, 1, start=7)
    assert not torch.equal(ours[0], theirs[0])


@both_optimizers
def test_a_checkpoint_of_another_model_is_refused_and_changes_nothing(variant):
    params = small_parameters()
    optimizer = variant.build(params)
    train(optimizer, params, 2)
    others = [torch.ones(40, requires_grad=True), torch.ones(5, 3, requires_grad=True)]
    foreign = variant.build(others)
    train(foreign, others, 2)
    before = snapshot(optimizer)
    for expected in (r"parameter 1 of group 0, of shape \(3, 5\),", "belongs to another model"):
        with pytest.raises(ValueError, match=expected):
            optimizer.load_state_dict(foreign.state_dict())
    fewer = variant.build(others[:1])
    with pytest.raises(ValueError, match="doesn't match the size"):
        optimizer.load_state_dict(fewer.state_dict())
    plain = variant.plain(others)
    train(plain, others, 1)
    with pytest.raises(ValueError, match="belongs to another model"):
        optimizer.load_state_dict(plain.state_dict())
    assert_same(snapshot(optimizer), before)
    train(optimizer, params, 1, start=2)


@both_optimizers
@all_backends
def test_the_memory_order_of_a_model_may_change(variant, backend):
    """It may change between save and load, or during a run: numbers stay with their elements."""
    params = [torch.nn.Parameter(p.detach()) for p in parameters() if p.dim() == 4]
    optimizer = variant.build(params, queue_length=2, backend=backend)
    train(optimizer, params, 3)
    other_orders = [torch.channels_last, torch.contiguous_format]
    for order in other_orders:
        moved = [p.detach().clone().contiguous(memory_format=order) for p in params]
        moved = [p.requires_grad_() for p in moved]
        resumed = variant.build(moved, queue_length=2, backend=backend)
        resumed.load_state_dict(optimizer.state_dict())
        train(resumed, moved, 3, start=3)
        twin = copy.deepcopy(optimizer)
        leaves = twin.param_groups[0]["params"]
        for leaf in leaves:
            leaf.data = leaf.data.contiguous(memory_format=order)
        train(twin, leaves, 3, start=3)
        expected = copy.deepcopy(optimizer)
        train(expected, expected.param_groups[0]["params"], 3, start=3)
        for end in (moved, leaves):
            target = expected.param_groups[0]["params"]
            torch.testing.assert_close(end, target, rtol=1e-6, atol=1e-6)


@both_optimizers
def test_load_hooks_may_adapt_a_state(variant):
    """As in torch, the state that a pre-hook returns is the one that is loaded."""
    params = small_parameters()
    optimizer = variant.build(params)
    train(optimizer, params, 2)
    twins = copies(params)
    resumed = variant.build(twins)

    def rename(_, state):
        return {**state, "state": {int(key): value for key, value in state["state"].items()}}

    resumed.register_load_state_dict_pre_hook(rename)
    saved = optimizer.state_dict()
    saved["state"] = {str(key): value for key, value in saved["state"].items()}
    resumed.load_state_dict(saved)
    assert_same(snapshot(resumed), snapshot(optimizer))
    assert len(resumed._optimizer_load_state_dict_pre_hooks) == 1


@both_optimizers
@pytest.mark.parametrize("rate", [0.01, torch.tensor(0.01)], ids=["number", "tensor"])
def test_distributed_checkpoint_finds_the_whole_state_and_leaves_no_trace(variant, rate):
    """The library allocates a new optimizer's state by a step with zero gradients at rate 0."""
    model = torch.nn.Linear(3, 2)
    optimizer = variant.build(model.parameters(), lr=rate)
    weights = values(model.parameters())
    template: dict[str, Any] = dcp_state.get_optimizer_state_dict(model, optimizer)
    assert_same(values(model.parameters()), weights)
    assert all(optimizer.state[param]["queued"] == 0 for param in model.parameters())
    keys = set(optimizer.state[model.weight])
    trained = copy.deepcopy(model)
    other = variant.build(trained.parameters(), lr=rate)
    train(other, list(trained.parameters()), 7)
    saved: dict[str, Any] = dcp_state.get_optimizer_state_dict(trained, other)
    assert template["state"].keys() == saved["state"].keys()
    assert keys == set(other.state[trained.weight])
    model.load_state_dict(trained.state_dict())
    dcp_state.set_optimizer_state_dict(model, optimizer, saved)
    train(optimizer, list(model.parameters()), 2, start=7)
    train(other, list(trained.parameters()), 2, start=7)
    assert_same(snapshot(optimizer), snapshot(other))


@both_optimizers
def test_init_state_allocates_what_the_first_step_would(variant):
    params, twins = parameters(), parameters()
    optimizer, other = variant.build(params), variant.build(twins)
    optimizer.init_state()
    train(other, twins, 1)
    for param, twin in zip(params, twins, strict=True):
        early, late = optimizer.state[param], other.state[twin]
        assert set(early) == set(late)
        assert all(early[key].stride() == late[key].stride() for key in early)
        assert all(not early[key].any() for key in early)


@both_optimizers
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))],
    ids=["deepcopy", "pickle"],
)
def test_a_copied_optimizer_goes_on_alone(variant, duplicate):
    params = small_parameters()
    optimizer = variant.build(params, loss_window=2)
    optimizer.record_loss(3.0)
    train(optimizer, params, 7)
    twin = duplicate(optimizer)
    leaves = twin.param_groups[0]["params"]
    assert leaves[0] is not params[0]
    for step in range(7, 10):
        for either, members in ((optimizer, params), (twin, leaves)):
            either.record_loss(10.0 - step)
            train(either, members, 1, start=step)
    assert_same(snapshot(twin), snapshot(optimizer))
    # A loss scaler still leaves unscaling to the optimizer, so that queues hold no scale.
    assert twin._step_supports_amp_scaling


@both_optimizers
def test_hooks_see_every_step(variant):
    params, seen = small_parameters(), []
    optimizer = variant.build(params)
    before = optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    train(optimizer, params, 2)
    before.remove()
    train(optimizer, params, 1)
    assert seen == ["before", "after"] * 2 + ["after"]


@both_optimizers
def test_named_parameters(variant):
    model = torch.nn.Linear(3, 2)
    optimizer = variant.build(model.named_parameters())
    train(optimizer, list(model.parameters()), 6)
    state = optimizer.state_dict()
    assert state["param_groups"][0]["param_names"] == ["weight", "bias"]
    wider = torch.nn.Linear(4, 2)
    other = variant.build(wider.named_parameters())
    with pytest.raises(ValueError, match=r"of weight must have shape \(5, 2, 4\), got \(5, 2, 3\)"):
        other.load_state_dict(state)


@all_variants
@pytest.mark.parametrize("queue_dtype", [None, torch.bfloat16])
def test_state_is_what_torch_keeps_and_the_queue(variant, queue_dtype):
    ours, theirs = parameters(), parameters()
    optimizer = variant.build(ours, queue_length=4, queue_dtype=queue_dtype)
    plain = variant.plain(theirs)
    train(optimizer, ours, 6)
    train(plain, theirs, 6)
    for param, twin in zip(ours, theirs, strict=True):
        state = dict(optimizer.state[param])
        queue, queued = state.pop("queue"), state.pop("queued")
        assert queue.shape == (4, *param.shape)
        assert queue.dtype == (queue_dtype or torch.float32)
        assert queue.untyped_storage().nbytes() == 4 * param.numel() * queue.element_size()
        assert (queued.dtype, queued.dim()) == (torch.int64, 0)
        kept = {k: v for k, v in plain.state[twin].items() if v is not None}
        assert set(state) == set(kept)
        assert all(state[k].shape == kept[k].shape for k in kept)
        assert all(state[k].dtype == kept[k].dtype for k in kept)


def test_both_are_optimizers_of_torch():
    for kind in (GQSGD, GQAdamW):
        assert issubclass(kind, torch.optim.Optimizer)


def test_repr_names_what_differs_from_the_defaults():
    params = [torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(4))]
    optimizer = GQSGD(params, lr=0.1, momentum=0.9, queue_length=3)
    text = "GQSGD(lr=0.1, momentum=0.9, queue_length=3; 2 parameters of 10 elements, queue of"
    assert repr(optimizer) == f"{text} 0 bytes)"
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert repr(optimizer) == f"{text} 120 bytes)"
    optimizer.add_param_group({"params": torch.nn.Parameter(torch.ones(1)), "rho": 2.0})
    assert "group 1: lr=0.1, momentum=0.9, queue_length=3, rho=2.0; 1 param" in repr(optimizer)


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        (GQAdamW, torch.optim.AdamW, {"weight_decay": 0.1}),
        (GQSGD, torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    ],
)
def test_a_first_step_with_zero_gradients_at_rate_0_is_torchs(ours, theirs, options, backend):
    """A warm-up from rate 0 under a head of zeros starts like this; the state must be torch's."""
    results = []
    for make in (lambda p, o: theirs(p, **o), lambda p, o: ours(p, rho=1.0, backend=backend, **o)):
        param = torch.nn.Parameter(torch.ones(2))
        optimizer = make([param], {"lr": 0.0, **options})
        for lr, grad in ((0.0, [0.0, 0.0]), (0.1, [1.0, 2.0]), (0.1, [0.5, -1.0])):
            optimizer.param_groups[0]["lr"] = lr
            param.grad = torch.tensor(grad)
            optimizer.step()
        results.append(param.detach())
    assert torch.equal(*results)
