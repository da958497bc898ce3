"""The accumulator, which brings the sink's gradients into ``p.grad`` and keeps the raw ones.

A layer's backward pass returns a *marker* in place of a parameter's gradient: zeros that take no
memory. Autograd adds up everything that the backward pass has for the parameter, then calls a hook
of the parameter with the total. If the total is the marker alone, the whole gradient is known by
cluster, and the hook returns the gradient that the sink made of the sums. If the total is more, the
parameter was used past its layers, and the sink takes the whole gradient as that of one cluster.
"""

import itertools
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gq_triton.cluster_grad.batch import Arguments
from gq_triton.cluster_grad.forming import Sums
from gq_triton.cluster_grad.hooks import LOST, hooks_around
from gq_triton.cluster_grad.later import Later
from gq_triton.cluster_grad.lookout import Lookout
from gq_triton.cluster_grad.passes import in_backward
from gq_triton.cluster_grad.raw import RawGradients
from gq_triton.cluster_grad.sink import Sink, Taken
from gq_triton.cluster_grad.site import Block, new_number
from gq_triton.cluster_grad.step import Partial, Step
from gq_triton.grouping.groups import Groups
from gq_triton.ring import flat

__all__ = ["Accumulator"]


def _none() -> None:
    return None


@dataclass(eq=False)
class _Waiting:
    """The gradients that layers have given for a parameter whose hook was not called yet.

    Attributes:
        marker: the marker that the first of the layers returned.
        taken: forward passes that use the parameter once, with the sink's gradients.
        steps: forward passes that use it several times; their sums are in ``Step.partial``.
    """

    marker: Tensor
    taken: list[tuple[Step, Taken]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)


class Accumulator:
    """The clustered gradients of one model while its plug-in is attached.

    Args:
        sink: the receiver of the layers' sums.
        names: the names of the model's parameters.
        covered: names of the parameters that belong to layers which sum by cluster.
        assign: returns the clusters of a step.
        leaves: by parameter name, the tensors to which autograd gives the gradients. None stands
            for the parameters themselves. Those of a sharded model are met in its forward pass.
        raw: keeps the raw gradients; None for those of one process.

    Attributes:
        step: the step of the latest forward pass, or None.
        raw: the raw gradients, kept while ``p.grad`` holds the weighted ones.
        known_by_cluster: by parameter name, whether the whole of its last gradient came from
            layers that sum by cluster.
    """

    def __init__(
        self,
        sink: Sink,
        names: dict[Tensor, str],
        covered: Iterable[str],
        assign: Callable[[Step], Groups],
        *,
        leaves: dict[str, Tensor] | None = None,
        raw: RawGradients | None = None,
    ) -> None:
        self._sink, self.backend = sink, sink.backend
        self.params = {name: param for param, name in names.items()}
        self.names = names
        self.leaves = self.params if leaves is None else leaves
        self.step: Step | None = None
        # A compiled graph holds these in place of the accumulator: see compiled_ops.py.
        self.number = new_number(self)
        self.clock = torch.zeros(1, dtype=torch.int64, device="cpu")
        self.token: Tensor | None = None
        self.batch, self.paused = 1, False
        # Whether the model's forward passes run unchanged for now, though clusters are installed.
        self.asleep = False
        self.lookout = Lookout()
        # Those of the forward pass that begins; None where a compiled graph runs it.
        self.arguments: Arguments | None = None
        self.inputs: Mapping[int, int] = {}
        self.batch_dim = 0
        self.trusted: set[tuple[Any, int]] = set()
        self.raw = RawGradients(self.params, self._first_step) if raw is None else raw
        self.known_by_cluster: dict[str, bool] = {}
        self.reasons: dict[str, str] = {}
        # Called with the names of parameters that were taken as one cluster's; finds a way to know
        # some of them by cluster from now on, and returns the others.
        self.mend: Callable[[list[str]], list[str]] | None = None
        self.strict = False
        # Returns the clusters that the loader brought for the forward pass that begins, if it does.
        self.given: Callable[[], Tensor | None] = _none
        # By parameter name, the class of the layer that sums its gradients.
        self.kinds: dict[str, str] = {}
        self._assign = assign
        self._scratch: dict[torch.dtype, Tensor] = {}
        self._markers: dict[Any, Tensor] = {}
        # Names of covered parameters without hooks so far, and the hooks of the others.
        self._covered = list(covered)
        self._unwatched = list(self._covered)
        self._hooks: list[Any] = []
        self.told: set[str] = set()
        # State of the running backward pass: gradients that wait for a parameter's hook, gradients
        # that the sink took as one cluster's, and the forward passes it goes through.
        self._waiting: dict[str, _Waiting] = {}
        self._whole: dict[str, Taken] = {}
        self._steps: list[Step] = []
        self._running = False
        # Names of parameters whose gradient has passed the first hook, and not the second.
        self._passed: set[str] = set()

    def new_step(self) -> Step:
        """Return the step of a forward pass that begins."""
        if not in_backward():
            self._end_pass()  # an error left the last one open
        if self._unwatched:
            self._watch()
        accumulator = weakref.ref(self)  # the registry of steps must not keep the model alive

        def assign(step: Step) -> Groups:
            alive = accumulator()
            if alive is None:
                raise RuntimeError("the GradQueue of this model is gone: keep it while training")
            return alive._assign(step)

        self.step = Step(
            assign, batch_dim=self.batch_dim, arguments=self.arguments, features=self.given()
        )
        return self.step

    @property
    def waits(self) -> bool:
        """Whether a forward or backward pass runs, or a forward pass waits for its backward."""
        step = self.step
        return self._running or (step is not None and (step.open or step.known_groups is None))

    def release(self) -> None:
        """Forget the last step, give its memory back and take the hooks from the parameters."""
        self.settle()
        self.step = self.token = None
        self._scratch.clear()
        self._markers.clear()
        self.raw.take_all()
        for handle in self._hooks:
            handle.remove()
        self._hooks.clear()
        self._unwatched = list(self._covered)  # for a second installation

    def meet(self, name: str, leaf: Tensor) -> None:
        """Note the tensor to which autograd gives a parameter's gradient, and watch it.

        Args:
            name: the parameter's name.
            leaf: what stands for the parameter in the forward pass that runs.
        """
        if self.leaves.get(name) is not leaf:
            self.leaves[name], self.names[leaf] = leaf, name
            if name in self._covered and name not in self._unwatched:
                self._unwatched.append(name)
        if name in self._unwatched:
            self._watch()

    def trainable(self, params: Iterable[Tensor]) -> list[str]:
        """Return the names of those parameters that need a gradient.

        Raises:
            RuntimeError: a parameter is another than when the clusters were installed.
        """
        needed = [param for param in params if param.requires_grad]
        for param in needed:
            if param not in self.names:
                raise RuntimeError(
                    f"the model has a parameter of shape {tuple(param.shape)} that its GradQueue "
                    "does not know, replaced later or given by functional_call: build the "
                    "GradQueue after the last change of the model, or call remove() on its handle "
                    "first"
                )
        return [self.names[param] for param in needed]

    def take_unknown(self, param: Tensor, reason: str) -> None:
        """Note why a parameter's gradient is not known by cluster in this backward pass."""
        name = self.names.get(param)
        if name is not None:
            self.reasons[name] = reason

    def uses(self, step: Step, param: Tensor) -> int:
        """Return how often a parameter was used in a forward pass."""
        return step.uses.get(self.names[param], 1)

    def scratch(self, clusters: int, elements: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Return memory for a parameter's sums ``(K, elements)``, valid until the next call.

        On the CPU every call returns the same memory: fresh pages cost more than the sums.
        """
        if self._keeps_sums(like.device):
            return torch.empty(clusters, elements, dtype=dtype, device=like.device)
        room = self._scratch.get(dtype)
        if room is None or room.numel() < clusters * elements:
            room = self._scratch[dtype] = torch.empty(clusters * elements, dtype=dtype)
        return room[: clusters * elements].view(clusters, elements)

    def _keeps_sums(self, device: torch.device) -> bool:
        """Return whether sums have memory of their own, which may be kept."""
        later = self._sink.later
        return device.type != "cpu" or (later is not None and later.serves(device))

    def give(
        self, step: Step, param: Tensor, blocks: Iterator[Block], dtype: torch.dtype
    ) -> Tensor | None:
        """Take the sums of one use of a parameter; return what the layer returns as gradient.

        If the forward pass uses the parameter several times, the sink takes the total of all uses.

        Args:
            step: the forward pass that the sums belong to.
            param: the parameter.
            blocks: parts of the parameter, in memory order, which together cover it.
            dtype: type of the sums.
        """
        name = self.names[param]
        if step.uses.get(name, 1) == 1:
            return self._wait(step, name, self._take(step, name, blocks, dtype))
        self._add_partial(step, name, blocks, dtype)
        return self._wait(step, name, None)

    def _add_partial(
        self, step: Step, name: str, blocks: Iterator[Block], dtype: torch.dtype
    ) -> None:
        """Add the sums of one use of a parameter that is used several times."""
        partial, param = step.partial.get(name), self.leaves[name]
        if partial is None:
            start, stop, sums = next(blocks)
            if stop - start == param.numel() and self._keeps_sums(sums.device):
                step.partial[name] = Partial(sums)
                return
            shape = step.groups.n_clusters, param.numel()
            partial = Partial(torch.zeros(shape, dtype=dtype, device=param.device), given=0)
            step.partial[name] = partial
            blocks = itertools.chain([(start, stop, sums)], blocks)
        partial.given += 1
        for start, stop, sums in blocks:
            partial.sums[:, start:stop] += sums

    def give_sums(self, step: Step, param: Tensor, sums: Sums, scale: bool) -> Tensor | None:
        """Take the sums of one use of a shift or scale; return what ``give`` returns.

        Args:
            step: the forward pass that the sums belong to.
            param: the parameter ``(N,)``.
            sums: the sums of the layer, which may be formed later.
            scale: whether the parameter is the scale.
        """
        name = self.names[param]
        once = step.uses.get(name, 1) == 1 and self.leaves[name].numel() == param.numel()
        later = self._later(step, name) if once else None
        if later is None:
            return self.give(step, param, sums.blocks(scale), sums.dtype)
        mine = later.form(sums)[1 if scale else 0]
        assert mine is not None
        return self._wait(step, name, later.take(name, step.groups, mine))

    def _later(self, step: Step, name: str) -> Later | None:
        """Return what takes the sums of a parameter that is used once, if they may wait."""
        later = self._sink.later
        first_use = name not in self._waiting and not step.traced and step.groups.unit == 1
        may_wait = later is not None and first_use and later.may_wait(self.leaves[name])
        return later if may_wait else None

    def _take(self, step: Step, name: str, blocks: Iterator[Block], dtype: torch.dtype) -> Taken:
        """Return the gradients of a parameter that is used once; their values may come later."""
        later, leaf = self._later(step, name), self.leaves[name]
        if later is not None:
            first = next(blocks)
            if first[1] - first[0] == leaf.numel():
                return later.take(name, step.groups, first[2])
            blocks = itertools.chain([first], blocks)
        later = self._sink.later
        if later is not None and name in later:
            later.settle()  # an earlier forward pass: the statistics are those of the last one
        return self._sink.take(name, step.groups, blocks, dtype)

    def settle(self) -> None:
        """Give values to all gradients that wait for one another."""
        if self._sink.later is not None:
            self._sink.later.settle()

    def give_rows(self, step: Step, param: Tensor, rows: Tensor, sums: Tensor) -> Tensor | None:
        """Take the sums of some rows of a table that is used once; return what ``give`` returns.

        Args:
            step: the forward pass that the sums belong to.
            param: the table ``(V, d)``, contiguous.
            rows: the touched rows ``(U,)`` int64, without repetition.
            sums: ``(K, U * d)``.
        """
        name = self.names[param]
        return self._wait(step, name, self._sink.take_rows(name, step.groups, rows, sums))

    def give_lookups(
        self, step: Step, param: Tensor, where: Tensor, grads: Tensor
    ) -> Tensor | None:
        """Take the lookups of a table that is used once; return what ``give`` returns.

        Args:
            step: the forward pass that the lookups belong to.
            param: the table ``(V, d)``, contiguous.
            where: the rows ``(n,)`` int64, the same number for each sample; V for a lookup that
                does not count.
            grads: ``(n, d)``.
        """
        name = self.names[param]
        return self._wait(step, name, self._sink.take_lookups(name, step.groups, where, grads))

    def _wait(self, step: Step, name: str, taken: Taken | None) -> Tensor | None:
        """Keep the gradient that a layer has given until the parameter's hook is called.

        Returns:
            The marker for the first layer; None, so that nothing is added, for the others.
        """
        waiting = self._waiting.get(name)
        first = waiting is None
        if waiting is None:
            waiting = self._waiting[name] = _Waiting(self._marker(self.leaves[name]))
        if taken is not None:
            waiting.taken.append((step, taken))
        elif step not in waiting.steps:
            waiting.steps.append(step)
        return waiting.marker if first else None

    def _marker(self, param: Tensor) -> Tensor:
        """Return zeros in the shape and type of a parameter, in the memory of one element."""
        key = param.device, param.dtype, param.shape
        if key not in self._markers:
            zero = torch.zeros((), dtype=param.dtype, device=param.device)
            self._markers[key] = zero.expand_as(param)
        return self._markers[key]

    def _come_together(self, name: str, total: Tensor | None) -> Tensor | None:
        """Return a parameter's gradient; None keeps ``total``.

        Args:
            name: the parameter's name.
            total: the sum that autograd has formed, with markers in place of layers' gradients.
                None where a compiled graph takes the parameter and does not use it.
        """
        # A paused accumulator sees a backward pass within a module that runs as a whole.
        if total is None or self.paused:
            return None
        if total.layout != torch.strided or total.is_complex():
            return None  # refused, in words, by what queues gradients
        waiting = self._waiting.pop(name, None)
        parts: list[tuple[Step, Taken]] = []
        if waiting is not None:
            parts = waiting.taken + [(s, self._take_partial(s, name)) for s in waiting.steps]
        elif not self._finds_groups():
            return None
        later = self._sink.later
        if later is not None and name in later:
            # A hook was added, or p.grad set, since the sums were taken; or the gradient is more
            # than the sums.
            alone = len(parts) == 1 and waiting is not None and total is waiting.marker
            if not alone or not later.may_wait(self.leaves[name]):
                later.settle()
        if name not in self._whole and waiting is not None and _is_marker(total, waiting):
            for step, taken in parts:
                self.raw.add(step, name, taken.raw)
            self.known_by_cluster[name] = True
            gradients = [self.raw.counted(step, taken.gradient) for step, taken in parts]
            return sum(gradients[1:], gradients[0])
        return self._take_whole(name, parts, total)

    def _finds_groups(self) -> bool:
        """Return whether a gradient that no layer has given can be taken as one cluster's.

        The samples of the forward pass must be known, and the backward pass must not be one that
        is differentiated again (``create_graph=True``).
        """
        step = self._steps[-1] if self._steps else self.step
        known = step is not None and (step.known_groups is not None or step.features is not None)
        return known and not torch.is_grad_enabled()

    def _take_partial(self, step: Step, name: str) -> Taken:
        """Return the sink's gradients of a parameter's sums, less those returned before.

        The hook is called more than once in a backward pass where a checkpointed segment runs its
        own backward pass before the parameter's other uses.
        """
        partial = step.partial[name]
        blocks = iter([(0, partial.sums.shape[1], partial.sums)])
        if partial.given == step.uses.get(name) and partial.taken is None:
            return self._take(step, name, blocks, partial.sums.dtype)  # no other use follows
        taken = self._sink.take(name, step.groups, blocks, partial.sums.dtype)
        before, partial.taken = partial.taken, taken
        if before is None:
            return taken
        return Taken(taken.gradient - before.gradient, taken.raw - before.raw)

    def _take_whole(self, name: str, parts: list[tuple[Step, Taken]], total: Tensor) -> Tensor:
        """Return the gradient of a parameter that was used past its layers, as one cluster's.

        Later calls in one backward pass return the difference to what was returned before.
        """
        self._open_pass()
        last = self._steps[-1] if self._steps else self.step
        step = parts[-1][0] if parts else last
        assert step is not None
        for earlier, taken in parts:
            self.raw.add(earlier, name, taken.raw)
        self.raw.add(step, name, total, whole=True)
        raw = sum((taken.raw for _, taken in parts), total)
        before = self._whole.get(name)
        if before is not None:
            raw = raw + before.raw
        taken = self._whole[name] = self._sink.take_whole(name, step.groups, raw)
        self.known_by_cluster[name] = False
        gradient = taken.gradient if before is None else taken.gradient - before.gradient
        return self.raw.counted(step, gradient, whole=True)

    def _first_step(self) -> Step | None:
        """Return the first forward pass of the running backward pass, or else the latest one."""
        return self._steps[0] if self._steps else self.step

    def _open_pass(self) -> None:
        """Have autograd call ``_end_pass`` when the running backward pass ends."""
        if not self._running:
            self._running = True
            self.raw.begin_pass()
            engine = torch.autograd.Variable._execution_engine  # pyright: ignore[reportAttributeAccessIssue]
            engine.queue_callback(self._end_pass)

    def enter_pass(self, step: Step) -> None:
        """Note that the running backward pass computes a step's gradients."""
        if not step.finishing:
            step.finishing = True
            self._steps.append(step)
        self._open_pass()

    def _end_pass(self) -> None:
        """Forget incomplete sums and gradients that did not reach ``p.grad``; warn where due."""
        self.settle()
        for step in self._steps:
            step.finishing = False
            step.partial.clear()
        whole = [name for name in self._whole if name not in self.told]
        traced = any(step.traced for step in self._steps)
        self.raw.end_pass()
        self._steps, self._waiting, self._whole, self._running = [], {}, {}, False
        self._passed.clear()
        if whole and not traced and self.mend is not None:
            whole = self.mend(whole)
        self._tell(whole)

    def why_whole(self, name: str) -> str:
        """Return why a parameter's last gradient was taken as one cluster's."""
        kind = self.kinds.get(name)
        return self.reasons.get(
            name, f"used past {kind}" if kind else "used where the samples cannot be told apart"
        )

    def note_later(self, names: Iterable[str]) -> None:
        """Note that gradients are weighted as one cluster though no forward pass was seen.

        Args:
            names: names of parameters; those that clusters do not cover do not count.

        Raises:
            RuntimeError: with ``strict=True``.
        """
        whole = [name for name in names if name in self._covered]
        self.known_by_cluster.update(dict.fromkeys(whole, False))
        self._tell([name for name in whole if name not in self.told])

    def _tell(self, whole: list[str]) -> None:
        """Warn, or with ``strict=True`` raise, that parameters are taken as one cluster's."""
        if whole and self.strict:
            raise RuntimeError(
                f"strict=True, and these parameters are not known by cluster: {self._listed(whole)}"
            )
        if whole:
            self.warn_whole(whole)

    def _listed(self, names: list[str]) -> str:
        """Return parameters with the reasons why they are taken as one cluster's."""
        by_reason: dict[str, list[str]] = {}
        for name in names:
            by_reason.setdefault(self.why_whole(name), []).append(name)
        return "; ".join(f"{', '.join(named)} ({why})" for why, named in by_reason.items())

    def warn_whole(self, names: list[str]) -> None:
        """Warn that parameters are weighted as one cluster, with their share of the model."""
        self.told.update(names)
        trainable = sum(param.numel() for param in self.params.values() if param.requires_grad)
        share = sum(self.params[name].numel() for name in names) / max(trainable, 1)
        warnings.warn(
            f"weighted without clusters, as one batch: {self._listed(names)}; {share:.0%} of the "
            "trainable elements",
            stacklevel=4,
        )

    def add(self, step: Step, param: Tensor, sums: Tensor) -> None:
        """Add to ``p.grad`` a gradient that no layer has given.

        Args:
            step: the forward pass that the sums belong to.
            param: the parameter.
            sums: complete sums by cluster, ``(K, *param.shape)``.
        """
        name = self.names[param]
        total = torch.stack([flat(part, like=param) for part in sums])
        blocks = iter([(0, param.numel(), total)])
        taken = self._sink.take(name, step.groups, blocks, sums.dtype)
        self.raw.add(step, name, taken.raw)
        param.grad = taken.gradient if param.grad is None else param.grad + taken.gradient
        self.raw.note(name)

    def _watch(self) -> None:
        """Give hooks to the covered parameters that need a gradient and have none yet."""
        accumulator = weakref.ref(self)

        def before(name: str, total: Tensor | None) -> Tensor | None:
            alive = accumulator()
            if alive is None:
                return None
            alive._passed.add(name)
            return alive._come_together(name, total)

        def after(name: str) -> None:
            alive = accumulator()
            if alive is not None:
                alive._arrive(name)

        for name in list(self._unwatched):
            leaf = self.leaves.get(name)
            if leaf is not None and leaf.requires_grad:
                self._unwatched.remove(name)
                self._hooks += hooks_around(leaf, partial(before, name), partial(after, name))

    def _arrive(self, name: str) -> None:
        """Note that ``p.grad`` has a parameter's gradient.

        Raises:
            RuntimeError: the gradient did not pass the first hook.
        """
        if name not in self._passed:
            raise RuntimeError(LOST.format(name=name))
        self._passed.discard(name)
        grad, later = self.leaves[name].grad, self._sink.later
        if later is not None and grad is not None:
            later.arrived(name, grad)
        self.raw.note(name)


def _is_marker(total: Tensor, waiting: _Waiting) -> bool:
    """Return whether a parameter's gradient came from layers alone.

    A compiled graph makes other markers, zeros, and adds them up. There only the values tell, and
    reading them waits for a GPU.
    """
    if total is waiting.marker:
        return True
    traced = any(s.traced for s in [*waiting.steps, *(step for step, _ in waiting.taken)])
    return traced and not bool(total.any())
