"""The checks of the DDP hook that every rank runs; see test_dist_hook.py."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dist_hooked import LENGTH, TINY, agree, descend, hooked, queued, same_parameters, saved, train
from dist_models import MixedTypes, TwoHeads, batch, convolutions, images, mlp, wide_batch, wide_mlp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.nn.parallel import DistributedDataParallel as DDP

from gq_triton import reference
from gq_triton.dist import GradQueueState, grad_queue_hook


def check_law_off_and_warm_up_are_plain_ddp(rank: int) -> None:
    for bucket_view in (False, True):
        options: dict[str, Any] = dict(bucket_cap_mb=TINY, gradient_as_bucket_view=bucket_view)
        plain = DDP(mlp(), **options)
        off, off_state = hooked(mlp(), {"rho": 1.0}, **options)
        on, on_state = hooked(mlp(), {"rho": 3.0}, **options)
        for step in range(LENGTH + 3):
            one = range(step, step + 1)
            train(plain, None, one)
            train(off, off_state, one)
            train(on, on_state, one)
            assert same_parameters(plain, off), f"rho=1 differs in step {step}"
            warm = same_parameters(plain, on)
            assert warm == (step < LENGTH), f"the warm-up is wrong in step {step}"
        assert len(off_state.state_dict()["buckets"]) > 2, "DDP did not cut several buckets"


def check_reference(rank: int) -> None:
    """Every rank recomputes the gradients of all ranks and applies the oracle to their mean."""
    for build, data in ((wide_mlp, wide_batch), (convolutions, images)):
        for match_norm in (False, True):
            ddp, state = hooked(build(), {"match_norm": match_norm})
            alone = build()
            rings = {name: reference.Ring(LENGTH) for name, _ in alone.named_parameters()}
            changed = 0.0
            for step in range(8):
                ddp.zero_grad()
                ddp(data(step, rank)).square().mean().backward()
                means = mean_gradients(alone, step, data)
                for name, param in ddp.module.named_parameters():
                    newest = rings[name].newest()
                    expected = reference.weighted_gradient(
                        means[name], newest, match_norm=match_norm
                    )
                    assert param.grad is not None
                    torch.testing.assert_close(param.grad, expected, rtol=1e-12, atol=1e-15)
                    changed = max(changed, float((expected - means[name]).abs().max()))
                    rings[name].push(means[name])
                    ring = state.state_dict()["queue"][name][step % LENGTH]
                    torch.testing.assert_close(ring, means[name], rtol=1e-12, atol=1e-15)
                descend(ddp)
                alone.load_state_dict(ddp.module.state_dict())
                agree(state)
            assert changed > 1e-3, "the law changed nothing"


def mean_gradients(
    model: nn.Module, step: int, data: Callable[[int, int], Tensor]
) -> dict[str, Tensor]:
    world = dist.get_world_size()
    model.zero_grad()
    for rank in range(world):
        (model(data(step, rank)).square().mean() / world).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_buckets_change_nothing(rank: int) -> None:
    runs = []
    variants: list[dict[str, Any]] = [
        dict(bucket_cap_mb=TINY),
        dict(bucket_cap_mb=25),
        dict(bucket_cap_mb=TINY, static_graph=True),
        dict(bucket_cap_mb=TINY, find_unused_parameters=True),
        dict(bucket_cap_mb=25, gradient_as_bucket_view=True),
    ]
    for variant in variants:
        ddp, state = hooked(mlp(), **variant)
        train(ddp, state, range(7))
        runs.append((variant, ddp, state.digest(), state.metrics(), state.state_dict()["buckets"]))
    _, first, digest, metrics, buckets = runs[0]
    for variant, ddp, other_digest, other_metrics, other_buckets in runs[1:]:
        assert same_parameters(first, ddp), variant
        assert digest == other_digest, variant
        assert metrics == pytest.approx(other_metrics, rel=1e-12), variant
        assert other_buckets != buckets or variant["bucket_cap_mb"] == TINY
    assert 1 / 3 < metrics["mean_weight"] < 3
    assert metrics["mean_weight"] != 1


def check_two_types(rank: int) -> None:
    for static_graph in (False, True):
        ddp, state = hooked(MixedTypes(), {"verify_every": 2}, static_graph=static_graph)
        train(ddp, state, range(6))
        rings = state.state_dict()["queue"]
        assert rings["narrow.weight"].dtype == torch.float32
        assert rings["wide.weight"].dtype == torch.float64
        assert set(queued(state).values()) == {6}
        # In the first step of a static graph both buckets are number 0 and none is the last.
        assert state._steps == 6


def check_unused_parameters(rank: int) -> None:
    ddp, state = hooked(TwoHeads(), find_unused_parameters=True)
    train(ddp, state, range(5))
    before = state.state_dict()["queue"]["right.weight"].clone()
    train(ddp, state, range(5, 7), right=False)
    assert torch.equal(state.state_dict()["queue"]["right.weight"], before)
    # Used by one rank: a gradient.
    train(ddp, state, range(7, 8), right=rank == 0)
    counts = queued(state)
    assert counts["left.weight"] == 8
    assert counts["right.weight"] == counts["right.bias"] == 6
    # A static graph that leaves a head out of every step.
    ddp, state = hooked(TwoHeads(), static_graph=True)
    train(ddp, state, range(5), right=False)
    counts = queued(state)
    assert counts["left.weight"] == 5
    assert counts["right.weight"] == 0


def check_zero_gradient_is_queued(rank: int) -> None:
    ddp, state = hooked(TwoHeads())
    for step in range(4):
        ddp.zero_grad()
        left = ddp.module.left
        (ddp(batch(step, rank)).square().mean() + 0 * left.weight.sum()).backward()
    for step in range(4):
        ddp.zero_grad()
        (0 * ddp(batch(step, rank))).sum().backward()
    assert set(queued(state).values()) == {8}


def check_no_sync(rank: int) -> None:
    plain = DDP(mlp(), bucket_cap_mb=TINY)
    off, off_state = hooked(mlp(), {"rho": 1.0})
    on, on_state = hooked(mlp())
    for step in range(6):
        for ddp in (plain, off, on):
            ddp.zero_grad()
            with ddp.no_sync():
                ddp(batch(2 * step, rank)).square().mean().backward()
            ddp(batch(2 * step + 1, rank)).square().mean().backward()
        assert all(
            torch.equal(a.grad, b.grad)
            for a, b in zip(plain.parameters(), off.parameters(), strict=True)
            if a.grad is not None and b.grad is not None
        )
        ring = on_state.state_dict()["queue"]["0.weight"][step % LENGTH]
        assert torch.equal(ring, plain.module[0].weight.grad)  # type: ignore[index, union-attr]
        agree(on_state)
    assert set(queued(on_state).values()) == set(queued(off_state).values()) == {6}


def check_join(rank: int) -> None:
    options = dict(verify_every=1, loss_window=1, min_queue_length=1)
    ddp, state = hooked(mlp(), options)
    with ddp.join():
        for step in range(8 - 3 * rank):
            ddp.zero_grad()
            loss = ddp(batch(step, rank)).square().mean()
            state.record_loss(loss)
            loss.backward()
            descend(ddp)
    agree(state)
    assert set(queued(state).values()) == {8}
    losses = state.state_dict()["losses"]
    assert bool(torch.isfinite(losses).all()), "a rank that has joined spoils the losses"


def check_not_finite_on_one_rank(rank: int) -> None:
    ddp, state = hooked(mlp())
    train(ddp, state, range(5))
    before = state.state_dict()["queue"]["2.bias"].clone()
    bias = ddp.module.get_parameter("2.bias")
    handle = bias.register_hook(lambda grad: grad / 0 if rank == 1 else grad)
    ddp.zero_grad()
    ddp(batch(5, rank)).square().mean().backward()
    handle.remove()
    agree(state)
    assert bias.grad is not None
    assert not bool(torch.isfinite(bias.grad).any())
    counts = queued(state)
    assert counts.pop("2.bias") == 5
    assert set(counts.values()) == {6}
    assert torch.equal(state.state_dict()["queue"]["2.bias"], before)


def check_grad_scaler(rank: int) -> None:
    plain, plain_state = hooked(mlp())
    train(plain, plain_state, range(9))
    for enabled in (True, False):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2, enabled=enabled)
        ddp, state = hooked(mlp(), {"grad_scaler": scaler})
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.3)
        scales = set()
        for step in range(9):
            optimizer.zero_grad()
            scaler.scale(ddp(batch(step, rank)).square().mean()).backward()
            scaler.step(optimizer)
            scales.add(scaler.get_scale())
            scaler.update()
            agree(state)
        assert len(scales) == (5 if enabled else 1)
        assert same_parameters(plain, ddp), "the loss scale changed the weights"
        assert state.digest() == plain_state.digest()


def resume(
    whole: tuple[DDP, GradQueueState], stop: int, fresh: Callable[[], tuple[DDP, GradQueueState]]
) -> None:
    """Assert that a run that is saved and loaded in step ``stop`` ends like one that is not."""
    ddp, state = whole
    train(ddp, state, range(stop))
    parameters, queue = copy.deepcopy(ddp.module.state_dict()), saved(state)
    train(ddp, state, range(stop, stop + 6))
    again, again_state = fresh()
    again.module.load_state_dict(parameters)
    again_state.load_state_dict(queue)
    # A state that is saved anew, before its first step or after it, has the loaded order of sums.
    assert again_state.state_dict()["buckets"] == queue["buckets"]
    train(again, again_state, range(stop, stop + 1))
    assert again_state.state_dict()["buckets"] == queue["buckets"]
    train(again, again_state, range(stop + 1, stop + 6))
    assert same_parameters(ddp, again), "the resumed run took another path"
    assert state.digest() == again_state.digest()


def check_resume(rank: int) -> None:
    for stop in (2, 5):
        resume(hooked(mlp()), stop, lambda: hooked(mlp(seed=7), bucket_cap_mb=25))


def check_resume_where_the_order_of_sums_matters(rank: int) -> None:
    variants: list[dict[str, Any]] = [{}, {"static_graph": True}, {"find_unused_parameters": True}]
    for options in variants:
        for stop in (3, 5):
            resume(hooked(mlp(), **options), stop, lambda o=options: hooked(mlp(seed=7), **o))


def check_distributed_checkpoint(rank: int, folder: str) -> None:
    options: dict[str, Any] = {"queue_length": LENGTH, "loss_window": 1}
    ddp, state = hooked(mlp(), options)
    state.record_loss(1.0)
    train(ddp, state, range(5))
    save({"queue": state}, checkpoint_id=folder)
    other = GradQueueState(mlp(seed=7), **options)
    assert other.digest() != state.digest()
    load({"queue": other}, checkpoint_id=folder)
    assert other.digest() == state.digest()
    assert other.state_dict()["buckets"] == state.state_dict()["buckets"]


def check_verify(rank: int) -> None:
    ddp, state = hooked(mlp(), {"verify_every": 2})
    train(ddp, state, range(5))
    if rank == 1:
        state.queues._queue["2.weight"][0, 3, 4] += 1e-3
    with pytest.raises(RuntimeError, match=r"'2\.weight' differs"):
        ddp(batch(6, rank)).square().mean().backward()


def check_options_are_the_same_on_all_ranks(rank: int) -> None:
    """They are compared before any collective that different options could keep a rank from."""
    for name, value in (("rho", 3.0 + rank), ("match_norm", rank == 1), ("shard_queue", rank == 1)):
        ddp, _ = hooked(mlp(), {name: value})
        with pytest.raises(RuntimeError, match=rf"option '{name}' differs .*rank 0 from \[1\]"):
            ddp(batch(0, rank)).square().mean().backward()


def check_losses(rank: int) -> None:
    """The effective length follows the mean over the ranks and over the losses of each rank."""
    options = dict(queue_length=6, min_queue_length=1, loss_window=2)
    ddp, state = hooked(mlp(), options)
    own = [[8.0, 1.0], [9.0, 2.0], [5.0, 3.0], [2.0, 4.0], [1.0, 4.5], [1.0, 4.0], [0.0, 4.5],
           [0.0, 4.0], [9.0, 4.0], [0.0, 4.0]]  # fmt: skip
    history: list[float] = []
    lengths = []
    for step, losses in enumerate(own):
        # Two micro-batches whose mean is the loss.
        state.record_loss(torch.tensor(losses[rank] - 0.5, requires_grad=True))
        state.record_loss(losses[rank] + 0.5)
        ddp.zero_grad()
        ddp(batch(step, rank)).square().mean().backward()
        history.insert(0, sum(losses) / 2)
        expected = reference.effective_length(history, 2, 1, 6)
        assert state.metrics()["effective_length"] == expected, (step, history)
        lengths.append(expected)
        agree(state)
    assert len(set(lengths)) > 3
    # One rank alone records: its loss is the mean.
    if rank == 1:
        state.record_loss(7.0)
    ddp(batch(0, rank)).square().mean().backward()
    assert float(state.state_dict()["losses"][0]) == 7.0


def check_forgotten_losses(rank: int) -> None:
    ddp, state = hooked(mlp(), {"loss_window": 1})
    with pytest.warns(UserWarning, match="no loss was recorded"):
        train(ddp, state, range(1))
    train(ddp, state, range(1, 2))


def check_group_is_that_of_ddp(rank: int) -> None:
    """The state of a bare model finds the group of the DDP module that it is registered with."""
    groups = [dist.new_group([number]) for number in range(dist.get_world_size())]
    model = mlp()
    state = GradQueueState(model, queue_length=LENGTH, verify_every=1)
    ddp = DDP(model, process_group=groups[rank])
    ddp.register_comm_hook(state, grad_queue_hook)
    ddp(batch(0, rank)).square().mean().backward()
    alone = mlp()
    alone(batch(0, rank)).square().mean().backward()
    assert torch.equal(model.get_parameter("0.weight").grad, alone.get_parameter("0.weight").grad)  # type: ignore[arg-type]
    assert state.process_group is groups[rank]
    assert state.ddp is ddp


def check_refusals(rank: int) -> None:
    sparse = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 1))
    ddp, _ = hooked(sparse)
    with pytest.raises(ValueError, match=r"0\.weight has a gradient of layout torch.sparse_coo"):
        ddp(torch.tensor([1, 2])).sum().backward()
    other = DDP(mlp())
    other.register_comm_hook(GradQueueState(mlp()), grad_queue_hook)
    with pytest.raises(ValueError, match="the state does not know"):
        other(batch(0, rank)).sum().backward()


TWO_RANKS = [
    check_law_off_and_warm_up_are_plain_ddp,
    check_reference,
    check_buckets_change_nothing,
    check_two_types,
    check_unused_parameters,
    check_zero_gradient_is_queued,
    check_no_sync,
    check_join,
    check_not_finite_on_one_rank,
    check_grad_scaler,
    check_resume,
    check_distributed_checkpoint,
    check_losses,
    check_forgotten_losses,
    check_group_is_that_of_ddp,
    check_verify,
    check_options_are_the_same_on_all_ranks,
    check_refusals,
]

THREE_RANKS = [
    check_law_off_and_warm_up_are_plain_ddp,
    check_reference,
    check_resume_where_the_order_of_sums_matters,
]
