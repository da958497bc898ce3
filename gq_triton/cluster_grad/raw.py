"""The raw mean gradients of a model, kept while ``p.grad`` holds the weighted ones."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gq_triton.cluster_grad.passes import in_backward
from gq_triton.cluster_grad.sink import Coming, known
from gq_triton.cluster_grad.step import Step
from gq_triton.replayed import refuse_replay

__all__ = ["RawGradients"]


class _Fresh(NamedTuple):
    """A raw gradient of the running backward pass whose weighted one is not in ``p.grad`` yet.

    Attributes:
        raw: the raw mean.
        steps: the forward passes that the gradient comes from.
        goes_on: whether ``p.grad`` still holds the gradients of earlier backward passes.
        whole: whether the samples were one cluster.
    """

    raw: Tensor | Coming
    steps: list[Step]
    goes_on: bool | Tensor
    whole: bool


class RawGradients:
    """The raw mean gradient of every parameter whose ``p.grad`` came from a sink.

    Args:
        params: parameters by name.
        first_step: returns the first forward pass that the running backward pass goes through;
            outside a backward pass the latest forward pass, or None.

    Attributes:
        kept: raw gradients by name, summed over all backward passes since they were last taken;
            also such that are to come.
        passes: numbers of the backward passes that the taken gradients come from. The caller of
            ``take`` empties the set.
    """

    def __init__(self, params: Mapping[str, Tensor], first_step: Callable[[], Step | None]) -> None:
        self._params, self._first_step = params, first_step
        self.kept: dict[str, Any] = {}
        self.passes: set[int] = set()
        # Object and version of p.grad after the last backward pass had added to it.
        self._left: dict[str, tuple[int, int]] = {}
        # For each forward pass that a raw gradient comes from: the number of its backward pass, and
        # the mass of its samples (Groups.mass).
        self._masses: dict[str, list[tuple[int, Tensor]]] = {}
        # The same without masses: a forward pass is known by a tensor of its groups.
        self._forwards: dict[str, list[tuple[int, Tensor]]] = {}
        # Gradients and number of the running backward pass.
        self._fresh: dict[str, _Fresh] = {}
        self._number = 0

    def begin_pass(self) -> None:
        """Note that another backward pass begins."""
        self._number += 1

    def end_pass(self) -> None:
        """Forget gradients that the backward pass has not added to ``p.grad``."""
        self._fresh = {}

    def add(self, step: Step, name: str, raw: Tensor | Coming, whole: bool = False) -> None:
        """Keep a raw gradient until ``note`` is told that ``p.grad`` has the weighted one."""
        raw = raw if step.groups.unit == 1 else known(raw) / step.groups.unit
        fresh = self._fresh.get(name)
        if fresh is None:
            self._fresh[name] = _Fresh(raw, [step], self._goes_on(name), whole)
            return
        steps = fresh.steps if step in fresh.steps else [*fresh.steps, step]
        self._fresh[name] = fresh._replace(
            raw=known(fresh.raw) + known(raw), steps=steps, whole=fresh.whole or whole
        )

    def counted(self, step: Step, gradient: Tensor, whole: bool = False) -> Tensor:
        """Return a weighted gradient times what this process counts in it among several.

        Args:
            step: the forward pass that the gradient comes from.
            gradient: the weighted gradient.
            whole: whether the samples were one cluster.
        """
        return gradient

    def _goes_on(self, name: str) -> bool | Tensor:
        """Return whether ``p.grad`` still holds earlier passes' gradients, on its device."""
        grad, left = self._params[name].grad, self._left.get(name)
        if grad is None or left is None or left[0] != id(grad):
            return False
        # It was changed in place: zeroed for a new step, or clipped.
        return True if left[1] == grad._version else (grad != 0).any()

    def note(self, name: str) -> None:
        """Add a parameter's raw gradient to ``kept``: ``p.grad`` has just got the weighted one."""
        grad = self._params[name].grad
        if grad is None:
            return
        fresh = self._fresh.pop(name, None)
        if fresh is not None:
            raw, groups = fresh.raw, [step.groups for step in fresh.steps]
            forwards = [(self._number, each.one_cluster) for each in groups]
            groups = [each.whole for each in groups] if fresh.whole else groups
            masses = [(self._number, each.mass) for each in groups]
            earlier = self.kept.get(name)
            if earlier is not None and isinstance(fresh.goes_on, Tensor):
                refuse_replay(
                    "the host reads whether p.grad was zeroed between two backward passes",
                    "zero it with set_to_none=True",
                )
            if earlier is not None and bool(fresh.goes_on):
                raw, masses = known(earlier) + known(raw), self._masses[name] + masses
                forwards = self._forwards[name] + forwards
            self._forwards[name] = forwards
            self.kept[name], self._masses[name] = raw, masses
        self._left[name] = id(grad), grad._version

    def take_all(self) -> dict[str, Tensor]:
        """Return by name the raw gradients of parameters with a ``p.grad``, and forget all.

        They have the shape of their parameters, or are flat, in the memory order of these.
        """
        kept, self.kept, self._left, self._masses = self.kept, {}, {}, {}
        self._forwards = {}
        return {
            name: raw.flat() if isinstance(raw, Coming) else raw
            for name, raw in kept.items()
            if self._params[name].grad is not None
        }

    def count_passes(self) -> int:
        """Return how many backward passes the raw gradients come from.

        Backward passes through one forward pass, those of several losses, count once.
        """
        known = [*self._masses.values(), *[self._forwards.get(name, []) for name in self.kept]]
        numbers = {number for passes in known for number, _ in passes}
        if len(numbers) < 2:
            return len(numbers)
        # A parameter may be reached by one of the passes only.
        forwards = [forward for name in self.kept for forward in self._forwards.get(name, [])]
        most = min(len({number for number, _ in forwards}), len({id(f) for _, f in forwards}))
        for masses in self._masses.values():
            passes = {number for number, _ in masses}
            most = max(most, min(len(passes), len({id(mass) for _, mass in masses})))
        return most

    def take(self, name: str) -> Tensor | None:
        """Return the raw gradient of a parameter and forget it; None if it has none."""
        raw, masses = self.kept.pop(name, None), self._masses.pop(name, [])
        if self._params[name].grad is None:
            return None  # the user has dropped the gradient
        self.passes.update(number for number, _ in masses)
        return None if raw is None else known(raw)

    def masses(self, names: Sequence[str], device: torch.device) -> Tensor:
        """Return the mass of this process's samples in the gradient of each parameter, ``(N, 2)``.

        A gradient's mass is the mean of ``Groups.mass`` over the forward passes that it comes from:
        a gradient of several micro-batches counts no more than one of a single micro-batch. A
        parameter that no sample reached has the mass of the first forward pass that the running
        backward pass goes through. Outside a backward pass its mass is 0.

        Args:
            names: the parameters' names.
            device: the device of the result.
        """
        unreached: list[Tensor] = []
        means: dict[tuple[int, ...], Tensor] = {}
        rows = []
        for name in names:
            reached = self._masses.get(name) if self._params[name].grad is not None else None
            if reached is None:
                unreached = masses = unreached or [self._unreached(device)]
            else:
                masses = [mass for _, mass in reached]
            # Most parameters share their forward passes, so few means are launched.
            key = tuple(map(id, masses))
            if key not in means:
                means[key] = torch.stack(masses).mean(dim=0).to(device)
            rows.append(means[key])
        return torch.stack(rows)

    def _unreached(self, device: torch.device) -> Tensor:
        """Return the mass of this process's samples for a parameter that none of them reached."""
        if not in_backward():
            return torch.zeros(2, dtype=torch.float64, device=device)
        step = self._first_step()
        if step is None or (step.known_groups is None and step.features is None):
            # The number of samples is unknown.
            return torch.ones(2, dtype=torch.float64, device=device)
        return step.groups.mass
