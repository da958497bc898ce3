# Gradients exist after a backward pass, although their types allow None.
# pyright: reportOptionalMemberAccess=false, reportArgumentType=false
# pyright: reportOptionalSubscript=false
"""The checks of local clusters under DDP that every rank runs; see test_dist_clusters.py.

The judge of most checks is the plug-in in one process. It sees the batches of all ranks as one, and
keeps the clusters of the ranks apart.
"""

import copy
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cluster_cases import MLP, ResNet
from dist_hooked import TINY, agree
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.nn.parallel import DistributedDataParallel as DDP

from gq_triton import GradQueue
from gq_triton.dist import GradQueueState, register

LENGTH, K = 3, 3
F64 = torch.float64
# Options that `run_with` sets and that every state takes in addition to those of its check.
EXTRA: dict[str, Any] = {}


def model(kind: Any = MLP) -> nn.Module:
    torch.manual_seed(0)
    return kind().to(F64)


def resnet() -> nn.Module:
    return ResNet(lambda channels: nn.GroupNorm(2, channels))


def vectors(step: int, rank: int, uneven: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    size = 4 + 3 * ((rank + step) % 3) if uneven else 6
    return torch.randn(size, 6, generator=generator, dtype=F64)


def images(step: int, rank: int, uneven: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(5 + (rank if uneven else 0), 2, 8, 8, generator=generator, dtype=F64)


def labels_of(step: int, rank: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(77 * step + rank)
    return torch.randint(K, (size,), generator=generator)


def loss_of(module: nn.Module, batch: Tensor) -> Tensor:
    return (module(batch) - 0.3).flatten(1).square().mean(dim=1).mean()


class Pair:
    """A model under DDP with K clusters per rank, and its judge in one process."""

    def __init__(
        self, kind: Any = MLP, data: Any = vectors, *, uneven: bool = False,
        ddp: dict[str, Any] | None = None, brings: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        self.brings = brings  # the labels come with the batch, and from no clusterer
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.data, self.uneven, self.step = data, uneven, 0
        options = {"queue_length": LENGTH, "backend": "torch", **options}
        bare = model(kind)
        self.twin = copy.deepcopy(bare)
        self.ddp = DDP(bare, **{"bucket_cap_mb": TINY, **(ddp or {})})
        found: dict[str, Any] = {"features": "features", "clusterer": self.mine}
        if brings:
            found = {"labels": True}
        self.state = register(self.ddp, n_clusters=K, **found, **options, **EXTRA)
        self.judge = GradQueue(
            self.twin, n_clusters=K * self.world, features="features", clusterer=self.all, **options
        )
        self.optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (self.ddp, self.twin)]
        self.judge.attach(self.optimizers[1])

    def batch(self, rank: int) -> Tensor:
        return self.data(self.step, rank, self.uneven)

    def mine(self, features: Tensor) -> Tensor:
        return labels_of(self.step, self.rank, len(features))

    def all(self, features: Tensor) -> Tensor:
        parts = [labels_of(self.step, r, len(self.batch(r))) + K * r for r in range(self.world)]
        return torch.cat(parts)

    def backward(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        if self.brings:
            self.state.set_labels(self.mine(self.batch(self.rank)))
        loss_of(self.ddp, self.batch(self.rank)).backward()
        whole = torch.cat([self.batch(rank) for rank in range(self.world)])
        loss_of(self.twin, whole).backward()

    def compare(self, tolerance: float = 1e-10) -> None:
        for (name, p), q in zip(
            self.ddp.module.named_parameters(), self.twin.parameters(), strict=True
        ):
            scale = float(q.grad.abs().max()) or 1.0
            error = float((p.grad - q.grad).abs().max()) / scale
            assert error <= tolerance, f"step {self.step} {name}: {error:.1e}"

    def advance(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
        agree(self.state)
        self.step += 1

    def run(self, steps: int = LENGTH + 3, tolerance: float = 1e-10) -> None:
        for _ in range(steps):
            self.backward()
            self.compare(tolerance)
            self.advance()


def check_ranks_are_one_process(rank: int) -> None:
    cases: list[dict[str, Any]] = [
        {"uneven": True},
        {"uneven": True, "population_power": 0.5},
        {"uneven": True, "centroid_scale": "standard_error"},
        {"uneven": True, "match_norm": True},
        {"uneven": True, "brings": True},
        # The law is off, and the mixture alone makes another gradient than the raw mean.
        {"uneven": True, "rho": 1.0, "population_power": 0.0, "match_norm": True},
        {"uneven": True, "kind": resnet, "data": images},
        {"ddp": {"gradient_as_bucket_view": True, "bucket_cap_mb": 25}},
        {"ddp": {"static_graph": True}},
        {"ddp": {"find_unused_parameters": True}},
    ]
    for case in cases:
        pair = Pair(**case)
        pair.run(LENGTH + 2)
        mine, theirs = pair.state.metrics(), pair.judge.metrics()
        sizes = mine.pop("cluster_sizes")[rank]
        assert sizes == pair.state.cluster_sizes_
        whole = theirs.pop("cluster_sizes")[K * rank : K * rank + K]
        # The hook cannot know the last clusters of a clusterer where they are empty.
        assert whole == (sizes + [0] * K)[: len(whole)]
        assert case.get("rho") == 1.0 or mine["mean_weight"] != 1.0
        layers = pair.judge.metrics(per_layer=True)
        for name, figures in pair.state.metrics(per_layer=True).items():
            assert figures == pytest.approx(layers[name], rel=1e-9), (case, name)
        for name, value in theirs.items():
            assert abs(mine[name] - value) <= 1e-9 * max(1.0, abs(value)), (
                case,
                name,
                mine,
                theirs,
            )
        digests = pair.state.state_dict()["queue"]
        for name, ring in pair.judge.state_dict()["queue"].items():
            torch.testing.assert_close(digests[name], ring, rtol=1e-9, atol=1e-13)


def check_one_cluster_per_rank_needs_no_features(rank: int) -> None:
    ddp = DDP(model(), bucket_cap_mb=TINY)
    state = register(ddp, n_clusters=1, queue_length=LENGTH, backend="torch", **EXTRA)

    class One(Pair):
        def mine(self, features: Tensor) -> Tensor:
            return torch.zeros(len(features), dtype=torch.int64)

    pair = One(uneven=True)
    for step in range(LENGTH + 2):
        pair.backward()
        pair.advance()
        ddp.zero_grad()
        loss_of(ddp, vectors(step, rank, uneven=True)).backward()
        for p, q in zip(ddp.parameters(), pair.ddp.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
        with torch.no_grad():
            for p in ddp.parameters():
                p.sub_(p.grad, alpha=0.1)
    assert state.cluster_sizes_ == [len(vectors(LENGTH + 1, rank, uneven=True))]
    agree(state)


def check_accumulation_under_no_sync(rank: int) -> None:
    """Two micro-batches of K clusters on every rank are one process that accumulates two."""
    for view in (False, True):
        pair = Pair(ddp={"gradient_as_bucket_view": view}, accumulation_steps=2)
        for _ in range(LENGTH + 2):
            for optimizer in pair.optimizers:
                optimizer.zero_grad()
            for last in (False, True):
                batch = pair.batch(rank)
                if last:
                    (loss_of(pair.ddp, batch) / 2).backward()
                else:
                    with pair.ddp.no_sync():
                        (loss_of(pair.ddp, batch) / 2).backward()
                whole = torch.cat([pair.batch(r) for r in range(pair.world)])
                (loss_of(pair.twin, whole) / 2).backward()
                pair.step += 1
            pair.compare()
            pair.advance()
            assert {int(n) for n in pair.state.state_dict()["queued"].values()} != {0}


def check_accumulation_has_to_be_announced(rank: int) -> None:
    pair = Pair()
    with pair.ddp.no_sync():
        loss_of(pair.ddp, pair.batch(rank)).backward()
    with pytest.warns(UserWarning, match="2 backward passes have .* accumulation_steps is 1"):
        loss_of(pair.ddp, pair.batch(rank)).backward()
    pair = Pair(accumulation_steps=2)
    with pytest.warns(UserWarning, match="1 backward pass has .* accumulation_steps is 2"):
        loss_of(pair.ddp, pair.batch(rank)).backward()


def check_an_infinity_on_one_rank_is_queued_by_none(rank: int) -> None:
    plain = Pair()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
    pair = Pair()
    pair.state.grad_scaler = scaler
    for step in range(LENGTH + 4):
        bad = step == LENGTH + 1
        pair.optimizers[0].zero_grad()
        loss = loss_of(pair.ddp, pair.batch(rank))
        if bad and rank == 0:
            loss = loss * torch.inf
        scaler.scale(loss).backward()
        before = pair.state.digest() if bad else None
        scaler.step(pair.optimizers[0])
        scaler.update()
        agree(pair.state)
        if bad:
            assert pair.state.digest() == before
            counts = {int(n) for n in pair.state.state_dict()["queued"].values()}
            assert counts == {LENGTH + 1}
            continue
        plain.backward()
        plain.advance()
        pair.step += 1
    for p, q in zip(pair.ddp.parameters(), plain.ddp.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13)


def check_a_resumed_run_goes_on_bit_for_bit(rank: int) -> None:
    for options in ({}, {"loss_window": 2, "queue_dtype": "float8"}):
        pair = Pair(**options)
        saved = None
        for step in range(LENGTH + 5):
            if step == LENGTH + 2:
                saved = copy.deepcopy((pair.state.state_dict(), pair.ddp.module.state_dict()))
            pair.step = step
            loss = loss_of(pair.ddp, pair.batch(rank))
            pair.state.record_loss(loss)
            pair.optimizers[0].zero_grad()
            loss.backward()
            pair.optimizers[0].step()
        again = Pair(**options)
        again.state.load_state_dict(saved[0])
        again.ddp.module.load_state_dict(saved[1])
        for step in range(LENGTH + 2, LENGTH + 5):
            again.step = step
            loss = loss_of(again.ddp, again.batch(rank))
            again.state.record_loss(loss)
            again.optimizers[0].zero_grad()
            loss.backward()
            again.optimizers[0].step()
        for p, q in zip(pair.ddp.parameters(), again.ddp.parameters(), strict=True):
            assert torch.equal(p, q), options
        assert pair.state.digest() == again.state.digest()
        agree(pair.state)


def check_k_means_goes_on_from_a_distributed_checkpoint(rank: int) -> None:
    """A loop saves and loads the state with one call of torch.distributed.checkpoint each."""

    def start() -> tuple[DDP, GradQueueState]:
        ddp = DDP(model(), bucket_cap_mb=TINY)
        options = {"queue_length": LENGTH, "backend": "torch", **EXTRA}
        return ddp, register(ddp, n_clusters=K, features="features", **options)

    def train(ddp: DDP, steps: range) -> None:
        for step in steps:
            ddp.zero_grad()
            loss_of(ddp, vectors(step, rank, uneven=True)).backward()
            with torch.no_grad():
                for p in ddp.parameters():
                    p.sub_(p.grad, alpha=0.1)

    ddp, state = start()
    train(ddp, range(LENGTH + 2))
    folder: list[Any] = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folder)
    save({"queue": state}, checkpoint_id=folder[0])
    weights = copy.deepcopy(ddp.module.state_dict())
    train(ddp, range(LENGTH + 2, LENGTH + 5))
    again, loaded = start()
    load({"queue": loaded}, checkpoint_id=folder[0])
    again.module.load_state_dict(weights)
    train(again, range(LENGTH + 2, LENGTH + 5))
    assert loaded.digest() == state.digest()
    assert loaded.cluster_sizes_ == state.cluster_sizes_
    for p, q in zip(ddp.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
    agree(loaded)
    dist.barrier()
    if rank == 0:
        shutil.rmtree(folder[0])


def run_with(rank: int, shard_queue: bool, check: Callable[[int], None]) -> None:
    """Run a check with the queue whole on every rank or in slices."""
    EXTRA["shard_queue"] = shard_queue
    check(rank)


CHECKS = [
    check_ranks_are_one_process,
    check_one_cluster_per_rank_needs_no_features,
    check_accumulation_under_no_sync,
    check_accumulation_has_to_be_announced,
    check_an_infinity_on_one_rank_is_queued_by_none,
    check_a_resumed_run_goes_on_bit_for_bit,
    check_k_means_goes_on_from_a_distributed_checkpoint,
]
# The checks to which the number of ranks matters.
THREE_RANKS = [check_ranks_are_one_process, check_a_resumed_run_goes_on_bit_for_bit]
