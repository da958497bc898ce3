"""The accumulator, which brings the sink's gradients into ``p.grad`` and keeps the raw ones.

A layer's backward pass returns a *marker* in place of a parameter's gradient (``intake.py``).
Autograd adds up everything that the backward pass has for the parameter, then calls a hook of the
parameter with the total. If the total is the marker alone, the whole gradient is known by cluster,
and the hook returns the gradient that the sink made of the sums. If the total is more, the
parameter was used past its layers, and the sink takes the whole gradient as that of one cluster.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gq_triton.cluster_grad.batch import Arguments
from gq_triton.cluster_grad.coverage import Coverage
from gq_triton.cluster_grad.hooks import LOST, hooks_around
from gq_triton.cluster_grad.intake import Intake, Waiting
from gq_triton.cluster_grad.lookout import Lookout
from gq_triton.cluster_grad.passes import in_backward
from gq_triton.cluster_grad.raw import RawGradients
from gq_triton.cluster_grad.sink import Sink, Taken, known
from gq_triton.cluster_grad.site import new_number
from gq_triton.cluster_grad.step import Step
from gq_triton.grouping.groups import Groups
from gq_triton.ring import flat

__all__ = ["Accumulator"]


def _none() -> None:
    return None


class Accumulator(Intake):
    """The clustered gradients of one model while its plug-in is attached.

    Args:
        sink: the receiver of the layers' sums.
        names: the names of the model's parameters.
        covered: names of the parameters that belong to layers which sum by cluster.
        assign: returns the clusters of a step.
        leaves: by parameter name, the tensors to which autograd gives the gradients. None stands
            for the parameters themselves. Those of a sharded model are met in its forward pass.
        raw: keeps the raw gradients; None for those of one process.
        coverage: makes the coverage, called as ``Coverage``.

    Attributes:
        step: the step of the latest forward pass, or None.
        raw: the raw gradients, kept while ``p.grad`` holds the weighted ones.
        coverage: of which parameters the gradients are known by cluster.
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
        coverage: Callable[..., Coverage] = Coverage,
    ) -> None:
        self.params = {name: param for param, name in names.items()}
        super().__init__(sink, names, self.params if leaves is None else leaves)
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
        self._covered = list(covered)
        self.coverage = coverage(self.params, self._covered)
        # Returns the clusters that the loader brought for the forward pass that begins, if it does.
        self.given: Callable[[], Tensor | None] = _none
        self._assign = assign
        # Names of covered parameters without hooks so far, and the hooks of the others.
        self._unwatched = list(self._covered)
        self._hooks: list[Any] = []
        # State of the running backward pass: gradients that the sink took as one cluster's, and
        # the forward passes it goes through.
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
            self.coverage.reasons[name] = reason

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
        waiting = self._waiting.get(name)
        if waiting is not None and total is waiting.marker and name not in self._whole:
            gradient = self._alone(name, waiting)
            if gradient is not None:
                return gradient
        if total.layout != torch.strided or total.is_complex():
            return None  # refused, in words, by what queues gradients
        waiting = self._waiting.pop(name, None)
        if waiting is None and not self._finds_groups():
            return None
        parts = self._parts_of(name, waiting, total)
        if waiting is not None and name not in self._whole and waiting.is_all_of(total):
            for step, taken in parts:
                self.raw.add(step, name, taken.raw)
            self.coverage.known[name] = True
            gradients = [self.raw.counted(step, taken.gradient) for step, taken in parts]
            return sum(gradients[1:], gradients[0])
        return self._take_whole(name, parts, total)

    def _alone(self, name: str, waiting: Waiting) -> Tensor | None:
        """Return a parameter's gradient if one layer gave all of it in one forward pass."""
        if waiting.steps or len(waiting.taken) != 1:
            return None
        del self._waiting[name]
        ((step, taken),) = waiting.taken
        later = self._sink.later
        if later is not None and name in later and not later.may_wait(self.leaves[name]):
            later.settle()  # a hook was added, or p.grad set, since the sums were taken
        self.raw.add(step, name, taken.raw)
        self.coverage.known[name] = True
        return self.raw.counted(step, taken.gradient)

    def _finds_groups(self) -> bool:
        """Return whether a gradient that no layer has given can be taken as one cluster's.

        The samples of the forward pass must be known, and the backward pass must not be one that
        is differentiated again (``create_graph=True``).
        """
        step = self._steps[-1] if self._steps else self.step
        known = step is not None and (step.known_groups is not None or step.features is not None)
        return known and not torch.is_grad_enabled()

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
        raw = sum((known(taken.raw) for _, taken in parts), total)
        before = self._whole.get(name)
        if before is not None:
            raw = raw + known(before.raw)
        taken = self._whole[name] = self._sink.take_whole(name, step.groups, raw)
        self.coverage.known[name] = False
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
        whole = [name for name in self._whole if name not in self.coverage.told]
        traced = any(step.traced for step in self._steps)
        self.raw.end_pass()
        self._steps, self._waiting, self._whole, self._running = [], {}, {}, False
        self._passed.clear()
        if whole and not traced and self.coverage.mend is not None:
            whole = self.coverage.mend(whole)
        self.coverage.tell(whole)

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
