"""Clusters of every rank's own samples, the queue in slices, one of which each rank keeps.

A rank that weights its own centroids compares them with the statistics of every element. With the
queue in slices each rank computes the statistics of its slice, after queueing, and all slices'
statistics are gathered while training goes on. They are the mean and 1 / sigma, two numbers per
element instead of L.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import xor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future

from gq_triton.dist.buckets import BucketBuffers
from gq_triton.dist.collectives import completed, reduce_scatter, start_all_gather
from gq_triton.dist.routes.base import Context, Route
from gq_triton.dist.routes.clustered import ClusteredRoute
from gq_triton.dist.routes.local import LocalClusters
from gq_triton.dist.routes.sliced import Sliced, SlicedQueues
from gq_triton.dist.shares import Shares
from gq_triton.engines import engine
from gq_triton.float8 import convert
from gq_triton.law import square_norm
from gq_triton.options import ClusterOptions, LawOptions
from gq_triton.queues import sha
from gq_triton.ring import flat, in_use

__all__ = ["ClusteredSliced", "ClusteredSlices"]


class ClusteredSlices(SlicedQueues):
    """``SlicedQueues`` of parameters that each rank weights by its own clusters.

    In addition to its slice of the rings every rank holds the statistics of all rings, ``(2, P)``
    per parameter in float32 (float64 where the parameter or the queue is). They arrive bucket by
    bucket while the optimizer and the next forward pass run.

    Args:
        params: the model's parameters by name.
        group: returns the process group.
        options: the options of the law.
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
        self._buffers = BucketBuffers()

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
            shares: makes means of the added gradients.
            length: effective length of the next step, or None for L.
            grad_scale: the loss scale that the means carry, or None.
            skip_zeros: whether a parameter whose mean is zero throughout is left alone.

        Returns:
            ``(N, 2)`` float64: the squared norm of each mean over this rank's slice, and over the
            whole parameter. Without ``match_norm`` the second equals the first.
        """
        self._settle(names)
        held, means = self._held(names, part)
        shares.correct_(held, means, 1)
        accept = self._accepted(names, held, means, part.device, skip_zeros)
        ops = engine(part.device, self.options.backend)
        squares = torch.zeros(len(names), dtype=torch.float64, device=part.device)
        places = {name: index for index, name in enumerate(names)}
        queues, queued = self._flat_rings(held)
        ops.push_(means, queues, queued, accept, grad_scale=grad_scale)
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
        """Compute the statistics of this rank's slice and start to gather those of all slices."""
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
        table = self._buffers.get(names, lambda: mine.new_empty(2, size * world))
        works = [start_all_gather(part, row, group) for part, row in zip(mine, table, strict=True)]
        numels = [self.params[name].numel() for name in names]
        pieces = table[:, : sum(numels)].split(numels, dim=1)
        for name, piece in zip(names, pieces, strict=True):
            self._known[name], self._arriving[name] = piece, works

    def _wide(self, name: str) -> torch.dtype:
        """Return the type in which a parameter is compared with its ring."""
        wide = torch.promote_types(self._stored_type(name), self.params[name].dtype)
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
        ring = convert(ring, self._stored_type(name))
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
        """Return digests of what all ranks must hold alike, with the statistics; a collective."""
        digests = super().shared_digests()
        for name, known in self._known.items():
            if name not in self._cuts:
                # The statistics of a loaded ring that is not placed yet: a rank computes them only
                # where one of its gradients needs them.
                continue
            self._settle([name])
            digests[name] = bytes(map(xor, digests[name], sha(name, known)))
        return digests

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a saved state with whole rings; forget the statistics of the rings before.

        Raises:
            ValueError: the state belongs to another model or to other options. Nothing is changed.
        """
        super().load_state_dict(state)
        self._settle(list(self._arriving))
        self._known.clear()
        self._buffers = BucketBuffers()


class ClusteredSliced(ClusteredRoute, Sliced):
    """The route that adds up weighted gradients; each rank queues its slice of the raw means.

    Parameters without clusters form a second bucket, which is weighted as on the route ``Sliced``.

    Args:
        context: what the route knows of the state.
        model: the bare model.
        params: the model's parameters by name.
        law: how gradients are queued and weighted.
        clusters: how each rank clusters its samples.
    """

    def __init__(
        self,
        context: Context,
        model: nn.Module,
        params: Mapping[str, Tensor],
        law: LawOptions,
        clusters: ClusterOptions,
    ) -> None:
        slices = ClusteredSlices(params, lambda: context.group, law)
        Route.__init__(self, context, slices)
        self.local = LocalClusters(context, model, slices, clusters, self.take_loss)
        slices.clustered = self.local.covered
        self._slices = slices

    @torch.no_grad()
    def start(self, names: tuple[str, ...], buffer: Tensor) -> Future:
        """Start to add up weighted gradients; queue the slices of the raw ones."""
        clustered = tuple(name for name in names if name in self.local.covered)
        if not clustered:
            self.even_(buffer)
            return self.add_up(names, buffer, self.by_slices)
        split = self.context.buckets.split
        shares = self.local.shares(clustered, buffer.device)
        self.local.scale_(names, split(names, buffer), shares)
        slices = dict(zip(names, split(names, buffer), strict=True))
        plain = tuple(name for name in names if name not in self.local.covered)
        others = torch.cat([slices[name] for name in plain]) if plain else buffer[:0]
        reduced = self.add_up(names, buffer, self.all_reduce)
        squares: dict[str, Tensor] = {}
        raw = self.local.raw_bucket(clustered, buffer, shares)
        self.add_up(clustered, raw, partial(self._queue_slices, shares, squares))
        weighed = self.add_up(plain, others, self.by_slices) if plain else None

        @torch.no_grad()
        def finish(done: Future) -> Tensor:
            done.value()  # raises what the reduction raised
            with self.context.alone(buffer.device):
                self._note(clustered, [slices[name] for name in clustered], squares, shares)
                for name, piece in zip(plain, split(plain, others), strict=True):
                    slices[name].copy_(piece)
                in_use(others)
            return buffer

        if weighed is not None:
            weighed.wait()
        return reduced.then(finish)

    @torch.no_grad()
    def _queue_slices(
        self, shares: Shares, squares: dict[str, Tensor], names: tuple[str, ...], raw: Tensor
    ) -> Future:
        """Add raw gradients up over the ranks, each rank its slice, and queue those.

        Args:
            shares: the shares of this rank.
            squares: filled with the squared norms by name.
            names: the clustered parameters.
            raw: their raw gradients on this rank, flat.
        """
        context = self.context
        # The lock is not taken: a callback may wait for it in a thread that this exchange needs. No
        # callback touches the slices, so none is needed.
        with context.streams.after_current(raw.device, wait=False):
            part = reduce_scatter(raw, context.group)
            norms = self._slices.push_slice(
                names, part, shares=shares,
                length=self.queues.effective_length(raw.device, context.losses.peek()),
                grad_scale=context.loss_scale(raw.device), skip_zeros=context.skips_zeros,
            )  # fmt: skip
            squares.update(zip(names, norms, strict=True))
            in_use(raw)
        return completed(raw)

    def _note(
        self,
        names: Sequence[str],
        grads: Sequence[Tensor],
        squares: Mapping[str, Tensor],
        shares: Shares,
    ) -> None:
        """Finish weighted gradients and keep their statistics, after ``push_slice``.

        Args:
            names: the clustered parameters.
            grads: their weighted gradients added up over all ranks, flat. Here they become means,
                with ``match_norm`` of the raw norm.
            squares: what ``push_slice`` returned, by name.
            shares: the shares of this rank.
        """
        shares.correct_(names, grads, 0)
        scale = self.context.loss_scale(grads[0].device)
        tables = []
        for name, grad in zip(names, grads, strict=True):
            mine, whole = squares[name]
            # Each rank counts the norms of its slice: metrics() adds the ranks up.
            part = grad[slice(*self.queues.bounds(name))]
            table = self.local.table(name, mine, square_norm(part, scale), shares)
            if self.queues.options.match_norm:
                self.local.match_norm_(grad, table, whole, square_norm(grad, scale))
            tables.append(table)
        self.queues._keep_statistics(tuple(names), torch.cat(tables))
