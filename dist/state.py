"""What the DDP communication hook keeps between backward passes."""

import hashlib
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import Unpack

from gq_triton.claims import HOOK, claim
from gq_triton.dist.buckets import Buckets
from gq_triton.dist.clustered_slices import ClusteredSlices
from gq_triton.dist.clusters import ClusteredQueues, LocalClusters
from gq_triton.dist.losses import MeanLoss
from gq_triton.dist.placement import SlicedQueues
from gq_triton.dist.streams import SideStreams
from gq_triton.dist.verify import check_same
from gq_triton.dist.wrappers import carries, ddp_carrying, find_ddp
from gq_triton.names import bare, parameter_names
from gq_triton.options import (
    ClusterOptions,
    LawKeywords,
    LawOptions,
    Options,
    RankClusterKeywords,
    option,
    read,
    takes,
)
from gq_triton.queues import Queues
from gq_triton.saved.rules import COUNTER_LIMIT

__all__ = ["GradQueueState"]

# Key of the saved state: the buckets of the last step, as lists of parameter names.
BUCKETS = "buckets"
# And with clusters: what each rank's k-means goes on from.
CLUSTERS = "clusters"

# Which queues: with clusters of each rank's own, in slices.
_KINDS: dict[tuple[bool, bool], Callable[..., Queues]] = {
    (False, False): lambda params, group, options: Queues(params, options),
    (False, True): SlicedQueues,
    (True, False): ClusteredQueues,
    (True, True): ClusteredSlices,
}


# What the ranks must agree on of ``ClusterOptions``.
_SHARED = "population_power", "centroid_scale", "accumulation_steps"
# Options of the clusters that only one process has: DDP wants a mean, and calls backward itself.
NOT_ON_RANKS = "loss_reduction", "mode"


def _not_negative(name: str, value: Any) -> str | None:
    fits = isinstance(value, int) and value >= 0
    return None if fits else f"{name} must be an integer >= 0, got {value}"


def _comparable(value: Any) -> Any:
    """Return an option so that equal ones have one text: 3 and 3.0, True and 1."""
    return float(value) if isinstance(value, (int, float)) else value


@dataclass(frozen=True, kw_only=True)
class HookOptions(Options):
    """What the DDP hook does beside weighting."""

    shard_queue: bool = option(False, "divide the queue among the ranks.")
    grad_scaler: GradScaler | None = option(
        None,
        "the ``GradScaler`` of the run, which must scale alike on every rank; the queue then holds "
        "unscaled gradients.",
    )
    verify_every: int = option(
        0,
        "N compares the ranks' queues at the start of every N-th backward pass and raises a "
        "RuntimeError that names the first parameter that differs; 0 does not. It reads the whole "
        "queue. Slices have no copy to compare with: with ``shard_queue`` it compares cuts, "
        "counters, losses, and with clusters the statistics. The options are compared in the first "
        "backward pass, whatever N is.",
        _not_negative,
    )


class HookKeywords(TypedDict, total=False):
    """The keywords of ``HookOptions``."""

    shard_queue: bool
    grad_scaler: GradScaler | None
    verify_every: int


class StateKeywords(RankClusterKeywords, LawKeywords, HookKeywords, total=False):
    """The keywords of ``GradQueueState`` and ``register``."""


@takes(ClusterOptions, LawOptions, HookOptions, without=NOT_ON_RANKS)
class GradQueueState:
    """What ``grad_queue_hook`` keeps: the last L reduced gradients of every parameter.

    The queue is fed by what the ranks agree on, the gradient averaged over all of them, so it is
    the same on every rank, also under ``join()``; with one cluster over the global batch the result
    is that of one process with that batch. Buckets may be cut and rebuilt in any way: everything is
    kept by parameter name.

    The process group is that of the DDP module, whichever it is; a state can be built, and loaded,
    before either exists. The gradient that leaves the hook is the weighted one: norms, clipping and
    the optimizer see it.

    Exact zeros under ``find_unused_parameters`` or ``static_graph`` stand for a parameter that no
    rank used: DDP does not tell them apart from a gradient that is zero. Such a parameter is
    skipped in that step, its queue unchanged. In every other case a zero gradient is queued.
    Parameters that DDP keeps from every hook (``delay_all_reduce_named_params``, ignored ones) are
    not weighted.

    With ``shard_queue=True`` a bucket is reduce-scattered, each rank weights and queues its slice,
    and the slices are gathered. The result is the same up to the order of summation (bit for bit
    with two ranks), the queue's memory is divided by the world size, and the bytes on the wire are
    plain DDP's: beside them go at most W - 1 elements of padding per bucket, and one byte per
    parameter that is cut between ranks (16 more with ``match_norm``). When DDP cuts its buckets
    anew, after the first steps, the slices move once. ``metrics``, ``digest`` and ``state_dict``
    then communicate: every rank must call them. On the CPU the hook waits for the first half of the
    exchange, on a GPU for nothing. A process group that changes needs a loaded state.

    With ``n_clusters=K`` each rank groups its own samples and weights its K centroids with the
    shared statistics in its one backward pass; the weighted gradients are reduced, and beside them
    the raw means in the queue's type, which are queued. Ranks count by their samples, so W ranks
    are one process with those W * K clusters, also where their batches differ in size. The
    effective length of a step is that of the losses before it. ``metrics`` then communicates: every
    rank must call it. With ``shard_queue=True`` the mean and 1 / sigma of all slices are gathered
    while the optimizer and the next forward pass run, 2 numbers per element beside L / W.

    Save ``state.state_dict()`` and load it into the live state of the new run, on every rank; the
    object itself is not pickled. A copy of the DDP module carries no hook, as always in torch.

    Args:
        model: the model, bare, compiled or wrapped in DDP.
        **options: those of ``ClusterOptions``, ``LawOptions`` and ``HookOptions``; with K = 1
            ``features`` may be None, which makes each rank's mean a centroid.

    Raises:
        ValueError: an option that cannot hold, or a complex parameter.

    Example:
        >>> from torch.nn.parallel import DistributedDataParallel
        >>> from gq_triton.dist import GradQueueState, grad_queue_hook
        >>> model = torch.nn.Linear(4, 2)
        >>> state = GradQueueState(model)
        >>> ddp = DistributedDataParallel(model)  # the process group is there
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
        self.shard_queue = bool(hook.shard_queue)
        kind = _KINDS[clusters.n_clusters is not None, self.shard_queue]
        self.queues: Queues = kind(params, lambda: self.process_group, law)
        # What decides the result, or which collectives are called, and must be the same everywhere.
        shared = vars(law) | {name: getattr(clusters, name) for name in _SHARED}
        shared |= {"shard_queue": self.shard_queue, "verify_every": hook.verify_every}
        self._options = {name: _comparable(v) for name, v in shared.items() if name != "backend"}
        self._options["n_clusters (given or not)"] = clusters.n_clusters is not None
        self.grad_scaler = hook.grad_scaler
        self.verify_every = hook.verify_every
        # A weak reference: a hook that holds its DDP module keeps it alive forever (pytorch#63211).
        self._ddp = None if ddp is None else weakref.ref(ddp)
        self.buckets = Buckets(params, law.backend)
        # Callbacks of several buckets may run at once in threads of the process group.
        self.lock = threading.Lock()
        self.streams = SideStreams()
        self._steps = 0
        self.shares_known = False
        self._mean_loss = MeanLoss()
        self.local: LocalClusters | None = None
        if clusters.n_clusters is not None:
            assert isinstance(self.queues, (ClusteredQueues, ClusteredSlices))
            self.claim()  # from now on backward passes leave weighted gradients
            self.local = LocalClusters(
                bare(model if ddp is None else ddp.module), self.queues, self, clusters
            )

    def claim(self) -> None:
        """Note that the hook weights the model's gradients.

        Raises:
            ValueError: something else weights them already.
        """
        alive = weakref.ref(self)

        def active() -> bool:
            state = alive()
            return state is not None and (state.local is not None or state.ddp is not None)

        claim(self.queues.params.values(), self, HOOK, active)

    def joining(self) -> bool:
        """Return whether ranks may run out of batches (``DDP.join``)."""
        return self.ddp is not None and self.ddp._join_config.enable

    @property
    def labels_(self) -> Tensor | None:
        """The cluster of every sample of this rank's last batch, ``(B,)`` int64."""
        last = None if self.local is None else self.local.last
        return None if last is None else last.labels

    @property
    def cluster_sizes_(self) -> list[int] | None:
        """Samples in each cluster of this rank's last batch."""
        last = None if self.local is None else self.local.last
        return None if last is None else last.sizes

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
        """Tell the effective length this step's loss on this rank, unscaled; before ``backward``.

        The next synchronized backward pass averages over the ranks what each of them has recorded
        since the last one, so several micro-batches, or a rank that has joined, are no matter.
        Nothing waits for the loss or for its mean.

        Args:
            loss: one number, 0-d or one element.
        """
        if self.queues.options.loss_window is not None:
            self._mean_loss.record(loss)

    def metrics(self) -> dict[str, Any]:
        """Return what the law did in the last step, the same on every rank.

        With ``shard_queue`` or clusters every rank must call: each knows about its own part only.

        Returns:
            ``mean_weight``; ``norm_ratio``, ``|g*| / |g|`` over all parameters; ``saturated_high``
            and ``saturated_low``, shares of elements at rho and at 1/rho; ``effective_length``;
            with clusters ``cluster_sizes``, a list for each rank. Empty before the first step.
            Transfers to the host happen here and only here.
        """
        values: dict[str, Any] = dict(self.queues.metrics())
        if values and self.local is not None:
            sizes: list[Any] = [None] * dist.get_world_size(self.process_group)
            dist.all_gather_object(sizes, self.cluster_sizes_, group=self.process_group)
            values["cluster_sizes"] = sizes
        return values

    def digest(self) -> str:
        """Return the SHA-256 of the queue, equal on all ranks after every step. Reads all of it.

        It is that of the content, wherever it lies: with ``shard_queue`` every rank must call, and
        the slices are gathered, parameter by parameter.
        """
        return self.queues.digest()

    def state_dict(self) -> dict[str, Any]:
        """Return the queue by parameter name: tensors and plain values, the same on every rank.

        It loads into any world size, sliced or not. With ``shard_queue`` it is gathered, parameter
        by parameter, into the memory of the CPU: every rank must call, whoever writes.
        ``torch.load(weights_only=True)`` reads it, and ``torch.distributed.checkpoint`` takes the
        state itself.

        Returns:
            ``queue``: rings ``(L, *param.shape)`` by name; ``queued``: how many gradients each has
            taken; ``losses``; ``options``; ``buckets``: the names in every bucket of the last step;
            ``clusters``: with clusters, what each rank's k-means goes on from. It is gathered:
            every rank must call.
        """
        if self.local is not None:
            self.take_loss()  # the next step's first act otherwise
        self.queues.init_state()
        state = {**self.queues.state_dict(), BUCKETS: self.buckets.layout()}
        return state if self.local is None else {**state, CLUSTERS: self.local.states()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state; every rank must.

        With the same world size training continues bit for bit, if it was saved after the second
        step or later (the third with ``static_graph``). The order in which more than two ranks
        are summed depends on the buckets, and DDP cuts them anew in the first steps: until then the
        hook reduces them as they were cut when the state was saved.

        Raises:
            ValueError: the state belongs to another model or to other options. Nothing is changed.
        """
        self.check_saved(state)
        self.queues.load_state_dict(state)
        self.buckets.load(state.get(BUCKETS, []))
        if self.local is not None:
            self.local.load(state.get(CLUSTERS, []))
        self._mean_loss.reset()
        if isinstance(self.queues, SlicedQueues) and self.ddp is not None:
            # At once, so that no rank goes on with the whole queue.
            for names in self.buckets.saved:
                self.queues.place(names)

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
        if self.local is not None:
            self.local.check_saved(state.get(CLUSTERS, []), every_rank=every_rank)

    def __deepcopy__(self, memo: dict[int, Any]) -> "GradQueueState":
        """Return the state itself: the copy of a DDP module, such as an average, has no hook."""
        return self

    def __reduce__(self) -> str:
        """Refuse to be pickled."""
        raise TypeError(
            "GradQueueState is not pickled: save state.state_dict(), and load it into the state "
            "of the new run"
        )

    def begin(self, names: tuple[str, ...], device: torch.device) -> None:
        """Notice the first bucket of a backward pass, and do there what is due once per step."""
        _ = self.ddp  # which may be another one than in the last step
        if not self.buckets.begins_step(names):
            return
        self._steps += 1
        if self._steps == 1:
            self.claim()
            texts = {name: repr(value).encode() for name, value in self._options.items()}
            digests = {name: hashlib.sha256(text).digest() for name, text in texts.items()}
            check_same(digests, self.process_group, device, "the first backward pass", "option")
        if self.local is not None:
            self.take_loss()  # where this rank has joined, no backward pass of its own has
        if self.verify_every and self._steps % self.verify_every == 0:
            digests = self.queues.shared_digests()
            check_same(digests, self.process_group, device, f"backward pass {self._steps}")
        if self.queues.options.loss_window is not None:
            self._mean_loss.start(device, self.process_group)
        self.shares_known = False

    def take_loss(self) -> None:
        """Tell the queue the mean loss of this step, before its first bucket is weighted."""
        loss = self._mean_loss.take()
        if loss is not None:
            self.queues.record_loss(loss)

    def next_length(self, device: torch.device) -> Tensor | None:
        """Return the effective length of the next step, which this step's loss decides; or None."""
        return self.queues.effective_length(device, self._mean_loss.peek())

    def loss_scale(self, device: torch.device) -> Tensor | None:
        """Return the loss scale that the gradients carry, 0-d; None where there is none."""
        scaler = self.grad_scaler
        if scaler is None or not scaler.is_enabled():
            return None
        scale = scaler._get_scale_async()
        return None if scale is None else scale.to(device, non_blocking=True)
