"""The base of all routes: what a route knows of the state, and the addition over the ranks."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from gq_triton.cluster_grad import Check
from gq_triton.dist.buckets import Buckets
from gq_triton.dist.collectives import completed
from gq_triton.dist.losses import MeanLoss
from gq_triton.dist.streams import SideStreams
from gq_triton.grouping import Groups
from gq_triton.law import all_zero
from gq_triton.queues import Queues

__all__ = ["Context", "Route"]


@dataclass(frozen=True)
class Context:
    """What a route knows of the state that it serves.

    Attributes:
        ddp: returns the DDP module; None before there is one.
        loss_scale: returns the loss scale that the gradients on a device carry, 0-d, or None.
        buckets: how parameters lie in buckets, in this run and in the saved one.
        losses: the mean over the ranks of the recorded losses.
        lock: held while a callback works: callbacks of several buckets may run at once.
        streams: the CUDA streams in which callbacks work.
    """

    ddp: Callable[[], DistributedDataParallel | None]
    loss_scale: Callable[[torch.device], Tensor | None]
    buckets: Buckets
    losses: MeanLoss
    lock: threading.Lock = field(default_factory=threading.Lock)
    streams: SideStreams = field(default_factory=SideStreams)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The DDP module's process group, which may change; None, the default one, without DDP."""
        ddp = self.ddp()
        return None if ddp is None else ddp.process_group

    @property
    def static_graph(self) -> bool:
        """Whether DDP was told that the graph never changes."""
        ddp = self.ddp()
        return ddp is not None and ddp.static_graph

    @property
    def skips_zeros(self) -> bool:
        """Whether exact zeros stand for a parameter that no rank used."""
        ddp = self.ddp()
        return ddp is not None and (ddp.find_unused_parameters or ddp.static_graph)

    @property
    def joining(self) -> bool:
        """Whether ranks may run out of batches (``DDP.join``)."""
        ddp = self.ddp()
        return ddp is not None and ddp._join_config.enable

    @contextmanager
    def alone(self, device: torch.device, wait: bool = True) -> Iterator[None]:
        """Work on what the buckets share, after what the current stream was given so far.

        Args:
            device: the device of the work.
            wait: whether the current stream then waits for the work.
        """
        with self.lock, self.streams.after_current(device, wait):
            yield


class Route:
    """One way from a bucket of this rank's gradients to the weighted mean over all ranks.

    A route owns its kind of queue, its addition over the ranks, and the work after the addition.
    Subclasses provide ``start``.

    Args:
        context: what the route knows of the state.
        queues: the rings.
    """

    # Whether each rank clusters its own samples.
    clustered = False
    # Whether metrics, a digest or a saved state need all ranks.
    communicates = False

    def __init__(self, context: Context, queues: Queues) -> None:
        self.context, self.queues = context, queues

    def start(self, names: tuple[str, ...], buffer: Tensor) -> Future:
        """Start to weight a bucket; every rank must call.

        Args:
            names: the parameters in the order of the bucket.
            buffer: their gradients on this rank, flat; overwritten.

        Returns:
            A future of ``buffer``, the weighted means over all ranks.
        """
        raise NotImplementedError

    def end_with(self, owner: object) -> None:
        """Leave the model as it was when the owner, held weakly, is gone."""

    def begin(self) -> None:
        """Do what is due before the first bucket of a step."""

    def settle(self) -> None:
        """Do what the next step would do first, so that the state to save is complete."""

    def saved(self) -> dict[str, Any]:
        """Return what a saved state holds in addition to the rings; every rank must call."""
        return {}

    def check_saved(self, state: Mapping[str, Any], *, every_rank: bool) -> None:
        """Raise a ValueError where a saved state, apart from its rings, is unsound.

        Args:
            state: the saved state.
            every_rank: check what all ranks saved, however many there are now.
        """

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state whose rings and buckets are loaded."""

    def metrics(self, per_layer: bool = False) -> dict[str, Any]:
        """Return what the law did in the last step; empty before the first one."""
        return self.queues.metrics(per_layer)

    def report(self) -> dict[str, str]:
        """Return, by parameter name, how the parameter's gradient is handled."""
        return {
            name: "whole batch" if param.requires_grad else "frozen"
            for name, param in self.queues.params.items()
        }

    def check(self, batch: Any, loss: Callable[[Any], Tensor] | None) -> Check:
        """Return how a batch shows that each gradient is found.

        Raises:
            ValueError: there are no clusters.
        """
        raise ValueError("check needs n_clusters: without clusters every gradient is one")

    def last_groups(self) -> Groups | None:
        """Return the clusters of this rank's last batch; None where there are none."""
        return None

    def set_sample_weights(self, weights: Tensor | None) -> None:
        """Say how much each sample of the next batches counts.

        Raises:
            ValueError: there are no clusters, so no sample is looked at.
        """
        raise ValueError("set_sample_weights needs n_clusters: without clusters no sample is seen")

    def set_labels(self, labels: Tensor | Sequence[int]) -> None:
        """Give the cluster of every sample of the next batch.

        Raises:
            ValueError: there are no clusters.
        """
        raise ValueError("set_labels needs n_clusters and labels=True")

    def take_loss(self) -> None:
        """Tell the queue the mean loss of this step, once."""
        loss = self.context.losses.take()
        if loss is not None:
            self.queues.record_loss(loss)

    def before_weighing(self) -> None:
        """Do what is due before a bucket is weighted: this step's loss decides its length E."""
        self.take_loss()

    def add_up(
        self,
        names: tuple[str, ...],
        buffer: Tensor,
        through: Callable[[tuple[str, ...], Tensor], Future],
    ) -> Future:
        """Start to add a bucket up over the ranks, in place.

        In the first steps after loading, the saved run's buckets are added up instead.

        Args:
            names: the parameters in the order of the bucket.
            buffer: their gradients on this rank, flat.
            through: starts to add one bucket up over the ranks, in place.

        Returns:
            A future of ``buffer``.
        """
        buckets = self.context.buckets
        former = buckets.former(names, self.context.static_graph)
        if not former:
            return through(names, buffer)
        slices = dict(zip(names, buckets.split(names, buffer), strict=True))
        # Waiting costs nothing here: usually this is the only bucket of the first step.
        for bucket in former:
            pieces = [slices[name] for name in bucket]
            whole = torch.cat(pieces)
            through(bucket, whole).wait()
            for piece, mean in zip(pieces, buckets.split(bucket, whole), strict=True):
                piece.copy_(mean)
        return completed(buffer)

    def all_reduce(self, names: tuple[str, ...], buffer: Tensor) -> Future:
        """Start to add a bucket up over the ranks; return a future of the work."""
        work = dist.all_reduce(buffer, group=self.context.group, async_op=True)
        assert work is not None
        return work.get_future()

    def even_(self, buffer: Tensor) -> None:
        """Multiply a buffer by 1 / W, the same share for each of W ranks."""
        # DDP multiplies by the reciprocal, too. For 3 ranks a division would round otherwise.
        buffer.mul_(1.0 / dist.get_world_size(self.context.group))

    @torch.no_grad()
    def weigh(self, names: tuple[str, ...], buffer: Tensor, reduced: Future) -> Tensor:
        """Weight a reduced bucket in place and queue the raw one; return it. Local work only.

        On the CPU this runs in a thread of gloo, where waiting for a later collective could
        deadlock; on a GPU it runs in a stream that follows the reduction.
        """
        reduced.value()  # raises what the reduction raised
        with self.context.alone(buffer.device):
            self.before_weighing()
            self.weigh_slices(names, self.context.buckets.split(names, buffer))
        return buffer

    def weigh_slices(self, names: Sequence[str], grads: Sequence[Tensor]) -> None:
        """Weight reduced gradients in place and queue the raw ones."""
        absent = all_zero(grads) if grads and self.context.skips_zeros else None
        if grads:
            scale = self.context.loss_scale(grads[0].device)
            self.queues.weigh_(names, grads, grad_scale=scale, absent=absent)
