"""The checks of the queue in slices that every rank runs; see test_dist_shard.py.

Most checks train twice, with the whole queue on every rank and with slices, and compare. With two
ranks a sum has one order, and everything is equal bit for bit. With more ranks the models are
float64.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dist_hooked import LENGTH, TINY, agree, descend, hooked, queued, train
from dist_models import MixedTypes, TwoHeads, batch, convolutions, images, mlp, wide_batch, wide_mlp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils._python_dispatch import TorchDispatchMode

from gq_triton.dist import GradQueueState
from gq_triton.dist.routes.cuts import cut

Run = Callable[[DDP, GradQueueState], None]


def sliced(
    model: nn.Module, options: dict[str, Any] | None = None, **ddp_options: Any
) -> tuple[DDP, GradQueueState]:
    return hooked(model, {"shard_queue": True, **(options or {})}, **ddp_options)


def both(
    build: Callable[[], nn.Module],
    run: Run,
    options: dict[str, Any] | None = None,
    *,
    exact: bool = True,
    **ddp_options: Any,
) -> tuple[GradQueueState, GradQueueState]:
    """Assert that ``run`` ends the same with a whole queue and with slices; return the states."""
    exact = exact and dist.get_world_size() == 2
    ends = []
    for shard_queue in (False, True):
        given = {**(options or {}), "shard_queue": shard_queue}
        ddp, state = hooked(build(), given, **ddp_options)
        run(ddp, state)
        ends.append((ddp, state, state.digest(), state.metrics(), state.state_dict()))
    (ddp, state, digest, metrics, whole), (other, parts, other_digest, other_metrics, pieces) = ends
    rtol = 0.0 if exact else 1e-10
    for a, b in zip(ddp.parameters(), other.parameters(), strict=True):
        close(b, a, rtol)
        close(b.grad, a.grad, rtol)
    assert pieces["queue"].keys() == whole["queue"].keys()
    for name, ring in whole["queue"].items():
        assert pieces["queue"][name].dtype == ring.dtype
        assert pieces["queue"][name].stride() == ring.stride(), "another memory order"
        close(pieces["queue"][name], ring, rtol)
    assert queued(state) == queued(parts)
    assert pieces["buckets"] == whole["buckets"]
    assert digest == other_digest or not exact
    assert other_metrics == pytest.approx(metrics, rel=1e-12)
    agree(parts)
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, other_metrics)
    assert all(of_rank == other_metrics for of_rank in everywhere)
    return state, parts


def close(actual: Tensor | None, expected: Tensor | None, rtol: float) -> None:
    """Compare, with ``rtol`` relative to the largest element: sums of other orders may cancel."""
    assert (actual is None) == (expected is None)
    if actual is not None and expected is not None:
        size = max(expected.detach().nan_to_num(0, 0, 0).abs().flatten().tolist(), default=0.0)
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * size, equal_nan=True)


def steps(count: int, data: Callable[[int, int], Tensor] = wide_batch, **forward: Any) -> Run:
    return lambda ddp, state: train(ddp, None, range(count), data, **forward)


def check_same_as_whole(rank: int) -> None:
    variants: list[dict[str, Any]] = [
        dict(bucket_cap_mb=TINY),
        dict(bucket_cap_mb=25, gradient_as_bucket_view=True),
    ]
    if dist.get_world_size() == 2:
        # They decide when DDP makes its buckets, whatever the number of ranks that share each.
        variants += [
            dict(bucket_cap_mb=TINY, static_graph=True),
            dict(bucket_cap_mb=TINY, find_unused_parameters=True),
        ]
    for variant in variants:
        state, parts = both(wide_mlp, steps(6), **variant)
        assert state.metrics()["mean_weight"] != 1
        assert_divided(parts)
    both(convolutions, steps(6, images))
    both(wide_mlp, steps(6), {"match_norm": True}, exact=False)
    if dist.get_world_size() == 2:
        both(wide_mlp, steps(6), {"rho": 1.0})
        for static_graph in (False, True):
            both(MixedTypes, steps(6, batch), {"verify_every": 1}, static_graph=static_graph)
        both(lambda: mlp(torch.bfloat16), steps(6, half_batch))
        for queue_dtype in (torch.bfloat16, "float8"):
            both(mlp, steps(6, batch), {"queue_dtype": queue_dtype})


def half_batch(step: int, rank: int) -> Tensor:
    return batch(step, rank, torch.bfloat16)


def assert_divided(state: GradQueueState) -> None:
    """Assert that the ranks together hold the queue once, and each its share of every bucket."""
    world, numels = dist.get_world_size(), {n: p.numel() for n, p in state.queues.params.items()}
    here = sum(ring.untyped_storage().nbytes() for ring in state.queues._queue.values())
    rings = state.queues._queue.values()
    size = next(len(ring) * ring.element_size() for ring in rings)
    buckets = [sum(numels[name] for name in names) for names in state.state_dict()["buckets"]]
    assert here <= size * sum(-(-numel // world) for numel in buckets)
    total = torch.tensor(here)
    dist.all_reduce(total)
    assert int(total) == size * sum(numels.values())


class Wire(TorchDispatchMode):
    """A count of the bytes that this rank's collectives send, times the ranks, on a ring.

    An all-reduce of n bytes sends ``2 (W - 1) / W * n``, an all-to-all and an all-gather
    ``(W - 1) / W * n``. The mode sees the operators of c10d, also those that DDP calls from C++.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gradients = 0
        self.votes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.__name__.split(".")[0]
            size = sum(t.nbytes for t in (args[0] if isinstance(args[0], list) else [args[0]]))
            world = dist.get_world_size()
            trips = {"allreduce_": 2, "alltoall_base_": 1, "_allgather_base_": 1}[name]
            floating = (args[0][0] if isinstance(args[0], list) else args[0]).is_floating_point()
            bytes_sent = trips * (world - 1) * size
            self.gradients += bytes_sent if floating else 0
            self.votes += 0 if floating else bytes_sent
        return func(*args, **(kwargs or {}))


def bytes_of_a_step(ddp: DDP, data: Callable[[int], Tensor]) -> Wire:
    """Return what a step sends after DDP has rebuilt its buckets and the slices have moved."""
    for step in range(LENGTH + 2):
        ddp(data(step)).square().mean().backward()
    loss = ddp(data(LENGTH + 2)).square().mean()
    with Wire() as wire:
        loss.backward()
    return wire


def check_bytes_on_the_wire(rank: int) -> None:
    """Slices send as much as plain DDP, plus padding and a byte per parameter that is cut."""
    rest = dist.get_world_size() - 1
    torch.manual_seed(0)
    # Every bucket of this model divides by 2, 3 and 4.
    even = nn.Sequential(nn.Linear(23, 24), nn.Tanh(), nn.Linear(24, 12, bias=False))
    for model, width, padded in ((even, 23, False), (mlp(), 6, True)):

        def data(step: int, width: int = width) -> Tensor:
            return batch(step, rank).repeat(1, 4)[:, :width]

        plain = bytes_of_a_step(DDP(copy.deepcopy(model), bucket_cap_mb=TINY), data)
        whole = bytes_of_a_step(hooked(copy.deepcopy(model))[0], data)
        ddp, state = sliced(copy.deepcopy(model))
        parts = bytes_of_a_step(ddp, data)
        buckets = len(state.state_dict()["buckets"])
        assert buckets > 1
        assert (whole.gradients, whole.votes) == (plain.gradients, 0)
        # Two trips of at most W - 1 elements of 4 bytes, and two of as many votes of 1 byte.
        extra = parts.gradients - plain.gradients
        assert 0 <= extra <= 2 * rest * 4 * rest * buckets * padded
        assert 0 < parts.votes <= 2 * rest * rest * buckets


def check_not_finite_in_one_slice(rank: int) -> None:
    """One bad element on one rank: the whole parameter passes unweighted on all ranks."""
    for position in (0, -1):
        for find_unused in (False, True):

            def run(ddp: DDP, state: GradQueueState, position: int = position) -> None:
                train(ddp, None, range(5), wide_batch)
                weight = ddp.module.get_parameter("2.weight")

                def spoil(grad: Tensor) -> Tensor:
                    grad = grad.clone()
                    if dist.get_rank() == 1:
                        grad.view(-1)[position] = torch.nan
                    return grad

                handle = weight.register_hook(spoil)
                ddp.zero_grad()
                ddp(wide_batch(5, rank)).square().mean().backward()
                handle.remove()
                assert weight.grad is not None
                assert int(weight.grad.isnan().sum()) == 1
                assert queued(state)["2.weight"] == 5
                assert queued(state)["2.bias"] == 6
                # The gradients that were queued before it are still there.
                train(ddp, None, range(6, 7), wide_batch)

            def only_grads(ddp: DDP, state: GradQueueState, run: Run = run) -> None:
                run(ddp, state)
                assert queued(state)["2.weight"] == 6

            both(wide_mlp, only_grads, find_unused_parameters=find_unused)


def check_zeros(rank: int) -> None:
    """A gradient that is zero throughout is skipped; one that is zero in a slice is not."""

    def run(ddp: DDP, state: GradQueueState) -> None:
        train(ddp, None, range(5), wide_batch)
        train(ddp, None, range(5, 7), wide_batch, right=False)
        assert queued(state)["right.weight"] == 5
        train(ddp, None, range(7, 8), wide_batch, right=dist.get_rank() == 0)
        assert queued(state)["right.weight"] == 6
        # Keep one rank's part of a parameter that is cut, and make the other parts zero.
        name, position = a_cut_parameter(ddp, state)
        param = ddp.module.get_parameter(name)
        first = (torch.arange(param.numel()) < position).view_as(param)
        expected = queued(state)[name] + 2
        handle = param.register_hook(lambda grad: grad * first)
        train(ddp, None, range(8, 10), wide_batch)
        handle.remove()
        assert queued(state)[name] == expected

    both(lambda: TwoHeads().double(), run, find_unused_parameters=True)


def a_cut_parameter(ddp: DDP, state: GradQueueState) -> tuple[str, int]:
    """Return a parameter that is cut after the first rank's part, and the size of that part."""
    for names in state.state_dict()["buckets"]:
        numels = tuple(ddp.module.get_parameter(name).numel() for name in names)
        cuts = cut(numels, dist.get_world_size())
        for name, edges in zip(names, cuts, strict=True):
            if 0 < edges[1] < edges[-1]:
                return name, edges[1]
    raise AssertionError("no parameter is cut")


def check_no_sync_and_scaler(rank: int) -> None:
    def accumulate(ddp: DDP, state: GradQueueState) -> None:
        for step in range(6):
            ddp.zero_grad()
            with ddp.no_sync():
                ddp(batch(2 * step, rank)).square().mean().backward()
            ddp(batch(2 * step + 1, rank)).square().mean().backward()
            descend(ddp)
        assert set(queued(state).values()) == {6}

    both(mlp, accumulate)

    def scaled(ddp: DDP, state: GradQueueState) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        state.grad_scaler = scaler
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.3)
        for step in range(9):
            optimizer.zero_grad()
            loss = scaler.scale(ddp(batch(step, rank)).square().mean())
            if step == 6 and rank == 1:
                loss = loss * torch.inf
            loss.backward()
            scaler.step(optimizer)
            scaler.update()
        assert set(queued(state).values()) == {8}

    both(mlp, scaled)


def check_join_and_losses(rank: int) -> None:
    options = dict(verify_every=1, loss_window=1, min_queue_length=1)

    def run(ddp: DDP, state: GradQueueState) -> None:
        with ddp.join():
            for step in range(8 - 3 * rank):
                ddp.zero_grad()
                loss = ddp(batch(step, rank)).square().mean()
                state.record_loss(loss)
                loss.backward()
                descend(ddp)
        assert set(queued(state).values()) == {8}
        ddp.zero_grad()

    both(mlp, run, options)


def check_tiny_parameters(rank: int) -> None:
    """Buckets with fewer elements than ranks, and a parameter without any."""

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body, self.empty = nn.Linear(6, 1).double(), nn.Parameter(torch.ones(0).double())
            self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * self.body(x) + self.empty.sum()

    for cap in (1e-6, 25):
        ddp, state = hooked(Small(), bucket_cap_mb=cap)
        other, parts = sliced(Small(), bucket_cap_mb=cap)
        for pair in ((ddp, state), (other, parts)):
            train(*pair, range(6), wide_batch)
        for a, b in zip(ddp.parameters(), other.parameters(), strict=True):
            close(b, a, 1e-10)
        assert parts.metrics() == pytest.approx(state.metrics())
        mine, theirs = parts.metrics(per_layer=True), state.metrics(per_layer=True)
        assert set(mine) == {"body.weight", "body.bias", "scale"}
        for name, figures in theirs.items():
            assert mine[name] == pytest.approx(figures), name
        assert repr(state).endswith(f"; Small in DDP on {dist.get_world_size()} ranks)")
