"""The checks of saving, loading and verifying a queue in slices that every rank runs.

The module also has the lists of all checks of slices, by number of ranks, for test_dist_shard.py.
"""

import copy
import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dist_hooked import LENGTH, agree, descend, hooked, queued, saved, train
from dist_models import TwoHeads, batch, convolutions, images, mlp, wide_batch, wide_mlp
from dist_shard_checks import (
    a_cut_parameter,
    assert_divided,
    check_bytes_on_the_wire,
    check_join_and_losses,
    check_no_sync_and_scaler,
    check_not_finite_in_one_slice,
    check_same_as_whole,
    check_tiny_parameters,
    check_zeros,
    close,
    sliced,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from gq_triton.dist import GradQueueState
from gq_triton.dist.routes.sliced import SlicedQueues


def check_resume(rank: int) -> None:
    """A sliced run is resumed bit for bit, also with other buckets."""
    for stop in (3, 5):
        ddp, state = sliced(mlp())
        train(ddp, state, range(stop))
        parameters, queue = copy.deepcopy(ddp.module.state_dict()), saved(state)
        train(ddp, state, range(stop, stop + 6))
        variants: list[dict[str, Any]] = [{}, {"bucket_cap_mb": 25}, {"static_graph": True}]
        for options in variants:
            again, parts = sliced(mlp(seed=7), **options)
            again.module.load_state_dict(parameters)
            parts.load_state_dict(queue)
            assert_divided(parts)
            assert parts.state_dict()["buckets"] == queue["buckets"]
            train(again, parts, range(stop, stop + 6))
            for a, b in zip(ddp.parameters(), again.parameters(), strict=True):
                assert torch.equal(a, b), "the resumed run took another path"
            assert parts.digest() == state.digest()


def check_resume_the_other_way(rank: int) -> None:
    for first, second in ((hooked, sliced), (sliced, hooked)):
        ddp, state = first(convolutions())
        train(ddp, state, range(4), images)
        again, other = second(convolutions())
        again.module.load_state_dict(ddp.module.state_dict())
        other.load_state_dict(saved(state))
        assert other.digest() == state.digest()
        for pair in ((ddp, state), (again, other)):
            train(*pair, range(4, 8), images)
        for a, b in zip(ddp.parameters(), again.parameters(), strict=True):
            close(b, a, 1e-10)


def check_distributed_checkpoint(rank: int, folder: str) -> None:
    options: dict[str, Any] = {"queue_length": LENGTH, "loss_window": 1}
    ddp, state = sliced(mlp(), options)
    state.record_loss(1.0)
    train(ddp, state, range(5))
    save({"queue": state}, checkpoint_id=folder)
    whole = GradQueueState(mlp(seed=7), **options)
    _, parts = sliced(mlp(seed=7), options)
    for other in (whole, parts):
        assert other.digest() != state.digest()
        load({"queue": other}, checkpoint_id=folder)
        assert other.digest() == state.digest()
        assert other.state_dict()["buckets"] == state.state_dict()["buckets"]


def check_other_world_sizes(rank: int) -> None:
    """The run goes from 2 ranks to 4 and then to 1, in sub-groups of the four that run."""
    pair = dist.new_group([0, 1])
    alone = [dist.new_group([number]) for number in range(4)]
    contents: list[Any] = [None]
    if rank < 2:
        ddp, state = sliced(wide_mlp(), {"verify_every": 1}, process_group=pair)
        for step in range(5):
            ddp.zero_grad()
            ddp(wide_batch(step, rank)).square().mean().backward()
            descend(ddp)
        assert isinstance(state.queues, SlicedQueues)
        assert state.queues._ranks == [0, 1]
        file = io.BytesIO()
        content = state.state_dict()
        torch.save([content, ddp.module.state_dict(), state.digest()], file)
        contents = [file.getvalue()]
    dist.broadcast_object_list(contents, 0)
    queue, parameters, digest = torch.load(io.BytesIO(contents[0]), weights_only=True)
    runs = []
    for build in (hooked, sliced):
        ddp, state = build(wide_mlp())
        ddp.module.load_state_dict(parameters)
        state.load_state_dict(queue)
        assert state.digest() == digest
        train(ddp, state, range(5, 9), wide_batch)
        assert set(queued(state).values()) == {9}
        runs.append((ddp, state))
    for a, b in zip(runs[0][0].parameters(), runs[1][0].parameters(), strict=True):
        close(b, a, 1e-10)
    queue, digest = saved(runs[1][1]), runs[1][1].digest()
    single, state = sliced(wide_mlp(), process_group=alone[rank])
    state.load_state_dict(queue)
    assert state.digest() == digest
    single(wide_batch(9, 0)).square().mean().backward()
    agree(state)
    assert set(queued(state).values()) == {10}


def check_verify(rank: int) -> None:
    ddp, state = sliced(mlp(), {"verify_every": 1}, bucket_cap_mb=25)
    train(ddp, state, range(5))
    name, _ = a_cut_parameter(ddp, state)
    if rank == 1:
        state.queues._queued[name] += 1
    with pytest.raises(RuntimeError, match=rf"'{name}' differs between the ranks"):
        ddp(batch(5, rank)).square().mean().backward()
    ddp, state = sliced(mlp(), {"verify_every": 1, "rho": 3.0 + rank})
    with pytest.raises(RuntimeError, match=r"option 'rho' differs between the ranks"):
        ddp(batch(5, rank)).square().mean().backward()


def check_errors(rank: int) -> None:
    ddp, state = sliced(mlp())
    train(ddp, state, range(2))
    before = state.digest()
    other, other_state = sliced(TwoHeads())
    train(other, other_state, range(2))
    with pytest.raises(ValueError, match=r"'body\.weight' that this model lacks"):
        state.load_state_dict(saved(other_state))
    assert state.digest() == before
    alone: list[Any] = [dist.new_group([number]) for number in range(dist.get_world_size())]
    assert isinstance(state.queues, SlicedQueues)
    state.queues._group = lambda: alone[rank]
    with pytest.raises(RuntimeError, match=r"lies in slices on ranks \[0, 1.*has become \[\d\]"):
        ddp(batch(2, rank)).square().mean().backward()


TWO_RANKS = [
    check_same_as_whole,
    check_bytes_on_the_wire,
    check_not_finite_in_one_slice,
    check_zeros,
    check_no_sync_and_scaler,
    check_join_and_losses,
    check_tiny_parameters,
    check_resume,
    check_resume_the_other_way,
    check_distributed_checkpoint,
    check_verify,
    check_errors,
]

THREE_RANKS = [
    check_same_as_whole,
    check_bytes_on_the_wire,
    check_not_finite_in_one_slice,
    check_zeros,
    check_resume,
    check_errors,
]

FOUR_RANKS = [
    check_same_as_whole,
    check_bytes_on_the_wire,
    check_tiny_parameters,
    check_other_world_sizes,
]
