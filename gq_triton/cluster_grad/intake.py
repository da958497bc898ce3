"""The intake, which takes the sums of layers and keeps the gradients that the sink makes of them.

A layer gives its sums in its backward pass and returns a *marker* to autograd: zeros that take no
memory. The sink's gradient waits here until autograd calls the hook of the parameter, and the
accumulator fetches it.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gq_triton.cluster_grad.forming import Sums
from gq_triton.cluster_grad.later import Later
from gq_triton.cluster_grad.sink import Sink, Taken, known
from gq_triton.cluster_grad.site import Block, whole_block
from gq_triton.cluster_grad.step import Partial, Step

__all__ = ["Intake", "Waiting"]


@dataclass(eq=False)
class Waiting:
    """The gradients that layers have given for a parameter whose hook was not called yet.

    Attributes:
        marker: the marker that the first of the layers returned.
        taken: forward passes that use the parameter once, with the sink's gradients.
        steps: forward passes that use it several times; their sums are in ``Step.partial``.
    """

    marker: Tensor
    taken: list[tuple[Step, Taken]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def is_all_of(self, total: Tensor) -> bool:
        """Return whether the sum that autograd has formed came from these layers alone.

        A compiled graph makes other markers, zeros, and adds them up. There only the values tell,
        and reading them waits for a GPU.
        """
        if total is self.marker:
            return True
        traced = any(s.traced for s in [*self.steps, *(step for step, _ in self.taken)])
        return traced and not bool(total.any())


class Intake:
    """The layers' side of the accumulator: what they give before a parameter's hook is called.

    Args:
        sink: the receiver of the layers' sums.
        names: the names of the model's parameters.
        leaves: by parameter name, the tensors to which autograd gives the gradients.
    """

    def __init__(self, sink: Sink, names: dict[Tensor, str], leaves: dict[str, Tensor]) -> None:
        self._sink, self.backend = sink, sink.backend
        self.names, self.leaves = names, leaves
        self._scratch: dict[torch.dtype, Tensor] = {}
        self._markers: dict[Any, Tensor] = {}
        self._waiting: dict[str, Waiting] = {}

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

    def give_whole(self, step: Step, param: Tensor, sums: Tensor) -> Tensor | None:
        """Take the sums of one use of a whole parameter; return what ``give`` returns.

        Args:
            step: the forward pass that the sums belong to.
            param: the parameter.
            sums: ``(K, *param.shape)``, each cluster's in the memory order of the parameter.
        """
        name = self.names[param]
        once = step.uses.get(name, 1) == 1 and self.leaves[name].shape == param.shape
        later = self._later(step, name) if once else None
        if later is None:
            return self.give(step, param, whole_block(sums), sums.dtype)
        return self._wait(step, name, later.take(name, step.groups, sums))

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
        return self._wait(step, name, later.take(name, step.groups, sums, scale))

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

    def settle(self) -> None:
        """Give values to all gradients that wait for one another."""
        if self._sink.later is not None:
            self._sink.later.settle()

    def _wait(self, step: Step, name: str, taken: Taken | None) -> Tensor | None:
        """Keep the gradient that a layer has given until the parameter's hook is called.

        Returns:
            The marker for the first layer; None, so that nothing is added, for the others.
        """
        waiting = self._waiting.get(name)
        first = waiting is None
        if waiting is None:
            waiting = self._waiting[name] = Waiting(self._marker(self.leaves[name]))
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

    def _take(self, step: Step, name: str, blocks: Iterator[Block], dtype: torch.dtype) -> Taken:
        """Return the gradients of a parameter that is used once; their values may come later."""
        later = self._later(step, name)
        if later is not None:
            start, stop, sums = next(blocks)
            if stop - start == self.leaves[name].numel():
                return later.take(name, step.groups, sums)
            blocks = itertools.chain([(start, stop, sums)], blocks)
        later = self._sink.later
        if later is not None and name in later:
            later.settle()  # an earlier forward pass: the statistics are those of the last one
        return self._sink.take(name, step.groups, blocks, dtype)

    def _later(self, step: Step, name: str) -> Later | None:
        """Return what takes the sums of a parameter that is used once, if they may wait."""
        later = self._sink.later
        first_use = name not in self._waiting and not step.traced and step.groups.unit == 1
        may_wait = later is not None and first_use and later.may_wait(self.leaves[name])
        return later if may_wait else None

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

    def _parts_of(
        self, name: str, waiting: Waiting | None, total: Tensor
    ) -> list[tuple[Step, Taken]]:
        """Return the sink's gradients, by forward pass, that layers have given for a parameter.

        Args:
            name: the parameter's name.
            waiting: what waited for the parameter's hook, or None.
            total: the sum that autograd has formed, with markers in place of layers' gradients.
        """
        parts: list[tuple[Step, Taken]] = []
        if waiting is not None:
            parts = waiting.taken + [(s, self._take_partial(s, name)) for s in waiting.steps]
        later = self._sink.later
        if later is not None and name in later:
            # A hook was added, or p.grad set, since the sums were taken; or the gradient is more
            # than the sums.
            alone = len(parts) == 1 and waiting is not None and total is waiting.marker
            if not alone or not later.may_wait(self.leaves[name]):
                later.settle()
        return parts

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
        return Taken(taken.gradient - before.gradient, known(taken.raw) - known(before.raw))
