# Gradients exist after a backward pass, although their types allow None.
# pyright: reportOptionalMemberAccess=false, reportArgumentType=false
"""The checks of how much a rank counts in a step of several passes; see test_dist_shares.py.

A forward pass here is a view (several before one backward pass) or a micro-batch (each followed by
its backward pass). ``sizes[rank][i]`` is the number of samples of a rank's pass i.
"""

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from dist_cluster_checks import F64, LENGTH, K, labels_of
from dist_hooked import TINY, agree
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from gq_triton import GradQueue
from gq_triton.dist import register

# The names of the heads that each pass of one rank runs.
Routes = Sequence[Sequence[str]]
Sizes = Sequence[Sequence[int]]


class Routed(nn.Module):
    """A body and two heads; the mask of a head says which samples go through it."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Linear(4, 6).requires_grad_(not frozen)
        self.a, self.b = nn.Linear(6, 3), nn.Linear(6, 3)
        self.to(F64)

    def forward(self, x: Tensor, masks: dict[str, Tensor]) -> Tensor:
        hidden = self.features(x).tanh()
        return torch.stack(
            [mask[:, None] * getattr(self, head)(hidden) for head, mask in masks.items()]
        ).sum(dim=0)


class Twins:
    """A model under DDP, and its judge, the plug-in in one process that sees all samples."""

    def __init__(
        self, sizes: Sizes, routes: Sequence[Routes], *, views: bool, frozen: bool = True,
        ddp: dict[str, Any] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.sizes, self.routes, self.views = sizes, routes, views
        self.passes = len(sizes[0])
        self.step = 0
        self.due: set[int] = set()
        steps = 1 if views else self.passes
        options = {
            "queue_length": LENGTH, "backend": "torch", "accumulation_steps": steps, **options,
        }  # fmt: skip
        bare = Routed(frozen)
        self.twin = copy.deepcopy(bare)
        self.ddp = DDP(bare, **{"bucket_cap_mb": TINY, **(ddp or {})})
        self.state = register(
            self.ddp, n_clusters=K, features="features", clusterer=self.mine, **options
        )
        options.pop("shard_queue", None)
        self.judge = GradQueue(
            self.twin, n_clusters=K * self.world, features="features", clusterer=self.all, **options
        )
        self.optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (self.ddp, self.twin)]
        self.judge.attach(self.optimizers[1])

    def batch(self, rank: int, number: int) -> Tensor:
        seed = 1000 * self.step + 10 * number + rank
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.sizes[rank][number], 4, generator=generator, dtype=F64)

    def masks(self, ranks: Sequence[int], number: int) -> dict[str, Tensor]:
        """Return the mask of a pass's samples for each head that at least one sample takes."""
        parts = {
            head: [
                torch.full((self.sizes[r][number],), head in self.routes[r][number], dtype=F64)
                for r in ranks
            ]
            for head in "ab"
        }
        return {head: torch.cat(part) for head, part in parts.items() if torch.cat(part).any()}

    def mine(self, features: Tensor) -> Tensor:
        return labels_of(self.step, self.rank, len(features))

    def all(self, features: Tensor) -> Tensor:
        (number,) = [
            i for i in range(self.passes)
            if sum(sizes[i] for sizes in self.sizes) == len(features) and i in self.due
        ]  # fmt: skip
        self.due.remove(number)
        parts = [labels_of(self.step, r, self.sizes[r][number]) + K * r for r in range(self.world)]
        return torch.cat(parts)

    def losses(self, model: nn.Module, ranks: Sequence[int]) -> list[Any]:
        """Return for each pass a function that computes its loss."""

        def loss(number: int) -> Tensor:
            x = torch.cat([self.batch(rank, number) for rank in ranks])
            out = model(x, self.masks(ranks, number))
            return (out - 0.3).square().mean() / (1 if self.views else self.passes)

        return [lambda i=i: loss(i) for i in range(self.passes)]

    def backward(self) -> None:
        self.due = set(range(self.passes))
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        for model, ranks in ((self.ddp, [self.rank]), (self.twin, range(self.world))):
            losses = self.losses(model, ranks)
            if self.views:
                torch.stack([loss() for loss in losses]).sum().backward()
                continue
            *first, last = losses
            for loss in first:
                if model is self.twin:
                    loss().backward()
                else:
                    with self.ddp.no_sync():
                        loss().backward()
            last().backward()

    def run(self, steps: int = LENGTH + 3) -> None:
        """Train; assert that every step's gradients are those of the one process."""
        for _ in range(steps):
            self.backward()
            for (name, p), q in zip(
                self.ddp.module.named_parameters(), self.twin.parameters(), strict=True
            ):
                if p.requires_grad:
                    error = float((p.grad - q.grad).abs().max() / q.grad.abs().max())
                    assert error <= 1e-10, f"step {self.step} {name}: {error:.1e}"
            for optimizer in self.optimizers:
                optimizer.step()
            agree(self.state)
            self.step += 1


UNEVEN = [[8, 2], [3, 6]]
SPLIT: list[Routes] = [["a", "b"], ["a", "b"]]


def check_a_head_for_each_pass(rank: int) -> None:
    """Each parameter is reached by one pass, in which the ranks' batches differ in size."""
    for shard_queue in (False, True):
        for cap in (TINY, 25):
            for views in (False, True):
                twins = Twins(
                    UNEVEN, SPLIT, views=views, shard_queue=shard_queue, match_norm=True,
                    ddp={"bucket_cap_mb": cap, "find_unused_parameters": not views},
                )  # fmt: skip
                twins.run()
                mine, theirs = twins.state.metrics(), twins.judge.metrics()
                assert mine["mean_weight"] != 1.0
                for name in theirs.keys() - {"cluster_sizes"}:
                    assert abs(mine[name] - theirs[name]) <= 1e-9, (name, mine, theirs)


def check_a_last_layer_in_the_last_pass_only(rank: int) -> None:
    """The ranks' sizes have one ratio, so parameters that several passes reach are exact too."""
    for views in (False, True):
        routes: list[Routes] = [["a", "ab"], ["a", "ab"]]
        Twins([[8, 4], [2, 1]], routes, views=views, frozen=False).run()


def check_ranks_that_use_a_head_in_other_passes(rank: int) -> None:
    """All batches have one size: a rank counts one half in a head, whichever pass uses it."""
    routes: list[Routes] = [["a", "ab"], ["ab", "ab"]]
    twins = Twins(
        [[4, 6], [4, 6]], routes, views=False, frozen=False, ddp={"find_unused_parameters": True},
    )  # fmt: skip
    # `Twins.all` tells passes apart by their sizes. Passes of one size need another clusterer.
    twins.sizes = [[4, 4], [4, 4]]
    twins.all = lambda features: torch.cat(  # type: ignore[method-assign]
        [labels_of(twins.step, r, 4) + K * r for r in range(2)]
    )
    twins.judge._clusters.labeller.clusterer = twins.all
    twins.run()


def check_samples_count_where_several_passes_reach_a_parameter(rank: int) -> None:
    """With the law off, each rank counts by the samples of the passes that reached the parameter.

    No rank knows the others' share of a single micro-batch, so no single process is the judge.
    """
    sizes = [[8, 2], [2, 6]]
    shares = {"features": [10 / 18, 8 / 18], "a": [10 / 18, 8 / 18], "b": [2 / 8, 6 / 8]}
    routes: list[Routes] = [["a", "ab"], ["a", "ab"]]
    for cap in (TINY, 25):
        for views in (False, True):
            twins = Twins(
                sizes, routes, views=views, frozen=False, rho=1.0, ddp={"bucket_cap_mb": cap}
            )
            for _ in range(3):
                twins.backward()
                want = {name: torch.zeros_like(p) for name, p in twins.twin.named_parameters()}
                alone = copy.deepcopy(twins.ddp.module)
                for r in range(2):
                    alone.zero_grad()
                    for loss in twins.losses(alone, [r]):
                        loss().backward()
                    for name, p in alone.named_parameters():
                        want[name] += shares[name.partition(".")[0]][r] * p.grad
                for name, p in twins.ddp.module.named_parameters():
                    torch.testing.assert_close(p.grad, want[name], rtol=1e-12, atol=1e-14)


class Past(nn.Module):
    """The head is used past its layer: its gradient is that of one cluster on each rank."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.features(x).tanh()
        return nn.functional.linear(hidden, self.head.weight, self.head.bias)


def check_a_parameter_of_one_cluster_counts_a_rank_once(rank: int) -> None:
    """However many clusters the rank's other parameters have: ``p = n**a`` of its batch."""
    torch.manual_seed(0)
    model = Past().to(F64)
    twin, batches = copy.deepcopy(model), torch.randn(2, 4, 3, dtype=F64)
    ddp = DDP(model)
    state = register(
        ddp, n_clusters=4, features="features", population_power=0.0, rho=1.0,
        clusterer=lambda features: torch.arange(4) * rank,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "weighted without clusters")
        ddp(batches[rank]).square().mean().backward()
    twin(batches.flatten(0, 1)).square().mean().backward()
    torch.testing.assert_close(model.head.weight.grad, twin.head.weight.grad, rtol=1e-10, atol=0)
    del state


CHECKS = [
    check_a_parameter_of_one_cluster_counts_a_rank_once,
    check_a_head_for_each_pass,
    check_a_last_layer_in_the_last_pass_only,
    check_ranks_that_use_a_head_in_other_passes,
    check_samples_count_where_several_passes_reach_a_parameter,
]


def run_strictly(rank: int, check: Callable[[int], None]) -> None:
    """Run a check that must not warn: its passes are as many as ``accumulation_steps``."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(rank)
