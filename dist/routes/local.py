"""Clusters of a rank's own samples: weighted in its backward pass, counted by its samples.

A rank's backward pass leaves the mean of its weighted centroids in the bucket, and keeps the raw
mean. Ranks count by their samples: W ranks with K clusters each are one process with those W * K
clusters.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gq_triton.cluster_grad import Check, Clusters, Weigh, check_batch
from gq_triton.cluster_grad.declared import DeclaredPasses
from gq_triton.cluster_grad.passes import in_backward
from gq_triton.dist.buckets import BucketBuffers
from gq_triton.dist.routes.base import Context
from gq_triton.dist.shares import Shares
from gq_triton.float8 import wire_type
from gq_triton.grouping import Groups
from gq_triton.law import match_norm_
from gq_triton.options import ClusterOptions
from gq_triton.queues import Queues
from gq_triton.ring import flat, in_use
from gq_triton.saved.rules import ListOf, Record, check

__all__ = ["LocalClusters"]


class LocalClusters:
    """The clusters of one rank, and what the ranks tell each other about them.

    Args:
        context: what the route knows of the state.
        model: the bare model; its backward passes leave weighted gradients from now on.
        queues: the rings, read for the weights.
        options: how the samples are grouped and the groups mixed; ``features`` may be None where
            ``n_clusters`` is 1.
        before_assign: called before the clusters of a step are found.
    """

    def __init__(
        self,
        context: Context,
        model: nn.Module,
        queues: Queues,
        options: ClusterOptions,
        before_assign: Callable[[], None],
    ) -> None:
        sizes_only = options.n_clusters == 1 and not options.described
        if sizes_only:
            # One cluster needs no features: the model's output tells how many samples there are.
            options = replace(options, features="", clusterer=_one_cluster)
        self._context, self._queues = context, queues
        names: dict[Tensor, str] = {param: name for name, param in queues.params.items()}
        self._sink = Weigh(
            queues,
            match_norm=False,  # match_norm_ below takes the norms of the means over all ranks
            grad_scale=lambda: context.loss_scale(self._device),
        )
        self._clusters = Clusters(
            model, names, self._sink, options,
            before_assign=before_assign,
            whole_batch=self._whole_batch if options.centroid_scale == "standard_error" else int,
            sizes_only=sizes_only,
        )  # fmt: skip
        self.covered = self._clusters.covered()
        self.step_begins = True
        self._raw = self._clusters.accumulator.raw
        self._unit = torch.ones(2, dtype=torch.float64)
        self._buffers = BucketBuffers()
        self._declared = DeclaredPasses(
            options.accumulation_steps,
            "run A - 1 of A passes under no_sync() and give accumulation_steps=A",
        )
        self._clusters.install()

    @property
    def _device(self) -> torch.device:
        return next(iter(self._queues.params.values())).device

    def end_with(self, owner: object) -> None:
        """Undo what was done to the model when the owner, held weakly, is gone."""
        self._clusters.end_with(owner)

    def report(self) -> dict[str, str]:
        """Return by parameter name how its gradient is handled."""
        return self._clusters.report()

    def check(self, batch: Any, loss: Callable[[Any], Tensor] | None) -> Check:
        """Return how a batch shows that each gradient is found."""
        return check_batch(self._clusters, batch, loss)

    @property
    def last(self) -> Groups | None:
        """The clusters of this rank's last batch."""
        last = self._clusters.last
        return None if last is None else last.known_groups

    def metrics(self) -> dict[str, Any]:
        """Return the sizes of every rank's clusters; every rank must call."""
        sizes: list[Any] = [None] * dist.get_world_size(self._context.group)
        mine = None if self.last is None else self.last.sizes
        dist.all_gather_object(sizes, mine, group=self._context.group)
        return {"cluster_sizes": sizes}

    def states(self) -> list[dict[str, Any]]:
        """Return the states of all ranks' k-means; every rank must call."""
        mine = self._clusters.state_dict()
        if self._context.ddp() is None:
            return [mine]
        states: list[Any] = [None] * dist.get_world_size(self._context.group)
        dist.all_gather_object(states, mine, group=self._context.group)
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
        ddp = self._context.ddp()
        if ddp is None:
            return 0, 1
        return dist.get_rank(ddp.process_group), dist.get_world_size(ddp.process_group)

    def set_sample_weights(self, weights: Tensor | None) -> None:
        """Say how much each sample ``(B,)`` of the next batches counts; None for equal."""
        self._clusters.sample_weights = weights

    def set_labels(self, labels: Tensor | Sequence[int]) -> None:
        """Give the cluster ``(B,)`` of every sample of the next batch."""
        self._clusters.set_labels(labels)

    def _whole_batch(self, size: int) -> Tensor:
        """Return the number of samples on all ranks, which a centroid's standard error needs."""
        if self._context.joining:
            raise RuntimeError(
                'centroid_scale="standard_error" cannot be used under join(): a rank without a '
                'batch would not answer; use centroid_scale="paper"'
            )
        total = torch.full((1,), float(size), dtype=torch.float64, device=self._device)
        dist.all_reduce(total, group=self._context.group)
        return total[0]

    def shares(self, names: Sequence[str], device: torch.device) -> Shares:
        """Return this rank's shares in a bucket's clustered gradients; every rank must call.

        Args:
            names: the clustered parameters.
            device: the bucket's device.
        """
        mine = self._raw.masses(names, device)
        if self.step_begins:
            self.step_begins = False
            self._unit = mine[0].clone()
            dist.all_reduce(self._unit, group=self._context.group)
            self._unit = torch.where(self._unit > 0, self._unit, 1.0)
            if in_backward():
                engine = torch.autograd.Variable._execution_engine  # pyright: ignore[reportAttributeAccessIssue]
                engine.queue_callback(self._check_passes)
        return Shares(names, mine, self._unit, self._context.group)

    def _check_passes(self) -> None:
        """Warn, once, where the number of backward passes does not fit ``accumulation_steps``."""
        happened = len(self._raw.passes)
        self._raw.passes.clear()
        if not self._context.joining:
            self._declared.check(happened)

    def scale_(self, names: Sequence[str], slices: Sequence[Tensor], shares: Shares | None) -> None:
        """Multiply the slices of a bucket by this rank's share in the result.

        Args:
            names: the parameters of the bucket.
            slices: their gradients on this rank, flat.
            shares: the shares of the clustered ones; None where there are none.
        """
        even = 1.0 / dist.get_world_size(self._context.group)
        weighted = {} if shares is None else shares.given(0, slices[0].dtype)
        for name, piece in zip(names, slices, strict=True):
            piece.mul_(weighted.get(name, even))

    def raw_bucket(self, names: Sequence[str], like: Tensor, shares: Shares) -> Tensor:
        """Return the raw gradients of a bucket, flat, times this rank's share.

        They have the queue's type where ``wire_type`` says so, else the bucket's.

        Args:
            names: the clustered parameters; one without a gradient on this rank gives zeros.
            like: the bucket's buffer.
            shares: the shares of this rank.
        """
        params, given = self._queues.params, dict[torch.dtype, dict[str, Tensor]]()
        dtype = wire_type(self._queues.options.queue_dtype, like.dtype)
        sizes = [params[name].numel() for name in names]
        bucket = self._buffers.get(
            names, lambda: torch.empty(sum(sizes), dtype=dtype, device=like.device)
        )
        for name, piece in zip(names, bucket.split(sizes), strict=True):
            grad = self._raw.take(name)
            if grad is None:
                piece.zero_()
            else:
                grad = flat(grad, like=params[name])
                if grad.dtype not in given:
                    given[grad.dtype] = shares.given(1, grad.dtype)
                share = given[grad.dtype][name]
                if grad.dtype == piece.dtype:
                    torch.mul(grad, share, out=piece)
                else:
                    piece.copy_(grad * share)
        return bucket

    def table(self, name: str, raw: Tensor, weighted: Tensor, shares: Shares) -> Tensor:
        """Return the statistics of a parameter, ``(1, 5)``, with this rank's share of the weights.

        Args:
            name: the parameter's name.
            raw: squared norm of the raw mean, 0-d float64.
            weighted: squared norm of the weighted mean, 0-d float64.
            shares: the shares of this rank.
        """
        seen = self._sink.statistics.pop(name, None)
        if seen is None:
            weights = raw.new_zeros(3)
        else:
            weights = seen[:, 2:].sum(dim=0) * shares.own(name)[1]
            in_use(seen)
        return torch.cat([raw.view(1), weighted.view(1), weights.double()])[None]

    def match_norm_(self, grad: Tensor, table: Tensor, raw: Tensor, weighted: Tensor) -> None:
        """Give a weighted gradient the norm of the raw one where ``match_norm`` asks for it."""
        if self._queues.options.match_norm:
            match_norm_([grad], table, torch.stack([raw, weighted])[None])


def _one_cluster(features: Tensor) -> Tensor:
    return torch.zeros(len(features), dtype=torch.int64, device=features.device)
