# Gradients exist after a backward pass, although their types allow None.
# pyright: reportOptionalMemberAccess=false, reportArgumentType=false
"""The checks of models and loops under DDP with local clusters; see test_dist_clusters.py."""

import copy
from typing import Any

import torch
import torch.distributed as dist
from cluster_cases import MLP
from dist_cluster_checks import (
    CHECKS,
    EXTRA,
    F64,
    LENGTH,
    K,
    Pair,
    labels_of,
    loss_of,
    model,
    vectors,
)
from dist_hooked import TINY, agree
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from gq_triton.dist import GradQueueState, grad_queue_hook, register


class Detached(MLP):
    """A head with a second use that no gradient comes from."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.features(x).relu()
        return self.head(hidden) - 0.1 * self.head(2 * hidden).detach()


class PlainLast(MLP):
    """A model whose last layer, which lies in the first bucket, has no clusters."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose1d(1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(super().forward(x)[:, None])[:, 0]


def check_uses_and_passes(rank: int) -> None:
    Pair(Detached).run()
    Pair(Detached, ddp={"find_unused_parameters": True}).run()
    # A backward pass on one rank only, which no step follows, changes no share.
    pair = Pair(uneven=True)
    for _ in range(LENGTH + 3):
        if rank == 0:
            x = pair.batch(0).requires_grad_()
            torch.autograd.grad(loss_of(pair.ddp.module, x), x)
            with pair.ddp.no_sync():
                loss_of(pair.ddp, pair.batch(0)).backward()
        pair.backward()
        pair.compare()
        pair.advance()
    # When the model is wrapped and registered again, the new state takes the place of the old one.
    again = DDP(pair.ddp.module, bucket_cap_mb=TINY)
    state = register(
        again, n_clusters=K, features="features", clusterer=pair.mine, queue_length=LENGTH,
        backend="torch", **EXTRA,
    )  # fmt: skip
    state.load_state_dict(pair.state.state_dict())
    pair.ddp, pair.state = again, state
    pair.run(3)


def check_a_plain_last_layer_with_uneven_batches(rank: int) -> None:
    """With rho = 1 the clustered gradients are those of the whole batch."""
    ddp = DDP(model(PlainLast), bucket_cap_mb=TINY)
    twin = copy.deepcopy(ddp.module)
    state = register(
        ddp, n_clusters=K, features="features", rho=1.0, queue_length=LENGTH, strict=True,
        backend="torch", clusterer=lambda f: labels_of(0, rank, len(f)), **EXTRA,
    )  # fmt: skip
    for step in range(4):
        ddp.zero_grad()
        twin.zero_grad()
        parts = [vectors(step, r, uneven=True) for r in range(dist.get_world_size())]
        loss_of(ddp, parts[rank]).backward()
        loss_of(twin, torch.cat(parts)).backward()
        for name, param in ddp.module.named_parameters():
            torch.testing.assert_close(
                param.grad, twin.get_parameter(name).grad, rtol=1e-10, atol=1e-13
            )
        agree(state)


class AnyModules(nn.Module):
    """A bare scale, positions that all samples share, and a recurrent layer, which runs again."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.scale = nn.Linear(6, 8), nn.Parameter(torch.randn(8))
        self.places, self.layer = nn.Embedding(4, 2), nn.GRU(2, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        rows = (self.features(x) * self.scale).view(-1, 4, 2) + self.places(torch.arange(4))
        return self.layer(rows)[0]


def check_modules_of_any_kind(rank: int) -> None:
    pair = Pair(AnyModules, uneven=True, strict=True, centroid_scale="standard_error")
    shown = pair.state.check(pair.batch(rank))
    assert shown.share == 1.0
    assert all(param.grad is None for param in pair.ddp.parameters())
    pair.run()
    assert pair.state.report() == {row.name: row.how for row in shown.rows}
    assert pair.state.report()["layer.weight_ih_l0"] == "clusters (GRU run again)"


def check_compiled_models(rank: int) -> None:
    """DDP cuts the graph at its buckets; the hook and the clusters do not notice."""
    for clusters in (None, K):
        grads = []
        for compiles in (False, True):
            torch._dynamo.reset()
            ddp = DDP(model(lambda: MLP(400)), bucket_cap_mb=1)  # two buckets
            options: dict[str, Any] = {"queue_length": LENGTH, "backend": "torch"}
            if clusters:
                options |= {"n_clusters": K, "features": "features"}
            state = register(ddp, **options, **EXTRA)
            module = torch.compile(ddp, backend="aot_eager") if compiles else ddp
            for step in range(LENGTH + 2):
                ddp.zero_grad()
                loss_of(module, vectors(step, rank)).backward()
                agree(state)
                grads.append([p.grad.clone() for p in ddp.parameters()])
        half = len(grads) // 2
        torch.testing.assert_close(grads[:half], grads[half:], rtol=1e-11, atol=1e-13)


class Live(Pair):
    """A pair whose ranks run out of batches in turn, two steps apart, from the last to rank 0."""

    def steps(self, rank: int) -> int:
        return LENGTH + 2 + 2 * (self.world - rank)

    def live(self) -> list[int]:
        return [rank for rank in range(self.world) if self.step < self.steps(rank)]

    def all(self, features: Tensor) -> Tensor:
        parts = [labels_of(self.step, r, len(self.batch(r))) + K * r for r in self.live()]
        return torch.cat(parts)


def check_join_with_uneven_inputs(rank: int) -> None:
    """A rank that has joined does not count: the gradients are those of the ranks that go on."""
    pair = Live(uneven=True)
    with pair.ddp.join():
        for step in range(pair.steps(rank)):
            pair.step = step
            for optimizer in pair.optimizers:
                optimizer.zero_grad()
            loss_of(pair.ddp, pair.batch(rank)).backward()
            loss_of(pair.twin, torch.cat([pair.batch(r) for r in pair.live()])).backward()
            pair.compare()
            for optimizer in pair.optimizers:
                optimizer.step()
    agree(pair.state)
    counts = {int(n) for n in pair.state.state_dict()["queued"].values()}
    assert counts == {pair.steps(0)}


def check_layers_frozen_in_turn(rank: int) -> None:
    """One state serves a model that is wrapped anew whenever other layers train."""
    pair = Pair(uneven=True)
    bare = pair.ddp.module
    bare.head.requires_grad_(False)
    state = GradQueueState(
        bare, n_clusters=K, features="features", clusterer=pair.mine, queue_length=LENGTH,
        backend="torch", **EXTRA,
    )  # fmt: skip
    for phase in range(4):
        for model_ in (bare, pair.twin):
            model_.head.requires_grad_(phase % 2 == 1)
            model_.features.requires_grad_(phase % 2 == 0)
        pair.ddp, pair.state = DDP(bare, bucket_cap_mb=TINY), state
        pair.ddp.register_comm_hook(state, grad_queue_hook)
        for _ in range(LENGTH + 1):
            pair.backward()
            for p, q in zip(bare.parameters(), pair.twin.parameters(), strict=True):
                if p.requires_grad:
                    torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-13)
            pair.advance()


def check_a_float16_queue_and_a_loss_scale(rank: int) -> None:
    """Gradients are unscaled before they are queued: scaled ones would overflow."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    ddp = DDP(model().float())
    state = register(
        ddp, n_clusters=1, queue_length=LENGTH, queue_dtype=torch.float16, grad_scaler=scaler,
        backend="torch", **EXTRA,
    )  # fmt: skip
    scaler.scale(loss_of(ddp, vectors(0, rank).float())).backward()
    assert {int(n) for n in state.state_dict()["queued"].values()} == {1}


def check_layers_without_clusters_and_unused_ones(rank: int) -> None:
    class Heads(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(12, 3)
            self.up = nn.ConvTranspose1d(1, 1, 1)

        def forward(self, x: Tensor, spare: bool = False) -> Tensor:
            hidden = self.up(self.features(x).relu()[:, None])[:, 0]
            return self.spare(hidden) if spare else self.head(hidden)

    torch.manual_seed(0)
    ddp = DDP(Heads().to(F64), bucket_cap_mb=TINY, find_unused_parameters=True)
    state = GradQueueState(
        ddp, n_clusters=K, features="features", queue_length=LENGTH, strict=False, backend="torch",
        clusterer=lambda features: labels_of(0, rank, len(features)), **EXTRA,
    )  # fmt: skip
    ddp.register_comm_hook(state, grad_queue_hook)
    for step in range(LENGTH + 3):
        ddp.zero_grad()
        out = ddp(vectors(step, rank), spare=step % 2 == 1 and rank == 0)
        out.square().mean().backward()
        with torch.no_grad():
            for p in ddp.parameters():
                if p.grad is not None:
                    p.sub_(p.grad, alpha=0.1)
        agree(state)
    counts = {name: int(n) for name, n in state.state_dict()["queued"].items()}
    assert counts["features.0.weight"] == counts["up.weight"] == LENGTH + 3
    assert counts["spare.weight"] == (LENGTH + 3) // 2
    assert state.metrics()["mean_weight"] != 1.0


TWO_RANKS = [
    *CHECKS,
    check_uses_and_passes,
    check_a_plain_last_layer_with_uneven_batches,
    check_modules_of_any_kind,
    check_compiled_models,
    check_join_with_uneven_inputs,
    check_layers_frozen_in_turn,
    check_a_float16_queue_and_a_loss_scale,
    check_layers_without_clusters_and_unused_ones,
]
