"""Clusters on every rank, the queue in slices: what a rank has to know of the others' slices.

A rank that weights its own centroids compares them with the statistics of every element. With the
queue in slices each rank computes those of its slice, after queueing, and they are gathered while
training goes on: the mean and 1 / sigma, two numbers per element instead of L.
"""

from collections.abc import Callable, Mapping, Sequence
from operator import xor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gq_triton.dist.buckets import Rooms
from gq_triton.dist.collectives import start_all_gather
from gq_triton.dist.placement import SlicedQueues
from gq_triton.dist.shares import Shares
from gq_triton.engines import engine
from gq_triton.law import square_norm
from gq_triton.options import LawOptions
from gq_triton.queues import sha
from gq_triton.ring import flat

__all__ = ["ClusteredSlices"]


class ClusteredSlices(SlicedQueues):
    """``SlicedQueues`` of parameters that each rank weights by its own clusters.

    Beside its slice of the rings every rank holds the statistics of all of them, ``(2, P)`` per
    parameter in float32 (float64 where parameter or queue is), one bucket after another. They
    arrive while the optimizer and the next forward pass run.

    Args:
        params: by name.
        group: returns the process group.
        options: of the law.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        group: Callable[[], dist.ProcessGroup | None],
        options: LawOptions,
    ) -> None:
        super().__init__(params, group, options)
        self.clustered: set[str] = set()
        self._known: dict[str, Tensor] = {}
        self._arriving: dict[str, list[dist.Work]] = {}
        # The statistics of a bucket lie side by side, as they are gathered: ``(2, padded size)``.
        self._rooms = Rooms()

    def push_slice(
        self,
        names: Sequence[str],
        part: Tensor,
        *,
        shares: Shares,
        length: Tensor | None,
        grad_scale: Tensor | None,
        skip_zeros: bool,
    ) -> Tensor:
        """Queue this rank's slice of a bucket of raw means; start to gather its statistics.

        Every rank must call.

        Args:
            names: the parameters of the whole bucket, in its order.
            part: the slice of the raw gradients added up over all ranks, ``(ceil(n / W),)``.
            shares: what makes them means.
            length: effective length of the next step, or None for L.
            grad_scale: the loss scale the means carry, or None.
            skip_zeros: whether a parameter whose mean is zero throughout is left alone.

        Returns:
            ``(N, 2)`` float64: squared norm of each mean in this rank's slice, and in all of it
            (with ``match_norm`` only, else the same).
        """
        self._settle(names)
        held, means = self._held(names, part)
        shares.correct_(held, means, 1)
        accept = self._accepted(names, held, means, part.device, skip_zeros)
        ops = engine(part.device, self.options.backend)
        squares = torch.zeros(len(names), dtype=torch.float64, device=part.device)
        places = {name: index for index, name in enumerate(names)}
        rings, counters = ([kept[n] for n in held] for kept in (self._queue, self._queued))
        ops.push_(means, rings, counters, accept, grad_scale=grad_scale)
        for name, mean in zip(held, means, strict=True):
            squares[places[name]] = square_norm(mean, grad_scale)
        self._share(names, held, part.numel(), length)
        whole = squares
        if self.options.match_norm:
            whole = squares.clone()
            dist.all_reduce(whole, group=self._group())
        return torch.stack([squares, whole], dim=1)

    def _share(
        self, names: Sequence[str], held: Sequence[str], size: int, length: Tensor | None
    ) -> None:
        """Compute the statistics of this rank's slice and start to gather all of them."""
        group, like = self._group(), self.params[names[0]]
        ops = engine(like.device, self.options.backend)
        mine = torch.zeros(2, size, dtype=self._wide(names[0]), device=like.device)
        start = 0
        for name in held:
            ring = self._queue[name]
            piece = mine[:, start : start + ring.shape[1]]
            ops.queue_statistics(ring, self._queued[name], piece, length=length)
            start += ring.shape[1]
        world = dist.get_world_size(group)
        room = self._rooms.get(names, lambda: mine.new_empty(2, size * world))
        works = [start_all_gather(part, row, group) for part, row in zip(mine, room, strict=True)]
        numels = [self.params[name].numel() for name in names]
        pieces = room[:, : sum(numels)].split(numels, dim=1)
        for name, piece in zip(names, pieces, strict=True):
            self._known[name], self._arriving[name] = piece, works

    def _wide(self, name: str) -> torch.dtype:
        """Return the type in which a parameter is compared with its ring."""
        stored = self.options.queue_dtype or self.params[name].dtype
        wide = torch.promote_types(stored, self.params[name].dtype)
        return torch.promote_types(wide, torch.float32)

    def _settle(self, names: Sequence[str]) -> None:
        """Wait for the statistics of parameters that are still on their way."""
        for name in names:
            for work in self._arriving.pop(name, ()):
                work.wait()

    def _read(self, name: str, device: torch.device) -> tuple[Tensor, Tensor | None]:
        self._settle([name])
        if name not in self._known:
            if name not in self._queue or name in self._cuts:
                # Nothing is queued yet: one row that is never read, all weights 1.
                nothing = torch.empty(1, self.params[name].numel(), device=device)
                return nothing, torch.zeros((), dtype=torch.int64, device=device)
            self._learn(name)
        return self._known[name], None

    def _learn(self, name: str) -> None:
        """Compute the statistics of a loaded ring, which is whole."""
        param, ring = self.params[name], self._queue[name].to(self.params[name].device)
        ring = torch.stack([flat(row, like=param) for row in ring])
        known = torch.empty(2, param.numel(), dtype=self._wide(name), device=param.device)
        length = self.effective_length(param.device)
        queued = self._queued[name].to(param.device)
        engine(param.device, self.options.backend).queue_statistics(
            ring, queued, known, length=length
        )
        self._known[name] = known

    def _cut(self, name: str, cuts: tuple[int, ...]) -> None:
        if name in self._queue and name in self.clustered:
            self._learn(name)
        super()._cut(name, cuts)

    def shared_digests(self) -> dict[str, bytes]:
        """Return digests of what all ranks must hold alike: also the statistics; a collective."""
        digests = super().shared_digests()
        for name, known in self._known.items():
            if name not in self._cuts:
                continue  # of a loaded ring that is not placed yet: made where a gradient needs it
            self._settle([name])
            digests[name] = bytes(map(xor, digests[name], sha(name, known)))
        return digests

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state, whole; the statistics are those of the loaded rings.

        Raises:
            ValueError: the state belongs to another model or to other options. Nothing is changed.
        """
        super().load_state_dict(state)
        self._settle(list(self._arriving))
        self._known.clear()
        self._rooms = Rooms()
