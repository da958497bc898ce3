"""FSDP2: sharded parameters give what the whole ones give, on one spawned mesh of two ranks."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
from optim_cases import PAIR, assert_same, gradients_of
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from gq_triton.ring import local
from gq_triton.testing import spawn

RANKS = 2


def models(ranks=RANKS):
    """Return one small model sharded and whole; of five rows the two ranks hold three and two."""
    torch.manual_seed(0)
    whole = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    whole = whole.double()
    sharded = copy.deepcopy(whole)
    mesh = init_device_mesh("cpu", (ranks,))
    for layer in (sharded[0], sharded[2], sharded):
        fully_shard(layer, mesh=mesh)
    return sharded, whole


def backward(model, step):
    """Run a backward pass and return the loss.

    Every rank sees the same samples: the mean over ranks is the gradient of one process.
    """
    torch.manual_seed(100 + step)
    x, y = torch.randn(8, 3).double(), torch.randn(8, 1).double()
    model.zero_grad()
    loss = (model(x) - y).square().mean()
    loss.backward()
    return loss.detach()


def full(tensors):
    return [t.full_tensor() if isinstance(t, DTensor) else t.detach().clone() for t in tensors]


def check_equals_whole(variant, backend, **options):
    sharded, whole = models()
    options = {"queue_length": 3, "loss_window": 2, "min_queue_length": 2, **options}
    optimizer = variant.build(sharded.parameters(), backend=backend, **options)
    plain = variant.build(whole.parameters(), backend=backend, **options)
    assert optimizer.metrics() == plain.metrics() == {}
    for step in range(8):
        for model, either in ((sharded, optimizer), (whole, plain)):
            either.record_loss(backward(model, step))
            either.step()
        left, right = full(sharded.parameters()), full(whole.parameters())
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)
        assert optimizer.metrics() == pytest.approx(plain.metrics(), rel=1e-12)
    for shard, param in zip(sharded.parameters(), whole.parameters(), strict=True):
        queue = optimizer.state[shard]["queue"]
        assert isinstance(queue, DTensor)
        assert queue.shape == (4 if queue.dtype == torch.uint8 else 3, *param.shape)
        assert queue.placements == (Shard(1),)
        torch.testing.assert_close(
            queue.full_tensor(), plain.state[param]["queue"], rtol=1e-12, atol=1e-12
        )
        assert int(optimizer.state[shard]["queued"]) == 8
    return sharded, optimizer


def check_not_finite(variant, backend, match_norm):
    """Check that a NaN on one rank keeps the whole parameter out of the queue on all ranks."""
    sharded, whole = models()
    options = {"queue_length": 2, "match_norm": match_norm, "backend": backend}
    optimizer = variant.build(sharded.parameters(), **options)
    plain = variant.build(whole.parameters(), **options)
    before = None
    for step in range(4):
        for model in (sharded, whole):
            backward(model, step)
        if step == 3:
            first = local(gradients_of(sharded.parameters())[0])
            if dist.get_rank() == 0:
                first[0, 0] = math.nan
            assert len(first) == (3 if dist.get_rank() == 0 else 2)
            gradients_of(whole.parameters())[0][0, 0] = math.nan
            before = next(iter(optimizer.state.values()))["queue"].to_local().clone()
        optimizer.step()
        plain.step()
        if step == 3:
            state = next(iter(optimizer.state.values()))
            assert_same(state["queue"].to_local(), before)
            assert int(state["queued"]) == 3
            bad = next(iter(full(sharded.parameters())))
            assert bad[0, 0].isnan()
            assert bad.isnan().sum() == 1
    left, right = full(sharded.parameters()), full(whole.parameters())
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12, equal_nan=True)
    counters = [int(s["queued"]) for s in optimizer.state.values()]
    assert counters == [3, 4, 4, 4] == [int(s["queued"]) for s in plain.state.values()]


def check_checkpoint(variant, sharded, optimizer):
    """Check that a new sharded model goes on from the state of torch.distributed.checkpoint."""
    saved = dcp_state.get_optimizer_state_dict(sharded, optimizer)
    saved = {key: copy.deepcopy(value) for key, value in saved.items()}
    fresh, _ = models()
    fresh.load_state_dict(sharded.state_dict())
    resumed = variant.build(fresh.parameters())
    dcp_state.set_optimizer_state_dict(fresh, resumed, saved)
    for step in range(8, 11):
        for model, either in ((sharded, optimizer), (fresh, resumed)):
            either.record_loss(backward(model, step))
            either.step()
    assert_same(full(fresh.parameters()), full(sharded.parameters()))


# The options of a run that is saved, by optimizer.
SAVED = {
    "sgd": {"queue_length": 3, "backend": "torch"},
    "adamw": {"queue_length": 3, "backend": "torch", "queue_dtype": "float8"},
}


def check_random_bits_of_parts(variant):
    """The parts of one parameter have random bits of their own."""
    model = torch.nn.Linear(200, RANKS, bias=False, dtype=torch.bfloat16)
    torch.nn.init.ones_(model.weight)
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    weight = model.weight
    build = {"lr": 2.0**-10, "weight_decay": 0.0, "backend": "torch"}
    optimizer = variant.build([weight], stochastic_rounding=True, **build)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    rows = full([weight])[0]
    assert not torch.equal(rows[0], rows[1])


def save_run(rank, folder):
    """Take five steps, then write the checkpoint that a training loop would write."""
    for name, variant in PAIR.items():
        sharded, _ = models()
        optimizer = variant.build(sharded.parameters(), **SAVED[name])
        for step in range(5):
            backward(sharded, step)
            optimizer.step()
        model_state, optimizer_state = dcp_state.get_state_dict(sharded, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        save(state, checkpoint_id=f"{folder}/{name}")


def load_run(rank, folder, ranks):
    """Go on with another number of ranks; compare with a whole model that never stopped."""
    for name, variant in PAIR.items():
        sharded, whole = models(ranks)
        optimizer = variant.build(sharded.parameters(), **SAVED[name])
        plain = variant.build(whole.parameters(), **SAVED[name])
        model_state, optimizer_state = dcp_state.get_state_dict(sharded, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        load(state, checkpoint_id=f"{folder}/{name}")
        dcp_state.set_state_dict(
            sharded, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state
        )
        for step in range(5):
            backward(whole, step)
            plain.step()
        for step in range(5, 9):
            for model, either in ((sharded, optimizer), (whole, plain)):
                backward(model, step)
                either.step()
        left, right = full(sharded.parameters()), full(whole.parameters())
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)
        for shard, param in zip(sharded.parameters(), whole.parameters(), strict=True):
            mine, theirs = optimizer.state[shard], plain.state[param]
            torch.testing.assert_close(
                mine["queue"].full_tensor(), theirs["queue"], rtol=1e-12, atol=1e-12
            )
            assert int(mine["queued"]) == int(theirs["queued"]) == 9


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_checkpoint_continues_on_another_number_of_ranks(tmp_path, ranks):
    spawn(RANKS, save_run, str(tmp_path))
    spawn(ranks, load_run, str(tmp_path), ranks)


def run(rank):
    for variant in PAIR.values():
        check_random_bits_of_parts(variant)
        sharded, optimizer = check_equals_whole(variant, "torch")
        check_checkpoint(variant, sharded, optimizer)
        check_equals_whole(variant, "numba")
        # The norm is that of the whole parameter, summed over the ranks.
        check_equals_whole(variant, "torch", match_norm=True, queue_dtype="float8")
        for match_norm in (False, True):
            check_not_finite(variant, "torch", match_norm)


@pytest.mark.slow
def test_sharded_parameters_give_what_whole_ones_give():
    spawn(RANKS, run)
