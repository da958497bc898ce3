"""Clusters of every rank's own samples, the whole queue on every rank."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future

from gq_triton.cluster_grad import Check
from gq_triton.dist.routes.base import Context, Route
from gq_triton.dist.routes.local import LocalClusters
from gq_triton.dist.shares import Shares
from gq_triton.grouping import Groups
from gq_triton.law import all_zero, square_norm
from gq_triton.options import ClusterOptions, LawOptions
from gq_triton.queues import Queues

__all__ = ["Clustered", "ClusteredQueues", "ClusteredRoute"]


# Key of the saved state: the states of all ranks' k-means.
CLUSTERS = "clusters"


class ClusteredQueues(Queues):
    """The rings, the same on every rank, of parameters that each rank weights by its own clusters.

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
        super().__init__(params, options)
        self._group = group
        self.clustered: set[str] = set()

    def _keep_statistics(
        self,
        names: tuple[str, ...],
        statistics: Tensor | list[Tensor],
        owners: Sequence[str] | None = None,
    ) -> None:
        if self.clustered.isdisjoint(names):
            # Every rank has the statistics of the whole bucket, and metrics() adds the ranks up.
            parts = statistics if isinstance(statistics, list) else [statistics]
            statistics = torch.cat(parts)
            statistics[:, 2:] /= dist.get_world_size(self._group())
        super()._keep_statistics(names, statistics, owners)

    def _over_ranks(self, table: Tensor) -> Tensor:
        """Add up the ranks' shares of the weights' statistics; all ranks have the same norms."""
        shares = table[:, 2:].clone()
        dist.all_reduce(shares, group=self._group())
        return torch.cat([table[:, :2], shares], dim=1)


class ClusteredRoute(Route):
    """The base of the two routes with clusters, which begin, save and report alike.

    The effective length of a step is that of the losses before it: this step's is not known yet
    when its first centroid is weighted.
    """

    clustered = True
    communicates = True
    local: LocalClusters

    def end_with(self, owner: object) -> None:
        """Let the model's layers be torch's own again when the owner, held weakly, is gone."""
        self.local.end_with(owner)

    def before_weighing(self) -> None:
        """Leave the effective length alone, which is that of the losses before this step."""

    def begin(self) -> None:
        """Take the last step's loss: a rank that has joined runs no backward pass that takes it."""
        self.take_loss()
        self.local.step_begins = True

    def settle(self) -> None:
        """Take the last step's loss, so that the state to save is complete."""
        self.take_loss()

    def saved(self) -> dict[str, Any]:
        """Return the states of all ranks' k-means; every rank must call."""
        return {CLUSTERS: self.local.states()}

    def check_saved(self, state: Mapping[str, Any], *, every_rank: bool) -> None:
        """Raise a ValueError where the saved clusters of a rank are unsound."""
        super().check_saved(state, every_rank=every_rank)
        self.local.check_saved(state.get(CLUSTERS, []), every_rank=every_rank)

    def resume(self, state: Mapping[str, Any]) -> None:
        """Load the state of this rank's k-means."""
        super().resume(state)
        self.local.load(state.get(CLUSTERS, []))

    def report(self) -> dict[str, str]:
        """Return, by parameter name, how the last gradient was handled or the first will be."""
        return self.local.report()

    def check(self, batch: Any, loss: Callable[[Any], Tensor] | None) -> Check:
        """Return how a batch shows that each gradient is found."""
        return self.local.check(batch, loss)

    def last_groups(self) -> Groups | None:
        """Return the clusters of this rank's last batch."""
        return self.local.last

    def set_sample_weights(self, weights: Tensor | None) -> None:
        """Say how much each sample ``(B,)`` of the next batches counts; None for equal."""
        self.local.set_sample_weights(weights)

    def set_labels(self, labels: Tensor | Sequence[int]) -> None:
        """Give the cluster ``(B,)`` of every sample of this rank's next batch."""
        self.local.set_labels(labels)

    def metrics(self, per_layer: bool = False) -> dict[str, Any]:
        """Return what the law did in the last step, and the clusters; every rank must call."""
        values = super().metrics(per_layer)
        return values | self.local.metrics() if values and not per_layer else values


class Clustered(ClusteredRoute):
    """The route that adds up weighted gradients, and raw means, which every rank queues.

    Args:
        context: what the route knows of the state.
        model: the bare model.
        params: the model's parameters by name.
        law: how gradients are queued and weighted.
        clusters: how each rank clusters its samples.
    """

    queues: ClusteredQueues

    def __init__(
        self,
        context: Context,
        model: nn.Module,
        params: Mapping[str, Tensor],
        law: LawOptions,
        clusters: ClusterOptions,
    ) -> None:
        super().__init__(context, ClusteredQueues(params, lambda: context.group, law))
        self.local = LocalClusters(context, model, self.queues, clusters, self.take_loss)
        self.queues.clustered = self.local.covered

    @torch.no_grad()
    def start(self, names: tuple[str, ...], buffer: Tensor) -> Future:
        """Start to add up the weighted gradients, and then the raw ones."""
        clustered = tuple(name for name in names if name in self.local.covered)
        if not clustered:
            self.even_(buffer)
            return self.add_up(names, buffer, self.all_reduce).then(
                partial(self.weigh, names, buffer)
            )
        shares = self.local.shares(clustered, buffer.device)
        self.local.scale_(names, self.context.buckets.split(names, buffer), shares)
        reduced = self.add_up(names, buffer, self.all_reduce)
        raw = self.local.raw_bucket(clustered, buffer, shares)
        # The callback is the second reduction's; it waits for the first one, which began earlier.
        second = self.add_up(clustered, raw, self.all_reduce)
        return second.then(partial(self._finish, names, buffer, shares, reduced, raw))

    @torch.no_grad()
    def _finish(
        self,
        names: tuple[str, ...],
        buffer: Tensor,
        shares: Shares,
        reduced: Future,
        raw: Tensor,
        second: Future,
    ) -> Tensor:
        """Queue the raw means; weight what has no clusters; return the bucket. Local work only."""
        second.value()
        reduced.wait()
        split, local = self.context.buckets.split, self.local
        slices = dict(zip(names, split(names, buffer), strict=True))
        clustered = [name for name in names if name in local.covered]
        plain = [name for name in names if name not in local.covered]
        with self.context.alone(buffer.device):
            grads, means = [slices[name] for name in clustered], split(clustered, raw)
            shares.correct_(clustered, grads, 0)
            shares.correct_(clustered, means, 1)
            scale = self.context.loss_scale(buffer.device)
            tables = []
            for name, grad, mean in zip(clustered, grads, means, strict=True):
                raw_square, square = square_norm(mean, scale), square_norm(grad, scale)
                tables.append(local.table(name, raw_square, square, shares))
                local.match_norm_(grad, tables[-1], raw_square, square)
            absent = all_zero(means) if self.context.skips_zeros else None
            self.queues.push_batch(clustered, means, tables, grad_scale=scale, absent=absent)
            self.weigh_slices(plain, [slices[name] for name in plain])
        return buffer
