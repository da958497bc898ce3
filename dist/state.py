"""What the DDP communication hook keeps between backward passes."""

import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from gq_triton.backend import engine
from gq_triton.dist.wrappers import carries, ddp_carrying, find_ddp
from gq_triton.names import parameter_names
from gq_triton.queues import Queues

__all__ = ["GradQueueState"]

# Key of the saved state: the buckets of the last step, as lists of parameter names.
BUCKETS = "buckets"


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

    Save ``state.state_dict()`` and load it into the live state of the new run, on every rank; the
    object itself is not pickled. A copy of the DDP module carries no hook, as always in torch.

    Args:
        model: the model, bare, compiled or wrapped in DDP.
        n_clusters: clusters per rank; only None, one cluster over the global batch, is available.
        features: name of the layer whose output is clustered.
        queue_length: L, gradients kept per element.
        min_queue_length: lower bound of the effective length.
        rho: bound of the weight, at least 1; 1 switches the law off.
        loss_window: None keeps the effective length at L; w turns on the paper's rule, fed by
            ``record_loss``.
        queue_dtype: type of the queue; None takes the parameter's.
        match_norm: rescale each parameter's weighted gradient to the norm of the raw one.
        backend: ``"auto"``, ``"triton"``, ``"numba"`` or ``"torch"``.
        shard_queue: divide the queue among the ranks; only False is available.
        grad_scaler: the ``GradScaler`` of the run, which must scale alike on every rank; the queue
            then holds unscaled gradients.
        verify_every: N compares the ranks' queues at the start of every N-th backward pass and
            raises a RuntimeError that names the first parameter that differs; 0 does not. It reads
            the whole queue.

    Raises:
        ValueError: an option that cannot hold, or a complex parameter.

    Example:
        >>> state = GradQueueState(model)  # doctest: +SKIP
        >>> ddp = DistributedDataParallel(model)  # doctest: +SKIP
        >>> ddp.register_comm_hook(state, grad_queue_hook)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        n_clusters: int | None = None,
        features: str | None = None,
        queue_length: int = 5,
        min_queue_length: int = 3,
        rho: float = 3.0,
        loss_window: int | None = None,
        queue_dtype: torch.dtype | None = None,
        match_norm: bool = False,
        backend: str = "auto",
        shard_queue: bool = False,
        grad_scaler: GradScaler | None = None,
        verify_every: int = 0,
    ) -> None:
        for option, value in (("n_clusters", n_clusters), ("features", features)):
            if value is not None:
                raise ValueError(
                    f"{option} must be None in this version, got {value!r}: clusters under DDP are "
                    "not available yet"
                )
        if shard_queue:
            raise ValueError("shard_queue must be False in this version: it is not available yet")
        if int(verify_every) != verify_every or verify_every < 0:
            raise ValueError(f"verify_every must be an integer >= 0, got {verify_every}")
        ddp = find_ddp(model)
        params = parameter_names(model if ddp is None else ddp.module)
        for name, param in params.items():
            if param.requires_grad and param.is_complex():
                raise ValueError(
                    f"{name} must have a real floating type, got {param.dtype}: hold it as "
                    "torch.view_as_real"
                )
        self.queues = Queues(
            params,
            queue_length=queue_length,
            min_queue_length=min_queue_length,
            rho=rho,
            loss_window=loss_window,
            queue_dtype=queue_dtype,
            match_norm=match_norm,
            backend=backend,
        )
        self.grad_scaler = grad_scaler
        self.verify_every = verify_every
        # A weak reference: a hook that holds its DDP module keeps it alive forever (pytorch#63211).
        self._ddp = None if ddp is None else weakref.ref(ddp)
        self._names = {id(param): name for name, param in params.items()}
        self._checked: set[tuple[str, ...]] = set()
        # Callbacks of several buckets may run at once in threads of the process group.
        self._lock = threading.Lock()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._steps = 0
        self._seen: set[str] = set()
        self._buckets: list[tuple[str, ...]] = []
        self._saved_buckets: list[tuple[str, ...]] = []
        self._steps_since_load = 0
        self._losses: list[Tensor] = []
        self._warned_losses = loss_window is None
        self._mean_loss: tuple[dist.Work, Tensor] | None = None
        self._mean_loss_due = False

    @property
    def ddp(self) -> DistributedDataParallel | None:
        """The DDP module that this state serves; None before there is one."""
        ddp = None if self._ddp is None else self._ddp()
        if ddp is None or not carries(ddp, self):
            registered = ddp_carrying(self, set(self._names))
            if registered is not None:
                ddp = registered
                self._ddp = weakref.ref(ddp)
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
        if self.queues.loss_window is not None:
            value = torch.as_tensor(loss).detach().reshape(())
            self._losses.append(value.to(torch.float64, copy=True))
            self._warned_losses = True

    def metrics(self) -> dict[str, float]:
        """Return what the law did in the last step, the same on every rank.

        Returns:
            ``mean_weight``; ``norm_ratio``, ``|g*| / |g|`` over all parameters; ``saturated_high``
            and ``saturated_low``, shares of elements at rho and at 1/rho; ``effective_length``.
            Empty before the first step. One transfer to the host, here and only here.
        """
        return self.queues.metrics()

    def digest(self) -> str:
        """Return the SHA-256 of the queue, equal on all ranks after every step. Reads all of it."""
        return self.queues.digest()

    def state_dict(self) -> dict[str, Any]:
        """Return the queue by parameter name: tensors and plain values, the same on every rank.

        It loads into any world size. ``torch.load(weights_only=True)`` reads it, and
        ``torch.distributed.checkpoint`` takes the state itself.

        Returns:
            ``queue``: rings ``(L, *param.shape)`` by name; ``queued``: how many gradients each has
            taken; ``losses``; ``options``; ``buckets``: the names in every bucket of the last step.
        """
        self.queues.init_state()
        buckets = [list(names) for names in self._buckets or self._saved_buckets]
        return {**self.queues.state_dict(), BUCKETS: buckets}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state; every rank must.

        With the same world size training continues bit for bit, if it was saved after the second
        step or later (the third with ``static_graph``). The order in which more than two ranks
        are summed depends on the buckets, and DDP cuts them anew in the first steps: until then the
        hook reduces them as they were cut when the state was saved.

        Raises:
            ValueError: the state belongs to another model or to other options. Nothing is changed.
        """
        self.queues.load_state_dict(state)
        self._saved_buckets = [tuple(names) for names in state.get(BUCKETS, [])]
        self._buckets = []
        self._seen = set()
        self._steps_since_load = 0
        self._losses = []
        self._mean_loss_due = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "GradQueueState":
        """Return the state itself: the copy of a DDP module, such as an average, has no hook."""
        return self

    def __reduce__(self) -> str:
        """Refuse to be pickled."""
        raise TypeError(
            "GradQueueState is not pickled: save state.state_dict(), and load it into the state "
            "of the new run"
        )

    def _bucket_names(self, bucket: Any) -> tuple[str, ...]:
        """Return the parameters' names in the order of a bucket; check what is new."""
        params = bucket.parameters()
        unknown = [tuple(param.shape) for param in params if id(param) not in self._names]
        if unknown:
            raise ValueError(
                f"DDP reduces a parameter of shape {unknown[0]} that the state does not know: "
                "build GradQueueState from the model that DDP wraps, after its last change"
            )
        names = tuple(self._names[id(param)] for param in params)
        if names not in self._checked:
            buffer = bucket.buffer()
            if buffer.layout != torch.strided:
                raise ValueError(
                    f"{', '.join(names)} has a gradient of layout {buffer.layout}, which a queue "
                    "cannot hold: build the layer with sparse=False"
                )
            for name, param in zip(names, params, strict=True):
                _check_memory(name, param)
            engine(buffer.device, self.queues.backend)
            self._checked.add(names)
        return names

    def _begin(self, names: tuple[str, ...], device: torch.device) -> None:
        """Notice the first bucket of a backward pass, and do there what is due once per step.

        Bucket numbers do not tell (two are 0 in the first step of a static graph), nor does the
        engine's end of backward (a rank that has joined has none): a pass begins with the first
        bucket, and again whenever a parameter comes a second time.
        """
        if self._seen and self._seen.isdisjoint(names):
            self._seen.update(names)
            return
        self._steps += 1
        self._steps_since_load += 1
        self._seen = set(names)
        self._buckets = []
        if self.verify_every and self._steps % self.verify_every == 0:
            self._verify(device)
        if self.queues.loss_window is not None:
            self._average_loss(device)

    def _verify(self, device: torch.device) -> None:
        """Raise a RuntimeError unless the queue is the same on all ranks."""
        digests = self.queues.digests()
        content = bytearray(b"".join(digests.values()))
        mine = torch.frombuffer(content, dtype=torch.uint8).to(device)
        group = self.process_group
        tables = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(tables, mine, group=group)
        table = torch.stack(tables).view(len(tables), len(digests), -1)
        same = (table == table[0]).all(dim=-1)
        for name, ranks in zip(digests, same.T.tolist(), strict=True):
            if not all(ranks):
                others = [rank for rank, equal in enumerate(ranks) if not equal]
                raise RuntimeError(
                    f"the queue of {name!r} differs between the ranks (rank 0 from {others}) in "
                    f"backward pass {self._steps}: every rank must load the same state and have "
                    "the same options; a run that did is to be resumed from its last checkpoint"
                )

    def _average_loss(self, device: torch.device) -> None:
        """Start to average the losses recorded since the last step over all ranks."""
        if not self._warned_losses:
            self._warned_losses = True
            warnings.warn(
                "loss_window is set but no loss was recorded, so the effective length stays at "
                "min_queue_length: call state.record_loss(loss) before loss.backward()",
                stacklevel=2,
            )
        total = torch.zeros(2, dtype=torch.float64, device=device)
        for loss in self._losses:
            total[0].add_(loss.to(device, non_blocking=True))
            total[1].add_(1)
        self._losses = []
        work = dist.all_reduce(total, group=self.process_group, async_op=True)
        assert work is not None
        # Kept until the next step: another stream reads it.
        self._mean_loss = work, total
        self._mean_loss_due = True

    def _reduce(self, names: tuple[str, ...], buffer: Tensor) -> Future:
        """Start to average a bucket over the group, in place; without a hook DDP does the same."""
        group = self.process_group
        # DDP multiplies by the reciprocal too: dividing rounds otherwise for 3 ranks.
        buffer.mul_(1.0 / dist.get_world_size(group))
        former = self._former_buckets(names)
        if not former:
            self._buckets.append(names)
            work = dist.all_reduce(buffer, group=group, async_op=True)
            assert work is not None
            return work.get_future()
        slices = dict(zip(names, self._split(names, buffer), strict=True))
        parts = [[slices[name] for name in bucket] for bucket in former]
        wholes = [torch.cat(part) for part in parts]
        # Waiting is no loss here: it is for one step, whose only bucket this usually is.
        for whole in wholes:
            dist.all_reduce(whole, group=group)
        for part, whole in zip(parts, wholes, strict=True):
            for piece, mean in zip(part, whole.split([p.numel() for p in part]), strict=True):
                piece.copy_(mean)
        self._buckets += former
        done = Future(devices=[buffer.device] if buffer.is_cuda else None)
        done.set_result(buffer)
        return done

    def _former_buckets(self, names: tuple[str, ...]) -> list[tuple[str, ...]]:
        """Return the buckets of the saved run that this one is to be reduced as; none: as it is."""
        ddp = self.ddp
        initial = 2 if ddp is not None and ddp.static_graph else 1
        if self._steps_since_load > initial or names in self._saved_buckets:
            return []
        members = set(names)
        former = [bucket for bucket in self._saved_buckets if not members.isdisjoint(bucket)]
        return former if sum(map(len, former)) == len(members.union(*former)) == len(names) else []

    def _split(self, names: Sequence[str], buffer: Tensor) -> list[Tensor]:
        """Return the parameters' slices of a bucket, flat and in their memory order.

        ``bucket.gradients()`` would be wrong: it reads the slices in row-major order, DDP writes
        them in the parameter's (channels_last).
        """
        return list(buffer.split([self.queues.params[name].numel() for name in names]))

    @torch.no_grad()
    def _weigh(self, names: tuple[str, ...], buffer: Tensor, reduced: Future) -> Tensor:
        """Weight a reduced bucket in place and queue the raw one; local work only.

        Runs in a thread of gloo, where waiting for another collective could deadlock, or on a
        stream that follows the reduction.
        """
        reduced.value()  # raises what the reduction raised
        with self._lock, self._stream(buffer.device):
            if self._mean_loss is not None and self._mean_loss_due:
                work, total = self._mean_loss
                # Launched before this bucket: waits for no thread that could be waiting for us.
                work.wait()
                self._mean_loss_due = False
                self.queues.record_loss(total[0] / total[1])
            grads = self._split(names, buffer)
            scaler = self.grad_scaler
            scale = None
            if scaler is not None and scaler.is_enabled():
                scale = scaler._get_scale_async()
            if scale is not None:
                scale = scale.to(buffer.device, non_blocking=True)
            absent = None
            if self._skips_zeros():
                # A sum of magnitudes: 0 only where every element is, as squares would not be.
                sums = torch._foreach_norm(grads, 1)  # pyright: ignore[reportPrivateImportUsage]
                absent = torch.stack(sums) == 0
            self.queues.weigh_(names, grads, grad_scale=scale, found_inf=absent)
        return buffer

    def _skips_zeros(self) -> bool:
        ddp = self.ddp
        return ddp is not None and (ddp.find_unused_parameters or ddp.static_graph)

    @contextmanager
    def _stream(self, device: torch.device) -> Iterator[None]:
        """Work in one stream per device, between the current stream's past and its future.

        Every bucket's callback comes on another stream of a pool; what they share, such as the
        losses, has to be written before it is read.
        """
        if device.type != "cuda":
            yield
            return
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream, current = self._streams[device], torch.cuda.current_stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            yield
        current.wait_stream(stream)


def _check_memory(name: str, param: Tensor) -> None:
    """Raise a ValueError where DDP would lay out the gradient otherwise than the ring is."""
    row = torch.empty_like(param, device="meta", memory_format=torch.preserve_format)
    if row.stride() != param.stride() and not row.is_contiguous():
        raise ValueError(
            f"{name} of strides {param.stride()} has holes in memory: make it contiguous before "
            "DDP wraps the model"
        )
