"""The plan's bytes are those that the package holds and sends, on real and on pretended ranks."""

import pytest
import torch
from plan_counts import check_as_planned, pretended
from torch import nn
from torch._C._distributed_c10d import _compute_bucket_assignment_by_size

from gq_triton.float8 import FLOAT8
from gq_triton.plan.shapes import buckets, shapes_of
from gq_triton.plan.ways import QUEUES, WAYS


def rare(*values):
    return pytest.param(*values, marks=[pytest.mark.rare, pytest.mark.slow])


@pytest.mark.parametrize(
    ("name", "world", "queue_dtype"),
    [
        ("FSDP2, GQ optimizer", 64, FLOAT8),
        ("HSDP, plug-in", 8, None),
        ("HSDP, clusters", 8, torch.bfloat16),
        ("DDP hook, clusters, slices", 8, FLOAT8),
        *(rare(way.name, 8, queue) for way in WAYS[1:] for queue in QUEUES),
        *(rare(way.name, 16384, None) for way in WAYS if way.wrap != "ddp"),
    ],
)
def test_pretended_ranks_hold_and_send_what_is_planned(name, world, queue_dtype):
    with pretended(world):
        check_as_planned(0, name, queue_dtype)


# In the gate test_dist_shard.py runs one of these, on ranks that it has started anyway.
@pytest.mark.parametrize("world", [rare(2), rare(4)])
@pytest.mark.parametrize("name", [way.name for way in WAYS if way.wrap != "hsdp"])
def test_gloo_ranks_hold_and_send_what_is_planned(ranks, name, world):
    ranks(world).run(check_as_planned, name)


@pytest.mark.parametrize("name", [rare("DDP hook"), rare("DDP hook, clusters")])
def test_one_gloo_rank_holds_the_whole_queue(ranks, name):
    ranks(1).run(check_as_planned, name)


@pytest.mark.parametrize("sizes", [[300, 700_000, 5, 9_000_000, 40], [3], [7_000_000, 7_000_000]])
def test_buckets_are_those_of_ddp(sizes):
    model = nn.ParameterList(
        nn.Parameter(torch.empty(size, dtype=dtype, device="meta"))
        for size in sizes
        for dtype in (torch.float32, torch.bfloat16)
    )
    last_first = [torch.empty(p.shape, dtype=p.dtype) for p in reversed(list(model))]
    assigned, _ = _compute_bucket_assignment_by_size(last_first, [2**20, 25 * 2**20])
    expected = sorted([last_first[i].nbytes for i in bucket] for bucket in assigned)
    found = [[p.numel * p.itemsize for p in b] for b in buckets(shapes_of("m", model).parameters)]
    assert sorted(found) == expected
