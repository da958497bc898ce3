"""Clusters of every rank on FSDP2 and HSDP: W ranks are one process with all their clusters."""

import pytest
import torch
from sharded_cluster_cases import Twins, Words
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.tensor import DTensor, Shard

UNEVEN = [6, 9, 4, 7]
CASES = {
    "plain": {},
    "words": {"model": Words},
    "match_norm": {"options": {"match_norm": True}},
    "uneven": {"sizes": UNEVEN},
    "uneven_power": {"sizes": UNEVEN, "options": {"population_power": 0.5}},
    "uneven_standard_error": {"sizes": UNEVEN, "options": {"centroid_scale": "standard_error"}},
    "kept_whole": {"model": Words, "sharding": {"reshard_after_forward": False}},
}


def full(tensor):
    assert isinstance(tensor, DTensor)
    return tensor.full_tensor()


def check(rank, shape, case):
    case = dict(case)
    if "sizes" in case:
        case["sizes"] = case["sizes"][: torch.Size(shape).numel()]
    twins = Twins(rank, shape, **case)
    before = list(twins.sharded.state_dict()), len(list(twins.sharded.parameters()))
    twins.run()
    assert before == (list(twins.sharded.state_dict()), len(list(twins.sharded.parameters())))
    assert twins.plain.metrics()["mean_weight"] != 1


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_two_ranks_are_one_process(ranks, case):
    ranks(2).run(check, (2,), case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("shape", [(3,), (2, 2)], ids=["fsdp", "hsdp"])
def test_more_ranks_are_one_process(ranks, shape, case):
    ranks(torch.Size(shape).numel()).run(check, shape, case)


def check_accumulation(rank, shape, synced):
    """Three micro-batches; those before the last are reduced, or wait for the last."""
    twins = Twins(rank, shape, model=Words, options={"accumulation_steps": 3})
    for step in range(5):
        twins.zero_grad()
        for micro in range(3):
            twins.sharded.set_requires_gradient_sync(synced or micro == 2)
            twins.backward(10 * step + micro, scale=1 / 3)
        twins.assert_same()
        twins.step()
        # One process has the norms of the last micro-batch, several have those of the step.
        twins.assert_same_metrics(but=["norm_ratio"])


@pytest.mark.slow
@pytest.mark.parametrize("synced", [False, True])
@pytest.mark.parametrize("shape", [(2,), (2, 2)], ids=["fsdp", "hsdp"])
def test_micro_batches_are_those_of_one_process(ranks, shape, synced):
    ranks(torch.Size(shape).numel()).run(check_accumulation, shape, synced)


def check_partial_reduction(rank):
    """Gradients that are reduced over the shards only, and over the copies with the last one."""
    twins = Twins(rank, (2, 2), options={"accumulation_steps": 2})
    for step in range(5):
        twins.zero_grad()
        for micro in range(2):
            twins.sharded.set_requires_all_reduce(micro == 1)
            twins.backward(10 * step + micro, scale=1 / 2)
        twins.assert_same()
        twins.step()


@pytest.mark.slow
def test_copies_may_be_reduced_later(ranks):
    ranks(4).run(check_partial_reduction)


def check_zeroed_in_place(rank):
    twins = Twins(rank, (2,))
    for step in range(6):
        twins.zero_grad(set_to_none=False)
        twins.backward(step)
        twins.assert_same()
        models = twins.sharded, twins.whole
        norms = [torch.nn.utils.clip_grad_norm_(m.parameters(), 0.1) for m in models]
        torch.testing.assert_close(full(norms[0]), norms[1], rtol=1e-10, atol=0)
        twins.assert_same()
        twins.step()
        twins.assert_same_metrics()


def test_gradients_zeroed_in_place_and_clipped(ranks):
    ranks(2).run(check_zeroed_in_place)


def wrap_blocks(model):
    model.blocks[0] = checkpoint_wrapper(model.blocks[0])
    for place in (1, 3):
        model.blocks[1][place] = checkpoint_wrapper(model.blocks[1][place])


def check_checkpointed(rank):
    Twins(rank, (2,), model=Words, wrap=wrap_blocks).run()


def test_activation_checkpointing(ranks):
    ranks(2).run(check_checkpointed)


def last_dimension(param):
    return Shard(param.dim() - 1) if param.shape[-1] % 2 == 0 else None


def check_last_dimension(rank):
    Twins(rank, (2,), model=Words, sharding={"shard_placement_fn": last_dimension}).run()


def test_parameters_cut_along_another_dimension(ranks):
    ranks(2).run(check_last_dimension)


def check_output_gradient(rank):
    Twins(rank, (2,), options={"features": "output_gradient"}).run()


def test_features_that_the_backward_pass_gives(ranks):
    ranks(2).run(check_output_gradient)
