# Gradients exist after a backward pass, although their types allow None.
# pyright: reportOptionalMemberAccess=false, reportArgumentType=false
"""Every rank's checks of local clusters with the queue in slices; see test_dist_clusters.py.

In addition to these, all checks of local clusters run with slices: `dist_cluster_loops.TWO_RANKS`.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cluster_cases import MLP
from dist_cluster_checks import LENGTH, K, labels_of, loss_of, model, vectors
from dist_cluster_loops import PlainLast
from dist_hooked import TINY, agree, queued, saved
from dist_shard_checks import assert_divided, bytes_of_a_step, close
from torch.nn.parallel import DistributedDataParallel as DDP

from gq_triton.dist import GradQueueState, grad_queue_hook, register
from gq_triton.dist.routes.clustered_sliced import ClusteredSlices

Run = Callable[[DDP, GradQueueState, range], None]


class Labels:
    """A clusterer that returns the labels of the current step."""

    def __init__(self) -> None:
        self.step = 0

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        return labels_of(self.step, dist.get_rank(), len(features))


def clustered(
    kind: Any = MLP, *, shard_queue: bool, ddp: dict[str, Any] | None = None, **options: Any
) -> tuple[DDP, GradQueueState, Labels]:
    wrapped, labels = DDP(model(kind), **{"bucket_cap_mb": TINY, **(ddp or {})}), Labels()
    defaults: dict[str, Any] = {"queue_length": LENGTH, "backend": "torch", "clusterer": labels}
    settings = {**defaults, "n_clusters": K, "features": "features", **options}
    return wrapped, register(wrapped, shard_queue=shard_queue, **settings), labels


def train(ddp: DDP, state: GradQueueState, labels: Labels, steps: range) -> None:
    for step in steps:
        labels.step = step
        ddp.zero_grad()
        loss = loss_of(ddp, vectors(step, dist.get_rank(), uneven=True))
        state.record_loss(loss)
        loss.backward()
        with torch.no_grad():
            for p in ddp.parameters():
                p.sub_(p.grad, alpha=0.1)


def same(a: DDP, b: DDP) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        close(q, p, 1e-10)


def check_slices_are_the_whole(rank: int) -> None:
    """Parameters, queue and metrics are equal, also with layers without clusters in a bucket."""
    large = {"bucket_cap_mb": 25}
    cases: list[dict[str, Any]] = [
        {},
        {"ddp": large, "match_norm": True},
        {"ddp": large, "kind": PlainLast, "strict": False},
        {"kind": PlainLast, "strict": False, "match_norm": True},
        {"loss_window": 1, "min_queue_length": 1, "queue_dtype": "float8"},
    ]
    for case in cases:
        runs = [clustered(shard_queue=sliced, **case) for sliced in (False, True)]
        for run in runs:
            train(*run, range(LENGTH + 4))
        (whole, first, _), (parts, second, _) = runs
        same(whole, parts)
        assert_divided(second)
        rings = [saved(state)["queue"] for state in (first, second)]
        for name, ring in rings[0].items():
            close(rings[1][name], ring, 1e-9)  # the mean is rounded once more, in every step
        mine, theirs = second.metrics(), first.metrics()
        assert mine.pop("cluster_sizes") == theirs.pop("cluster_sizes")
        assert mine["mean_weight"] != 1.0
        assert mine == pytest.approx(theirs, rel=1e-9)
        layers = first.metrics(per_layer=True)
        for name, figures in second.metrics(per_layer=True).items():
            assert figures == pytest.approx(layers[name], rel=1e-9), name


def check_saved_either_way(rank: int) -> None:
    """A sliced run and a whole one go on from what the other saved, and so does a single rank."""
    alone = [dist.new_group([number]) for number in range(dist.get_world_size())]
    for first in (False, True):
        run = clustered(shard_queue=first, loss_window=2)
        train(*run, range(LENGTH + 3))
        weights, queue = copy.deepcopy(run[0].module.state_dict()), saved(run[1])
        digest = run[1].digest()
        train(*run, range(LENGTH + 3, LENGTH + 6))
        for second in (False, True):
            again = clustered(shard_queue=second, loss_window=2)
            again[0].module.load_state_dict(weights)
            again[1].load_state_dict(queue)
            assert again[1].digest() == digest
            train(*again, range(LENGTH + 3, LENGTH + 6))
            same(run[0], again[0])
            if first == second:
                assert again[1].digest() == run[1].digest()
        single, state, labels = clustered(
            shard_queue=True, loss_window=2, ddp={"process_group": alone[rank]}
        )
        state.load_state_dict(queue)
        assert state.digest() == digest
        train(single, state, labels, range(LENGTH + 3, LENGTH + 4))
        assert set(queued(state).values()) == {LENGTH + 4}


def check_bytes_on_the_wire(rank: int) -> None:
    """Count the trips of a gradient's bytes around the ring of ranks.

    Slices: 2 for the weighted gradient, 1 for the raw mean, 1 each for the queue's mean and
    1 / sigma. Whole queues: 2 for the weighted gradient and 2 for the raw mean. The engine sends
    nothing: plain torch spares the ranks a compilation.
    """
    world, rest = dist.get_world_size(), dist.get_world_size() - 1

    def data(step: int) -> torch.Tensor:
        return vectors(step, rank).float()

    bare = MLP()
    plain = bytes_of_a_step(DDP(copy.deepcopy(bare), bucket_cap_mb=TINY), data)
    sent = {}
    for sliced in (False, True):
        ddp = DDP(copy.deepcopy(bare), bucket_cap_mb=TINY)
        state = register(
            ddp, n_clusters=1, queue_length=LENGTH, shard_queue=sliced, backend="torch"
        )
        sent[sliced] = bytes_of_a_step(ddp, data)
        buckets = len(state.state_dict()["buckets"])
    # Masses of the samples, two numbers of 8 bytes: once per step, and for each parameter.
    shares = 2 * rest * 2 * 8 * (1 + len(list(bare.parameters())))
    assert sent[False].gradients == 2 * plain.gradients + shares
    trips = plain.gradients // 2
    extra = sent[True].gradients - (5 * trips + shares)
    assert 0 <= extra <= 3 * rest * 4 * (world - 1) * buckets  # padding
    assert 0 <= sent[True].votes <= 2 * rest * rest * buckets


def check_join(rank: int) -> None:
    """All ranks take the losses of the ranks that go on, with whole queues and with slices."""
    for sliced in (False, True):
        ddp, state, labels = clustered(shard_queue=sliced, loss_window=1, verify_every=1)
        with ddp.join():
            train(ddp, state, labels, range(LENGTH + 3 + 2 * (rank == 0)))
        agree(state)
        assert set(queued(state).values()) == {LENGTH + 5}
        state.state_dict()  # takes the last loss
        agree(state)


def check_damaged_statistics_are_named(rank: int) -> None:
    ddp, state, labels = clustered(shard_queue=True, verify_every=1)
    train(ddp, state, labels, range(LENGTH + 2))
    assert isinstance(state.queues, ClusteredSlices)
    if rank == 1:
        state.queues._settle(["head.weight"])
        state.queues._known["head.weight"][1, 3] += 1e-3
    with pytest.raises(RuntimeError, match=r"'head\.weight' differs between the ranks"):
        train(ddp, state, labels, range(LENGTH + 2, LENGTH + 3))


def check_loaded_before_ddp_and_a_part_that_one_rank_uses(rank: int) -> None:
    """Only ranks whose gradients need them have a loaded ring's statistics: that is no fault."""

    class Heads(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.spare = torch.nn.Linear(12, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            head = self.head if rank == 0 else self.spare
            return head(self.features(x).relu())

    options: dict[str, Any] = {"kind": Heads, "shard_queue": True, "verify_every": 1}
    unused = {"find_unused_parameters": True, "bucket_cap_mb": TINY}
    ddp, state, labels = clustered(**options, ddp=unused)
    train(ddp, state, labels, range(LENGTH + 2))
    bare, queue = copy.deepcopy(ddp.module), saved(state)
    settings: dict[str, Any] = {"queue_length": LENGTH, "backend": "torch", "clusterer": labels}
    early = GradQueueState(
        bare, n_clusters=K, features="features", shard_queue=True, verify_every=1, **settings
    )
    early.load_state_dict(queue)
    again = DDP(bare, **unused)
    again.register_comm_hook(early, grad_queue_hook)
    for run in ((ddp, state), (again, early)):
        train(*run, labels, range(LENGTH + 2, LENGTH + 5))
    same(ddp, again)


CHECKS = [
    check_slices_are_the_whole,
    check_saved_either_way,
    check_bytes_on_the_wire,
    check_join,
    check_damaged_statistics_are_named,
    check_loaded_before_ddp_and_a_part_that_one_rank_uses,
]
