"""The state of the DDP communication hook: what it keeps between backward passes."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import Unpack

from gq_triton.claims import HOOK, claim
from gq_triton.cluster_grad import Check
from gq_triton.describe import changed, described
from gq_triton.dist.buckets import Buckets
from gq_triton.dist.losses import MeanLoss
from gq_triton.dist.options import NOT_ON_RANKS, HookOptions, StateKeywords, digests_of
from gq_triton.dist.routes import Context, match
from gq_triton.dist.together import together
from gq_triton.dist.verify import check_same
from gq_triton.dist.wrappers import carries, ddp_carrying, find_ddp
from gq_triton.keywords import read, takes
from gq_triton.loss_scale import GradScale, ScalerWatch
from gq_triton.names import bare, parameter_names
from gq_triton.options import ClusterOptions, LawOptions
from gq_triton.queues import Queues
from gq_triton.replayed import refuse_replay
from gq_triton.saved.rules import COUNTER_LIMIT

__all__ = ["GradQueueState"]

# Key of the saved state: the buckets of the last step, as lists of parameter names.
BUCKETS = "buckets"
_SCALED = (
    "a GradScaler scales the loss, and the hook would queue gradients that carry its scale: pass "
    "register(model, grad_scaler=scaler)"
)


@takes(ClusterOptions, LawOptions, HookOptions, without=NOT_ON_RANKS)
class GradQueueState:
    """The state of ``grad_queue_hook``: the last L reduced gradients of every parameter.

    *One cluster.* The gradient is averaged over the ranks, weighted, and the raw mean is queued.
    All ranks see the same mean, so all hold the same queue, also under ``join()``. The result is
    that of one process with the global batch.

    *Names.* Everything is kept by parameter name, so DDP may cut its buckets in any way. The
    process group is that of the DDP module. A state can be built, and loaded, before the DDP module
    and the group exist. The gradient that leaves the hook is the weighted one: norms, clipping and
    the optimizer see it.

    *Unused parameters.* Under ``find_unused_parameters`` or ``static_graph`` DDP gives the hook
    exact zeros for a parameter that no rank used, and the hook cannot tell them from a gradient
    that is zero. So in these two modes a parameter whose gradient is zero throughout is skipped,
    its queue unchanged. In every other case a zero gradient is queued. Parameters that never reach
    a hook (``delay_all_reduce_named_params``, ignored ones) are not weighted.

    *Slices.* With ``shard_queue=True`` a bucket is reduce-scattered, each rank weights and queues
    its slice, and the slices are gathered. The result is the same up to the order of summation,
    with two ranks bit for bit. The queue's memory is divided by the world size. The bytes on the
    wire are plain DDP's, plus at most W - 1 elements of padding per bucket and one byte per
    parameter that is cut between ranks (16 more with ``match_norm``). When DDP cuts its buckets
    anew, after the first steps, the slices move once. ``metrics``, ``digest`` and ``state_dict``
    communicate: every rank must call them. On the CPU the hook waits for the reduce-scatter; on a
    GPU it waits for nothing. After a change of the process group the last saved state must be
    loaded.

    *Clusters.* With ``n_clusters=K`` each rank groups its own samples and weights its K centroids
    with the shared statistics in its one backward pass. The weighted gradients are added up over
    the ranks, and so are the raw means, in the queue's type; the raw means are queued. Each rank
    counts by its samples, so W ranks are one process with those W * K clusters, also where their
    batches differ in size. (With several forward passes per step ``docs/distributed.md`` has the
    exact rule.) The effective length of a step is that of the losses before it. ``metrics`` and
    ``state_dict`` communicate: every rank must call them. With ``shard_queue=True`` the mean and
    1 / sigma of all slices are gathered while the optimizer and the next forward pass run: every
    rank keeps these 2 numbers per element in addition to the queue's L / W.

    *Saving.* Save ``state.state_dict()`` and load it into the live state of the new run, on every
    rank. The object itself is not pickled. A copy of the DDP module carries no hook, as always in
    torch.

    Args:
        model: the model, bare, compiled or wrapped in DDP.
        **options: those of ``ClusterOptions``, ``LawOptions`` and ``HookOptions``; with K = 1
            ``features`` may be None, which makes each rank's mean a centroid.

    Raises:
        ValueError: an option is out of its range; a parameter is complex; with clusters, something
            else weights these parameters already.

    Examples:
        >>> from torch.nn.parallel import DistributedDataParallel
        >>> from gq_triton.dist import GradQueueState, grad_queue_hook
        >>> model = torch.nn.Linear(4, 2)
        >>> state = GradQueueState(model)
        >>> ddp = DistributedDataParallel(model)  # the process group exists
        >>> ddp.register_comm_hook(state, grad_queue_hook)
        >>> ddp(torch.ones(8, 4)).square().mean().backward()
        >>> state.metrics()["mean_weight"]  # until queue_length gradients are queued
        1.0
    """

    def __init__(
        self,
        model: nn.Module,
        **options: Unpack[StateKeywords],
    ) -> None:
        clusters: ClusterOptions
        law: LawOptions
        hook: HookOptions
        clusters, law, hook = read(options, ClusterOptions, LawOptions, HookOptions)
        ddp = find_ddp(model)
        params = parameter_names(model if ddp is None else ddp.module)
        for name, param in params.items():
            if param.requires_grad and param.is_complex():
                raise ValueError(
                    f"{name} must have a real floating type, got {param.dtype}: hold it as "
                    "torch.view_as_real"
                )
        self._given = changed(clusters, law, hook)
        self.shard_queue = bool(hook.shard_queue)
        self._digests = digests_of(law, clusters, hook)
        self.grad_scaler = hook.grad_scaler
        self.verify_every = hook.verify_every
        # A weak reference: a hook that holds its DDP module keeps it alive forever (pytorch#63211).
        self._ddp = None if ddp is None else weakref.ref(ddp)
        self.buckets = Buckets(params, law.backend)
        self._mean_loss = MeanLoss()
        self._steps = 0
        self._scaler_watch: ScalerWatch | None = None
        if clusters.n_clusters is not None:
            # From now on backward passes leave weighted gradients.
            self._claim(params, clustered=True)
        self.route = match(
            self._context(),
            bare(model if ddp is None else ddp.module),
            params,
            law,
            clusters,
            shard_queue=self.shard_queue,
        )
        self.route.end_with(self)

    def _context(self) -> Context:
        """Return what the route knows of this state; the route does not keep the state alive."""
        alive = weakref.ref(self)

        def state() -> GradQueueState:
            known = alive()
            if known is None:
                raise RuntimeError("this model's GradQueueState no longer exists: keep a reference")
            return known

        return Context(
            ddp=lambda: state().ddp,
            loss_scale=lambda device: state().loss_scale(device),
            buckets=self.buckets,
            losses=self._mean_loss,
        )

    def __repr__(self) -> str:
        """Return options that are not the defaults, size, this rank's memory, and what is served.

        Nothing is communicated.
        """
        ddp = None if self._ddp is None else self._ddp()
        served = "no DDP module yet"
        if ddp is not None:
            ranks = dist.get_world_size(ddp.process_group)
            served = f"{type(ddp.module).__name__} in DDP on {ranks} ranks"
        return described(self, self._given, repr(self.queues), served)

    @property
    def queues(self) -> Queues:
        """The rings."""
        return self.route.queues

    def claim(self) -> None:
        """Claim the model's parameters for the hook, which alone may weight their gradients.

        Raises:
            ValueError: something else weights them already.
        """
        self._claim(self.queues.params, self.route.clustered)

    def _claim(self, params: Mapping[str, Tensor], clustered: bool) -> None:
        alive = weakref.ref(self)

        def active() -> bool:
            state = alive()
            return state is not None and (clustered or state.ddp is not None)

        claim(params.values(), self, HOOK, active)

    @property
    def labels_(self) -> Tensor | None:
        """The cluster of every sample of this rank's last batch, ``(B,)`` int64."""
        last = self.route.last_groups()
        return None if last is None else last.labels

    @property
    def cluster_sizes_(self) -> list[int] | None:
        """Samples in each cluster of this rank's last batch."""
        last = self.route.last_groups()
        return None if last is None else last.sizes

    def report(self) -> dict[str, str]:
        """Return, by parameter name, how this rank's last gradient was handled."""
        return self.route.report()

    def check(self, batch: Any, loss: Callable[[Any], Tensor] | None = None) -> Check:
        """Show, before training, how the gradient of every parameter will be found.

        Runs a batch of this rank forward and backward, without the other ranks; with
        ``centroid_scale="standard_error"`` every rank must call. See ``GradQueue.check``.

        Raises:
            ValueError: there are no clusters.
            RuntimeError: with ``strict=True``, where gradients are not known by cluster.
        """
        ddp = self.ddp
        with nullcontext() if ddp is None else ddp.no_sync():
            return self.route.check(batch, loss)

    @property
    def ddp(self) -> DistributedDataParallel | None:
        """The DDP module that this state serves; None before there is one."""
        ddp = None if self._ddp is None else self._ddp()
        if ddp is None or not carries(ddp, self):
            registered = ddp_carrying(self, {id(param) for param in self.queues.params.values()})
            if registered is not None:
                ddp = registered
                self._ddp = weakref.ref(ddp)
                self.buckets.expect_step()
        return ddp

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The DDP module's process group, which may change; None, the default one, without DDP."""
        ddp = self.ddp
        return None if ddp is None else ddp.process_group

    def record_loss(self, loss: Tensor | float) -> None:
        """Record this step's loss on this rank, unscaled, before ``backward``.

        The next synchronized backward pass averages over all ranks the losses recorded since the
        last one; the mean decides the effective length. A rank may record several losses
        (micro-batches) or none. On a GPU the host waits neither for the loss nor for its mean.

        Args:
            loss: one number, 0-d or one element.
        """
        if self.queues.options.loss_window is not None:
            self._mean_loss.record(loss)

    def set_sample_weights(self, weights: Tensor | None) -> None:
        """Say how much each sample of this rank's next batches counts in the loss.

        Args:
            weights: ``(B,)``, such as the number of tokens of each sequence under a mean per token;
                None for equal.

        Raises:
            ValueError: there are no clusters.
        """
        self.route.set_sample_weights(weights)

    def set_labels(self, labels: Tensor | Sequence[int]) -> None:
        """Give the cluster of every sample of this rank's next batch, with ``labels=True``.

        Each forward pass of training takes labels of its own: call before each one.

        Args:
            labels: ``(B,)`` integers, at least 0; samples in the order of their clusters are not
                copied to sort them.

        Raises:
            ValueError: without ``labels=True``, or they are not one integer per sample.
        """
        self.route.set_labels(labels)

    def metrics(self, per_layer: bool = False) -> dict[str, Any]:
        """Return what the law did in the last step, the same on every rank.

        With ``shard_queue`` or clusters every rank must call: each one knows only its own part.

        Args:
            per_layer: return the first four figures of each parameter by its name.

        Returns:
            ``mean_weight``; ``norm_ratio``, ``|g*| / |g|`` over all parameters; ``saturated_high``
            and ``saturated_low``, shares of elements at rho and at 1/rho; ``effective_length``;
            with clusters ``cluster_sizes``, a list for each rank. Empty before the first step.
            The values are transferred to the host here, not during the step.
        """
        with self._together("metrics"):
            return self.route.metrics(per_layer)

    def digest(self) -> str:
        """Return the SHA-256 of the queue, which is equal on all ranks after every step.

        The whole queue is read. With ``shard_queue`` the slices are gathered, parameter by
        parameter, so that the digest does not depend on where they lie: every rank must call.
        """
        with self._together("digest"):
            return self.queues.digest()

    def state_dict(self) -> dict[str, Any]:
        """Return the queue by parameter name: tensors and plain values, the same on every rank.

        The saved state loads into any world size, sliced or not. With ``shard_queue`` or clusters
        every rank must call, even if only one rank writes: slices are gathered, parameter by
        parameter, into the memory of the CPU. ``torch.load(weights_only=True)`` reads the saved
        state, and ``torch.distributed.checkpoint`` takes the ``GradQueueState`` itself.

        Returns:
            ``queue``: rings ``(L, *param.shape)`` by name; ``queued``: how many gradients each has
            taken; ``losses``; ``options``; ``buckets``: the names in every bucket of the last step;
            ``clusters``: with clusters, the state of each rank's k-means.
        """
        with self._together("state_dict"):
            self.route.settle()
            self.queues.init_state()
            buckets = {BUCKETS: self.buckets.layout()}
            return self.queues.state_dict() | buckets | self.route.saved()

    def _together(self, call: str) -> AbstractContextManager[None]:
        """Return the context in which a call runs that every rank must make.

        The context does nothing where the call does not communicate.
        """
        if not self.route.communicates or self.ddp is None:
            return nullcontext()
        return together(f"GradQueueState.{call}()", dist.get_rank())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a saved state; every rank must call.

        With the same world size training continues bit for bit, if the state was saved after the
        second step or later (the third with ``static_graph``). The order in which more than two
        ranks are summed depends on the buckets, and DDP cuts its buckets anew in the first steps.
        Until then the hook reduces the buckets of the saved run.

        Raises:
            ValueError: the state belongs to another model or to other options. Nothing is changed.
        """
        self.check_saved(state)
        self.queues.load_state_dict(state)
        self.buckets.load(state.get(BUCKETS, []))
        self._mean_loss.reset()
        self.route.resume(state)

    def check_saved(
        self, state: Any, highest: int = COUNTER_LIMIT - 1, *, every_rank: bool = False
    ) -> None:
        """Raise a ValueError that names what keeps a saved state from being loaded.

        Args:
            state: what ``state_dict`` returned.
            highest: how many gradients a ring may have taken at most.
            every_rank: check the clusters of all ranks that saved, however many there are now.
        """
        self.queues.check_saved(state, highest)
        self.buckets.check_saved(state.get(BUCKETS, []))
        self.route.check_saved(state, every_rank=every_rank)

    def __deepcopy__(self, memo: dict[int, Any]) -> "GradQueueState":
        """Return the state itself: the copy of a DDP module, such as an average, has no hook."""
        return self

    def __reduce__(self) -> str:
        """Refuse to be pickled."""
        raise TypeError(
            "GradQueueState is not pickled: save state.state_dict(), and load it into the state "
            "of the new run"
        )

    def begin(self, bucket: Any) -> tuple[str, ...]:
        """Return the names of a ``GradBucket``'s parameters; a step's first bucket begins the step.

        Raises:
            ValueError: a sparse gradient, or a parameter that the state does not know.
            RuntimeError: the ranks differ in options or queues.
        """
        refuse_replay(
            "the hook of gq_triton.dist counts steps and compares ranks in Python",
            "call the step itself",
        )
        names = self.buckets.names(bucket)
        ddp = self.ddp  # may be another module than in the last step
        self._begin_step(names, bucket.buffer().device)
        self.buckets.note(names, ddp is not None and ddp.static_graph)
        return names

    def _begin_step(self, names: tuple[str, ...], device: torch.device) -> None:
        if not self.buckets.begins_step(names):
            return
        self._steps += 1
        group = self.process_group
        if self._steps == 1:
            self.claim()
            check_same(self._digests, group, device, "the first backward pass", "option")
            if self.grad_scaler is None:
                self._scaler_watch = ScalerWatch(self.queues.params.values(), _SCALED)
        elif self._scaler_watch is not None and self._scaler_watch.done:
            self._scaler_watch.end()
            self._scaler_watch = None
        self.route.begin()
        if self.verify_every and self._steps % self.verify_every == 0:
            digests = self.queues.shared_digests()
            check_same(digests, group, device, f"backward pass {self._steps}")
        if self.queues.options.loss_window is not None:
            self._mean_loss.start(device, group)

    def loss_scale(self, device: torch.device) -> Tensor | None:
        """Return the loss scale that the gradients carry, 0-d; None where there is none."""
        scale = GradScale(self.grad_scaler)()
        return None if scale is None else scale.to(device, non_blocking=True)
