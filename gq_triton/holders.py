"""The optimizers and plug-ins of a captured step: what a replay is bound to, and what it shows."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from gq_triton.attachment import attached_to
from gq_triton.cluster_grad import Clusters
from gq_triton.divided import dtensor
from gq_triton.grad_queue import GradQueue
from gq_triton.living import living
from gq_triton.optim.base import GradQueueOptimizer
from gq_triton.ring import local

__all__ = ["Holders", "Options"]

Options = list[list[dict[str, Any]]]
DDP_WARMUP = 11  # the reducer measures its first ten steps with events, which no capture may hold


class Holders:
    """The optimizers that a step steps, and the plug-ins that are attached to them.

    A replay runs no Python. So what Python has decided in the step must stay, and what Python shows
    after a step must be shown again.

    Args:
        holders: the optimizers, and plug-ins that may be attached later.

    Attributes:
        optimizers: the optimizers.
        divided: whether their parameters are divided among processes.

    Raises:
        ValueError: no optimizer.
    """

    def __init__(self, holders: Sequence[Optimizer | GradQueue]) -> None:
        self.optimizers = [holder for holder in holders if isinstance(holder, Optimizer)]
        if not self.optimizers:
            raise ValueError("cuda_graph needs the optimizers that the step steps, got none")
        self.divided = any(isinstance(p, dtensor()) for o in self.optimizers for p in _params(o))
        self._given = [holder for holder in holders if isinstance(holder, GradQueue)]
        self._steps = [0] * len(self.optimizers)
        self._usual: list[int] | None = None
        for place, optimizer in enumerate(self.optimizers):
            optimizer.register_step_post_hook(partial(self._stepped, place))
        # The samples' weights that the last call left in each plug-in.
        self._left: dict[GradQueue, Tensor | None] = {}

    @property
    def queues(self) -> list[GradQueue]:
        """The plug-ins that were given or are attached to an optimizer."""
        found = dict.fromkeys(self._given)
        for optimizer in self.optimizers:
            found.update(dict.fromkeys(attached_to(optimizer)))
        return list(found)

    def kept_from_a_graph(self, warmup: int) -> str | None:
        """Return why the step cannot be captured on these ranks, as a clause; None where it can.

        Args:
            warmup: how many steps come before a capture.
        """
        if self.divided:
            return _DIVIDED
        if not (dist.is_available() and dist.is_initialized()):
            return None
        mine = {id(param) for optimizer in self.optimizers for param in _params(optimizer)}
        for ddp in living(DistributedDataParallel):
            if not mine.isdisjoint(map(id, ddp.parameters())):
                if ddp._comm_hooks:
                    return _HOOKED
                if warmup < DDP_WARMUP:
                    return _WRAPPED
        return None

    def places(self) -> list[Any]:
        """Return what a replay is bound to: addresses, hooks, and which parameters train."""
        found: list[Any] = []
        for optimizer in self.optimizers:
            hooks = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
            found += [id(hook) for table in hooks for hook in table.values()]
            found.append(isinstance(optimizer, GradQueueOptimizer) and optimizer._measures)
            for param in _params(optimizer):
                found += param.data_ptr(), param.requires_grad
            for state in optimizer.state.values():
                found += [v.data_ptr() for v in state.values() if isinstance(v, Tensor)]
        for queue in self.queues:
            found += [local(tensor).data_ptr() for tensor in queue._tensors()]
        return found

    def learned(self) -> list[Any]:
        """Return what the plug-ins have learned of the model from its steps."""
        return [_learned(queue._clusters) for queue in self.queues]

    def begin(self) -> None:
        """Check, before a call, what was given to the plug-ins since the last one.

        Raises:
            RuntimeError: a replay would not see it.
        """
        found = [queue._clusters for queue in self.queues]
        given = [clusters.labeller.given for clusters in found if clusters is not None]
        if any(labels is not None and labels.waits for labels in given):
            raise RuntimeError(_OUTSIDE.format(what="set_labels"))
        for queue, clusters in zip(self.queues, found, strict=True):
            now = None if clusters is None else clusters.sample_weights
            if self._left.get(queue, now) is not now:
                raise RuntimeError(_OUTSIDE.format(what="set_sample_weights"))

    def end(self) -> None:
        """Note what the plug-ins hold after a call."""
        for queue in self.queues:
            clusters = queue._clusters
            self._left[queue] = None if clusters is None else clusters.sample_weights

    def watched(self, run: Callable[[], Any]) -> Any:
        """Run a step; return its result.

        Raises:
            RuntimeError: Python has done something in the step that a replay would not do.
        """
        self._steps = [0] * len(self.optimizers)
        numbers, rates = self._numbers(), self._rates()
        result = run()
        for key, (optimizer, value) in self._numbers().items():
            if key in numbers and numbers[key][1] != value:
                raise RuntimeError(
                    f"{type(optimizer).__name__} keeps {key[-1]} as a number of Python, which "
                    "changes within the step and in no replay: take capturable=True or another "
                    "optimizer, and step schedulers outside the step"
                )
        if rates != self._rates():
            raise RuntimeError(
                "the learning rate changes within the step, where every replay would set the same "
                "number: step schedulers outside the step"
            )
        self._check_devices()
        self._check_steps()
        return result

    def _numbers(self) -> dict[tuple[Any, ...], tuple[Optimizer, Any]]:
        """Return the numbers of Python in groups and states, by their places."""
        found: dict[tuple[Any, ...], tuple[Optimizer, Any]] = {}
        for optimizer in self.optimizers:
            for number, group in enumerate(optimizer.param_groups):
                for name, value in group.items():
                    if isinstance(value, (int, float)):
                        found[id(optimizer), number, name] = optimizer, value
            for param, state in optimizer.state.items():
                for name, value in state.items():
                    if isinstance(value, (int, float)):
                        found[id(optimizer), id(param), name] = optimizer, value
        return found

    def _rates(self) -> list[Any]:
        """Return how often each learning rate on a device was written to."""
        rates = [group["lr"] for o in self.optimizers for group in o.param_groups if "lr" in group]
        return [rate._version for rate in rates if isinstance(rate, Tensor)]

    def _check_devices(self) -> None:
        for optimizer in self.optimizers:
            for param, state in optimizer.state.items():
                for name, value in state.items():
                    if isinstance(value, Tensor) and value.device != param.device:
                        raise RuntimeError(
                            f"{type(optimizer).__name__} keeps {name} on {value.device}, where no "
                            "replay changes it: take capturable=True, or another optimizer"
                        )

    def _check_steps(self) -> None:
        usual = self._usual = self._usual or list(self._steps)
        for optimizer, steps, first in zip(self.optimizers, self._steps, usual, strict=True):
            if steps == 0 or steps != first:
                counts = f"{steps} times" if steps == first else f"{steps} times, {first} before"
                raise RuntimeError(
                    f"a call stepped {type(optimizer).__name__} {counts}, and a replay repeats one "
                    "call: accumulate and step within the step, every time, and with a GradScaler "
                    "take an optimizer that skips steps on the device (fused=True)"
                )

    def _stepped(self, place: int, *_: Any) -> None:
        self._steps[place] += 1

    def shown(self) -> Callable[[], None]:
        """Return what shows the step that was just captured, after a replay of it.

        Another step may have run since, or have been replayed.
        """
        grads = [(param, param.grad) for o in self.optimizers for param in _params(o)]
        own = [o for o in self.optimizers if isinstance(o, GradQueueOptimizer)]
        measured = [(optimizer, optimizer._measured) for optimizer in own]
        queues = [_shown(queue) for queue in self.queues]

        def show() -> None:
            for param, grad in grads:
                if param.grad is not grad:
                    param.grad = grad
            for optimizer, figures in measured:
                optimizer._measured = figures
            for again in queues:
                again()

        return show

    def options(self) -> Options:
        """Return the options of every group: not what a scheduler keeps there, nor the losses."""
        return [
            [{name: group[name] for name in o.defaults} for group in o.param_groups]
            for o in self.optimizers
        ]

    def check_options(self, captured: Options) -> None:
        """Raise a RuntimeError if an option is another one than in the capture."""
        for optimizer, before, now in zip(self.optimizers, captured, self.options(), strict=True):
            for number, (old, new) in enumerate(zip(before, now, strict=True)):
                for name, value in old.items():
                    if not _same(new[name], value):
                        raise RuntimeError(
                            f"{name} of group {number} of {type(optimizer).__name__} was changed "
                            "after the step was captured, which a replay cannot see: change a "
                            "tensor on the device in place, or call reset() on the captured step"
                        )


def _params(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _learned(clusters: Clusters | None) -> Any:
    """Return what steps have shown of a model, and what follows for its next one."""
    if clusters is None or not clusters.installed:
        return None
    known = dict(clusters.accumulator.coverage.known)
    followed = list(clusters._conversion._followed)
    return list(clusters.owners.values()), known, followed, clusters.batch_size.place


def _shown(queue: GradQueue) -> Callable[[], None]:
    """Return what has a plug-in show its last step again, after a replay in the same memory."""
    clusters, show = queue._clusters, queue._queues._last.shown()
    last = None if clusters is None else clusters.last

    def again() -> None:
        show()
        if clusters is not None:
            clusters.last = last
        if last is not None and last.known_groups is not None:
            last.known_groups.renew()

    return again


def _same(now: Any, before: Any) -> bool:
    if isinstance(now, Tensor) or isinstance(before, Tensor):
        return now is before
    return bool(now == before)


_DIVIDED = (
    "its parameters are divided among processes, as by fully_shard, whose messages no replay was "
    "shown to repeat"
)
_HOOKED = "the communication hook of DistributedDataParallel needs Python in every step"
_WRAPPED = (
    f"torch captures a DistributedDataParallel module after {DDP_WARMUP} steps: give "
    f"warmup={DDP_WARMUP} if it was built in a side stream, over NCCL, and all ranks get batches "
    "of the same shapes"
)
_OUTSIDE = (
    "{what} was called between two calls of a step of cuda_graph, and a replay would not see it: "
    "call it within the step, with a tensor that the step is given"
)
