"""Clusters of every rank's own samples: weighted in its backward pass, added up over the ranks.

A rank's backward pass leaves the mean of its weighted centroids in the bucket, and the raw mean
beside it. Ranks count by their samples: W ranks with K clusters each are one process with those
W * K clusters.
"""

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gq_triton.cluster_grad import Clusters, Weigh
from gq_triton.cluster_grad.passes import in_backward
from gq_triton.dist.buckets import Rooms
from gq_triton.dist.clustered_slices import ClusteredSlices
from gq_triton.dist.shares import Shares
from gq_triton.grouping import Groups
from gq_triton.law import all_zero, match_norm_, square_norm
from gq_triton.options import ClusterOptions, LawOptions
from gq_triton.queues import Queues, in_use
from gq_triton.ring import flat
from gq_triton.saved.rules import ListOf, Record, check

if TYPE_CHECKING:
    from gq_triton.dist.state import GradQueueState

__all__ = ["ClusteredQueues", "LocalClusters"]


class ClusteredQueues(Queues):
    """The rings, the same on every rank, of parameters that each rank weights by its own clusters.

    Args:
        params: by name.
        group: returns the process group.
        options: of the law.
    """

    def __init__(
        self,
        params: Any,
        group: Callable[[], dist.ProcessGroup | None],
        options: LawOptions,
    ) -> None:
        super().__init__(params, options)
        self._group = group
        self.clustered: set[str] = set()

    def _keep_statistics(self, names: tuple[str, ...], statistics: Tensor) -> None:
        if self.clustered.isdisjoint(names):
            # Each rank has all of it; metrics() adds the ranks up.
            statistics = statistics.clone()
            statistics[:, 2:] /= dist.get_world_size(self._group())
        super()._keep_statistics(names, statistics)

    def _over_ranks(self, total: Tensor) -> Tensor:
        """Add up the ranks' shares of what the weights were; the norms are the same on all."""
        shares = total[2:].clone()
        dist.all_reduce(shares, group=self._group())
        return torch.cat([total[:2], shares])


class LocalClusters:
    """The clusters of one rank, and what the ranks tell each other about them.

    Args:
        model: the bare model; its backward passes leave weighted gradients from now on.
        queues: the rings, read for the weights and fed with the mean over all ranks.
        state: what they belong to; held weakly.
        options: how the samples are grouped and the groups mixed; ``features`` may be None where
            ``n_clusters`` is 1.
    """

    def __init__(
        self,
        model: nn.Module,
        queues: ClusteredQueues | ClusteredSlices,
        state: "GradQueueState",
        options: ClusterOptions,
    ) -> None:
        described = options.features is not None or options.clusterer is not None
        sizes_only = options.n_clusters == 1 and not described
        if sizes_only:
            # Whatever it is, it has one label; the model's own output says how many samples.
            options = replace(options, features="", clusterer=_one_cluster)
        self._queues, self._owner = queues, weakref.ref(state)
        names: dict[Tensor, str] = {param: name for name, param in queues.params.items()}
        self._sink = Weigh(
            queues,
            match_norm=False,  # the norms of the means over all ranks count
            grad_scale=lambda: self._state.loss_scale(self._device),
        )
        self._clusters = Clusters(
            model, names, self._sink, options,
            before_assign=lambda: self._state.take_loss(),
            whole_batch=self._whole_batch if options.centroid_scale == "standard_error" else int,
            sizes_only=sizes_only,
        )  # fmt: skip
        queues.clustered = self._clusters.covered()
        self._raw = self._clusters.accumulator.raw
        self._unit = torch.ones(2, dtype=torch.float64)
        self._rooms = Rooms()
        self._passes, self._warned = options.accumulation_steps, False
        self._clusters.install()

    @property
    def _state(self) -> "GradQueueState":
        state = self._owner()
        if state is None:
            raise RuntimeError("the GradQueueState of this model is gone: keep it")
        return state

    @property
    def _device(self) -> torch.device:
        return next(iter(self._queues.params.values())).device

    @property
    def covered(self) -> set[str]:
        """The names of the parameters that the backward pass weights."""
        return self._queues.clustered

    def report(self) -> dict[str, str]:
        """Return by parameter name how its gradient is handled."""
        return self._clusters.report()

    @property
    def last(self) -> Groups | None:
        """The clusters of this rank's last batch."""
        last = self._clusters.last
        return None if last is None else last.known_groups

    def states(self) -> list[dict[str, Any]]:
        """Return what each rank's k-means goes on from; every rank must call."""
        mine = self._clusters.state_dict()
        if self._state.ddp is None:
            return [mine]
        states: list[Any] = [None] * dist.get_world_size(self._state.process_group)
        dist.all_gather_object(states, mine, group=self._state.process_group)
        return states

    def check_saved(self, states: Any, *, every_rank: bool = False) -> None:
        """Raise a ValueError that names what keeps saved states from being loaded.

        All ranks check what each of them would go on from, so that all refuse or none does.

        Args:
            states: what ``states`` returned.
            every_rank: check them also where another number of ranks saved them.
        """
        check(states, ListOf(Record({})), "the state of the saved clusters")
        used = every_rank or len(states) == self._world()[1]
        for state in states if used else []:
            self._clusters.check_saved(state)

    def load(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on from saved states; with another number of ranks k-means begins anew."""
        rank, world = self._world()
        self._clusters.load_state_dict(states[rank] if len(states) == world else {})

    def _world(self) -> tuple[int, int]:
        """Return this rank, and how many there are; without DDP it is the only one."""
        ddp = self._state.ddp
        if ddp is None:
            return 0, 1
        return dist.get_rank(ddp.process_group), dist.get_world_size(ddp.process_group)

    def set_sample_weights(self, weights: Tensor | None) -> None:
        """Say how much each sample ``(B,)`` of the next batches counts; None for equal."""
        self._clusters.sample_weights = weights

    def _whole_batch(self, size: int) -> Tensor:
        """Return how many samples all ranks have; a centroid's standard error needs it."""
        if self._state.joining():
            raise RuntimeError(
                'centroid_scale="standard_error" cannot be used under join(): a rank without a '
                'batch would not answer; use centroid_scale="paper"'
            )
        total = torch.tensor([float(size)], dtype=torch.float64, device=self._device)
        dist.all_reduce(total, group=self._state.process_group)
        return total[0]

    def shares(self, names: Sequence[str], device: torch.device, first: bool) -> Shares:
        """Return this rank's shares in a bucket's clustered gradients; every rank must call.

        Args:
            names: clustered parameters.
            device: where the bucket is.
            first: whether the bucket is the first of the step.
        """
        mine = self._raw.masses(names, device)
        if first:
            self._unit = mine[0].clone()
            dist.all_reduce(self._unit, group=self._state.process_group)
            self._unit = torch.where(self._unit > 0, self._unit, 1.0)
            if in_backward():
                engine = torch.autograd.Variable._execution_engine  # pyright: ignore[reportAttributeAccessIssue]
                engine.queue_callback(self._check_passes)
        return Shares(names, mine, self._unit, self._state.process_group)

    def _check_passes(self) -> None:
        """Warn, once, where the passes that add up are not as many as the centroids allow for."""
        wanted, several = self._passes, len(self._raw.passes) > 1
        self._raw.passes.clear()
        if self._warned or several == (wanted > 1) or self._state.joining():
            return
        self._warned = True
        happened = "several backward passes have" if several else "one backward pass has"
        warnings.warn(
            f"{happened} made this step's gradient, and accumulation_steps is {wanted}: the "
            "centroids are compared with the queue in another unit; run A - 1 of A passes under "
            "no_sync() and give accumulation_steps=A",
            stacklevel=2,
        )

    def scale_(self, names: Sequence[str], slices: Sequence[Tensor], shares: Shares | None) -> None:
        """Multiply the slices of a bucket by this rank's share in the result.

        Args:
            names: the parameters of the bucket.
            slices: their gradients on this rank, flat.
            shares: those of the clustered ones; None where there are none.
        """
        even = 1.0 / dist.get_world_size(self._state.process_group)
        weighted = {} if shares is None else shares.given(0)
        for name, piece in zip(names, slices, strict=True):
            piece.mul_(weighted[name].to(piece.dtype) if name in weighted else even)

    def raw_bucket(self, names: Sequence[str], like: Tensor, shares: Shares) -> Tensor:
        """Return the raw gradients of a bucket in the queue's type, times this rank's share.

        In the bucket's own where the queue is float16: they carry the loss scale still.

        Args:
            names: clustered parameters; zeros for those without a gradient on this rank.
            like: the bucket's buffer.
            shares: those of this rank.
        """
        params, given = self._queues.params, shares.given(1)
        dtype = self._queues.options.queue_dtype or like.dtype
        dtype = like.dtype if dtype == torch.float16 else dtype
        sizes = [params[name].numel() for name in names]
        bucket = self._rooms.get(
            names, lambda: torch.empty(sum(sizes), dtype=dtype, device=like.device)
        )
        for name, piece in zip(names, bucket.split(sizes), strict=True):
            grad = self._raw.take(name)
            if grad is None:
                piece.zero_()
            else:
                grad = flat(grad, like=params[name])
                share = given[name].to(grad.dtype)
                if grad.dtype == piece.dtype:
                    torch.mul(grad, share, out=piece)
                else:
                    piece.copy_(grad * share)
        return bucket

    def finish(
        self,
        names: Sequence[str],
        slices: Sequence[Tensor],
        raw: Sequence[Tensor],
        *,
        shares: Shares,
        grad_scale: Tensor | None,
        skip_zeros: bool,
    ) -> None:
        """Queue the raw means over all ranks; note what the weights did.

        Args:
            names: clustered parameters.
            slices: their weighted gradients over all ranks, flat.
            raw: their raw means over all ranks, flat.
            shares: those of this rank.
            grad_scale: the loss scale they carry, or None.
            skip_zeros: exact zeros stand for a parameter that no rank used.
        """
        assert isinstance(self._queues, ClusteredQueues)
        shares.correct_(names, slices, 0)
        shares.correct_(names, raw, 1)
        tables = []
        for name, grad, mean in zip(names, slices, raw, strict=True):
            before, after = (square_norm(values, grad_scale) for values in (mean, grad))
            tables.append(self._table(name, before, after, shares))
            self._match_norm(grad, tables[-1], before, after)
        absent = all_zero(raw) if skip_zeros else None
        self._queues.push_batch(names, raw, tables, grad_scale=grad_scale, absent=absent)

    def finish_slices(
        self,
        names: Sequence[str],
        grads: Sequence[Tensor],
        squares: Tensor,
        *,
        shares: Shares,
        grad_scale: Tensor | None,
    ) -> None:
        """Note what the weights did, where ``push_slice`` has queued the raw means.

        Args:
            names: clustered parameters.
            grads: their weighted gradients over all ranks, flat.
            squares: what ``push_slice`` returned for them.
            shares: those of this rank.
            grad_scale: the loss scale they carry, or None.
        """
        assert isinstance(self._queues, ClusteredSlices)
        shares.correct_(names, grads, 0)
        tables = []
        for name, grad, (mine, whole) in zip(names, grads, squares, strict=True):
            # Each rank counts the norms of its slice: metrics() adds the ranks up.
            part = grad[slice(*self._queues.bounds(name))]
            table = self._table(name, mine, square_norm(part, grad_scale), shares)
            if self._queues.options.match_norm:
                self._match_norm(grad, table, whole, square_norm(grad, grad_scale))
            tables.append(table)
        self._queues._keep_statistics(tuple(names), torch.cat(tables))

    def _table(self, name: str, raw: Tensor, weighted: Tensor, shares: Shares) -> Tensor:
        """Return the statistics of a parameter, ``(1, 5)``: this rank's share of the weights."""
        seen = self._sink.statistics.pop(name, None)
        table = torch.zeros(1, 5, dtype=torch.float64, device=raw.device)
        table[0, 0], table[0, 1] = raw, weighted
        if seen is not None:
            table[0, 2:] = seen[:, 2:].sum(dim=0) * shares.own(name)[1]
            in_use(seen)
        return table

    def _match_norm(self, grad: Tensor, table: Tensor, raw: Tensor, weighted: Tensor) -> None:
        """Give a weighted gradient the norm of the raw one where ``match_norm`` asks for it."""
        if self._queues.options.match_norm:
            match_norm_([grad], table, torch.stack([raw, weighted])[None])


def _one_cluster(features: Tensor) -> Tensor:
    return torch.zeros(len(features), dtype=torch.int64, device=features.device)
