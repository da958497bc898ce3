"""One cluster over the global batch, the queue in slices, one of which each rank keeps."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from gq_triton.dist.collectives import all_gather, reduce_scatter
from gq_triton.dist.routes.base import Context, Route
from gq_triton.dist.routes.cuts import common, copy_where_held, cut, holders
from gq_triton.engines import engine
from gq_triton.float8 import convert, ring_rows
from gq_triton.law import accepted, all_zero, match_norm_
from gq_triton.options import LawOptions
from gq_triton.queues import LOSSES, Queues
from gq_triton.ring import flat, in_use, new_queue, rows

__all__ = ["Sliced", "SlicedQueues"]


class SlicedQueues(Queues):
    """``Queues`` whose rings are divided among the ranks of a group, bucket by bucket.

    A rank holds the rings of the elements that ``reduce_scatter`` gives it. They are the end of a
    parameter that begins in an earlier rank's slice, some whole parameters, and the beginning of
    one that ends in a later rank's slice. Cuts are kept by parameter name. When DDP cuts its
    buckets anew the slices move between the ranks, once, and nothing is forgotten.

    The ranks agree on what concerns a whole parameter: whether its gradient is finite, or zero
    throughout (one byte per parameter that is cut, at most W - 1 per bucket), and with
    ``match_norm`` its norms (16 bytes per such parameter). ``metrics``, ``digest`` and
    ``state_dict`` are collectives: every rank must call.

    Args:
        params: the model's parameters by name.
        group: returns the process group, asked whenever it is needed; None is the default one.
        options: the options of the law.
    """

    whole = False

    def __init__(
        self,
        params: Mapping[str, Tensor],
        group: Callable[[], dist.ProcessGroup | None],
        options: LawOptions,
    ) -> None:
        super().__init__(params, options)
        self._group = group
        # The cuts of every placed parameter. A ring without cuts was loaded, and is whole.
        self._cuts: dict[str, tuple[int, ...]] = {}
        self._ranks: list[int] = []

    def weigh_slice_(
        self,
        names: Sequence[str],
        part: Tensor,
        *,
        grad_scale: Tensor | None = None,
        skip_zeros: bool = False,
    ) -> None:
        """Weight this rank's slice of a bucket in place and queue the raw one; a collective.

        Args:
            names: the parameters of the whole bucket, in its order.
            part: the slice of the averaged gradients, ``(ceil(n / W),)``.
            grad_scale: the loss scale that the gradients carry, or None.
            skip_zeros: whether a parameter whose gradient is zero throughout is left alone.
        """
        held, grads = self._held(names, part)
        accept = self._accepted(names, held, grads, part.device, skip_zeros)
        statistics = torch.zeros(0, 5, dtype=torch.float64, device=part.device)
        if held:
            statistics = self._weigh_rings(held, grads, accept, grad_scale).to(part.device)
        if self.options.match_norm:
            self._match_norms(names, held, grads, statistics)
        self._keep_statistics(tuple(names), statistics, held)

    def _held(self, names: Sequence[str], part: Tensor) -> tuple[list[str], list[Tensor]]:
        """Place a bucket; return the names of which this rank holds a part, and the parts."""
        self.place(names)
        sizes = {name: len(range(*self.bounds(name))) for name in names}
        held = [name for name in names if sizes[name]]
        return held, list(part[: sum(sizes.values())].split([sizes[name] for name in held]))

    def bounds(self, name: str) -> tuple[int, int]:
        """Return the first element of a placed parameter held here, and the one after the last."""
        rank = dist.get_rank(self._group())
        return self._cuts[name][rank], self._cuts[name][rank + 1]

    def _accepted(
        self,
        names: Sequence[str],
        held: Sequence[str],
        grads: list[Tensor],
        device: torch.device,
        skip_zeros: bool,
    ) -> Tensor:
        """Return which slices held here are weighted and queued: ``(N,)`` bool; a collective."""
        finite = torch.ones(0, dtype=torch.bool, device=device)
        absent = None
        if held:
            finite = engine(device, self.options.backend).all_finite(grads)
            absent = all_zero(grads) if skip_zeros else None

        def least(votes: Tensor) -> Tensor:
            shared = self._shared(names, held)
            if shared:
                all_votes = torch.full((len(shared),), 2, dtype=torch.uint8, device=device)
                copy_where_held(all_votes, votes, shared, to_held=False)
                dist.all_reduce(all_votes, dist.ReduceOp.MIN, group=self._group())
                copy_where_held(all_votes, votes, shared, to_held=True)
            return votes

        return accepted(finite, absent=absent, least=least)

    def _match_norms(
        self,
        names: Sequence[str],
        held: Sequence[str],
        grads: list[Tensor],
        statistics: Tensor,
    ) -> None:
        """Rescale the slices by the norms of the whole parameters."""
        norms = statistics[:, :2].clone()
        shared = self._shared(names, held)
        if shared:
            sums = norms.new_zeros(len(shared), 2)
            copy_where_held(sums, norms, shared, to_held=False)
            dist.all_reduce(sums, group=self._group())
            copy_where_held(sums, norms, shared, to_held=True)
        match_norm_(grads, statistics, norms)

    def _shared(self, names: Sequence[str], held: Sequence[str]) -> list[int | None]:
        """Return the place in ``held``, or None, of each parameter that several ranks hold."""
        places = {name: index for index, name in enumerate(held)}
        several = [name for name in names if holders(self._cuts[name]) > 1]
        return [places.get(name) for name in several]

    def place(self, names: Sequence[str]) -> None:
        """Give each rank its slice of a bucket; a collective.

        Where the cuts have changed, the slices move between the ranks. Nothing is sent where they
        have not, nor for a loaded ring, which every rank has whole.

        Raises:
            RuntimeError: the process group is no longer the one that holds the slices.
        """
        group = self._group()
        world, ranks = dist.get_world_size(group), dist.get_process_group_ranks(group)
        if self._cuts and ranks != self._ranks:
            raise RuntimeError(
                f"the queue lies in slices on ranks {self._ranks} and the process group has become "
                f"{ranks}: load the last saved state into the new group"
            )
        self._ranks = ranks
        numels = tuple(self.params[name].numel() for name in names)
        cuts = dict(zip(names, cut(numels, world), strict=True))
        moving = [name for name in names if self._cuts.get(name, cuts[name]) != cuts[name]]
        new = [name for name in names if name not in self._cuts]
        if moving:
            self._move(moving, cuts)
        for name in new:
            self._cut(name, cuts[name])
        if moving or new:
            self._cuts.update(cuts)

    def _cut(self, name: str, cuts: tuple[int, ...]) -> None:
        """Keep this rank's slice of a loaded ring, or begin an empty one."""
        rank, param = dist.get_rank(self._group()), self.params[name]
        slots = slice(cuts[rank], cuts[rank + 1])
        ring = self._new_ring(name, cuts)
        whole, queued = self._queue.get(name), self._queued.get(name)
        if whole is not None:
            parts = torch.stack([flat(loaded, like=param)[slots] for loaded in whole])
            ring.copy_(convert(parts, ring.dtype))
        if queued is None:
            queued = torch.zeros((), dtype=torch.int64)
        self._hold(name, ring, queued)

    def _move(self, names: Sequence[str], cuts: Mapping[str, tuple[int, ...]]) -> None:
        """Exchange slices between the ranks until those of ``names``, of one type, fit ``cuts``."""
        group = self._group()
        world, rank = dist.get_world_size(group), dist.get_rank(group)
        counts = self._counts(names)
        like = self._new_ring(names[0], (0,) * (world + 1)).view(-1)
        outgoing = [
            [
                self._queue[name][:, a - self._cuts[name][rank] : b - self._cuts[name][rank]]
                for name in names
                for a, b in common(self._cuts[name], rank, cuts[name], other)
            ]
            for other in range(world)
        ]
        rings = {name: self._new_ring(name, cuts[name]) for name in names}
        incoming = [
            [
                rings[name][:, a - cuts[name][rank] : b - cuts[name][rank]]
                for name in names
                for a, b in common(self._cuts[name], other, cuts[name], rank)
            ]
            for other in range(world)
        ]
        send = torch.cat([like, *(piece.reshape(-1) for part in outgoing for piece in part)])
        splits = [[sum(p.numel() for p in part) for part in way] for way in (incoming, outgoing)]
        received = send.new_empty(sum(splits[0]))
        dist.all_to_all_single(received, send, *splits, group=group)
        pieces = [piece for part in incoming for piece in part]
        for piece, values in zip(pieces, received.split([p.numel() for p in pieces]), strict=True):
            piece.copy_(values.view(piece.shape))
        for index, name in enumerate(names):
            self._hold(name, rings[name], counts[index])

    def _new_ring(self, name: str, cuts: tuple[int, ...]) -> Tensor:
        """Return an empty ring for this rank's slice of a parameter: ``(L, elements)``."""
        rank, param = dist.get_rank(self._group()), self.params[name]
        dtype = self._stored_type(name)
        size = ring_rows(self.options.queue_length, dtype), cuts[rank + 1] - cuts[rank]
        return torch.zeros(size, dtype=dtype, device=param.device)

    def _hold(self, name: str, ring: Tensor, queued: Tensor) -> None:
        """Keep a ring and its counter; keep neither where the ring has no elements."""
        counter = queued.to(ring.device, copy=True)
        for earlier in (self._queue.pop(name, None), self._queued.pop(name, None)):
            if earlier is not None:
                in_use(earlier)  # the hook's stream may still read it
        if ring.numel():
            self._queue[name], self._queued[name] = ring, counter

    def _allocate(self, name: str) -> None:
        """Allocate nothing: ``place``, which knows the bucket, does."""

    def _counts(self, names: Sequence[str]) -> Tensor:
        """Return how many gradients each placed parameter has taken, ``(N,)``; a collective."""
        device = next(iter(self.params.values())).device
        counts = torch.zeros(len(names), dtype=torch.int64, device=device)
        for index, name in enumerate(names):
            if name in self._queued:
                counts[index].copy_(self._queued[name])
        dist.all_reduce(counts, dist.ReduceOp.MAX, group=self._group())
        return counts

    def _over_ranks(self, table: Tensor) -> Tensor:
        dist.all_reduce(table, group=self._group())
        return table

    def _rings(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield every whole ring and its counter by name, on the CPU; a collective.

        One parameter is gathered at a time, so that no device ever holds the whole queue.
        """
        placed = list(self._cuts)
        counts = (
            dict(zip(placed, self._counts(placed).cpu().unbind(), strict=True)) if placed else {}
        )
        for name, param in self.params.items():
            if name in counts:
                yield name, self._gather(name), counts[name]
            elif name in self._queue:
                yield name, self._queue[name], self._queued[name]
            elif param.requires_grad:
                yield name, self._empty(name), torch.zeros((), dtype=torch.int64)

    def _empty(self, name: str) -> Tensor:
        row = torch.empty_like(self.params[name], device="cpu", memory_format=torch.preserve_format)
        return new_queue(row, self.options.queue_length, self.options.queue_dtype)

    def _gather(self, name: str) -> Tensor:
        """Return the whole ring of a parameter ``(L, *param.shape)``, on the CPU."""
        cuts, param, group = self._cuts[name], self.params[name], self._group()
        lengths = [b - a for a, b in pairwise(cuts)]
        dtype = self._stored_type(name)
        size = ring_rows(self.options.queue_length, dtype), max(lengths)
        part = torch.zeros(size, dtype=dtype, device=param.device)
        if name in self._queue:
            part[:, : self._queue[name].shape[1]].copy_(self._queue[name])
        gathered = part.new_empty(len(lengths) * part.numel())
        all_gather(part.view(-1), gathered, group).wait()
        whole = self._empty(name)
        parts = gathered.cpu().view(len(lengths), *part.shape)
        columns = [part[:, :length] for part, length in zip(parts, lengths, strict=True)]
        rows(whole).copy_(torch.cat(columns, dim=1))
        return whole

    def shared_digests(self) -> dict[str, bytes]:
        """Return digests of what all ranks must hold alike; a collective.

        No other rank has a copy of a slice. What can be compared is where each parameter is cut,
        how many gradients it has taken, and the losses.
        """
        names = list(self.params)
        digests = {}
        for name, count in zip(names, self._counts(names).tolist(), strict=True):
            mine = int(self._queued[name]) if name in self._queued else count
            place = name, self._cuts.get(name), mine
            digests[name] = hashlib.sha256(repr(place).encode()).digest()
        losses = b"" if self._losses is None else repr(self._losses.tolist()).encode()
        digests[LOSSES] = hashlib.sha256(losses).digest()
        return digests

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a saved state with whole rings; ``place`` then keeps this rank's part of them.

        Raises:
            ValueError: the state belongs to another model or to other options. Nothing is changed.
        """
        super().load_state_dict(state)
        self._cuts.clear()


class Sliced(Route):
    """The route of a bucket that is reduce-scattered, weighted slice by slice, and gathered.

    Args:
        context: what the route knows of the state.
        params: the model's parameters by name.
        law: how gradients are queued and weighted.
    """

    communicates = True
    queues: SlicedQueues

    def __init__(self, context: Context, params: Mapping[str, Tensor], law: LawOptions) -> None:
        super().__init__(context, SlicedQueues(params, lambda: context.group, law))

    def start(self, names: tuple[str, ...], buffer: Tensor) -> Future:
        """Start to weight a bucket; see ``Route.start``."""
        self.even_(buffer)
        return self.add_up(names, buffer, self.by_slices)

    @torch.no_grad()
    def by_slices(self, names: tuple[str, ...], buffer: Tensor) -> Future:
        """Add a bucket up over the ranks and weight it, slice by slice; start to gather the slices.

        The caller's thread does all work but the gathering, or gives it to the stream, before this
        method returns: so all ranks issue their collectives in the same order.
        """
        context = self.context
        with context.alone(buffer.device, wait=False):
            self.before_weighing()
            part = reduce_scatter(buffer, context.group)
            self.queues.weigh_slice_(
                names, part, grad_scale=context.loss_scale(buffer.device),
                skip_zeros=context.skips_zeros,
            )  # fmt: skip
            return all_gather(part, buffer, context.group)

    def resume(self, state: Mapping[str, Any]) -> None:
        """Cut the loaded rings at once, so that no rank goes on with the whole queue."""
        super().resume(state)
        if self.context.ddp() is not None:
            for names in self.context.buckets.saved:
                self.queues.place(names)
