"""The raw gradients beside ``p.grad``: kept while a backward pass adds what was made of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gq_triton.cluster_grad.passes import in_backward
from gq_triton.cluster_grad.step import Step

__all__ = ["RawGradients"]


class _Fresh(NamedTuple):
    """A raw gradient on its way to ``p.grad``, in the backward pass that runs.

    Attributes:
        raw: the raw mean.
        steps: the forward passes that it goes back to.
        goes_on: whether ``p.grad`` still holds what earlier backward passes added to it.
    """

    raw: Tensor
    steps: list[Step]
    goes_on: bool | Tensor


class RawGradients:
    """The raw mean gradient of every parameter whose ``p.grad`` was made of one.

    Args:
        params: parameters by name.
        first_step: returns the first forward pass that the running backward pass goes through, or
            the latest forward pass, or None.

    Attributes:
        kept: raw gradients by name, of all backward passes since they were taken.
        passes: numbers of the backward passes that the taken gradients go back to; whoever takes
            them empties it.
    """

    def __init__(self, params: Mapping[str, Tensor], first_step: Callable[[], Step | None]) -> None:
        self._params, self._first_step = params, first_step
        self.kept: dict[str, Tensor] = {}
        self.passes: set[int] = set()
        # What p.grad looked like when the last backward pass had added to it: object and version.
        self._left: dict[str, tuple[int, int]] = {}
        # What the samples counted in each forward pass that a raw gradient goes back to, and the
        # number of its backward pass.
        self._masses: dict[str, list[tuple[int, Tensor]]] = {}
        # Of the backward pass that runs.
        self._fresh: dict[str, _Fresh] = {}
        self._number = 0

    def begin_pass(self) -> None:
        """Note that another backward pass begins."""
        self._number += 1

    def end_pass(self) -> None:
        """Forget gradients that the backward pass has not added to ``p.grad``."""
        self._fresh = {}

    def add(self, step: Step, name: str, raw: Tensor) -> None:
        """Keep a raw gradient until ``p.grad`` has taken what was made of it."""
        raw = raw if step.groups.unit == 1 else raw / step.groups.unit
        fresh = self._fresh.get(name)
        if fresh is None:
            self._fresh[name] = _Fresh(raw, [step], self._goes_on(name))
            return
        steps = fresh.steps if step in fresh.steps else [*fresh.steps, step]
        self._fresh[name] = fresh._replace(raw=fresh.raw + raw, steps=steps)

    def _goes_on(self, name: str) -> bool | Tensor:
        """Return whether ``p.grad`` still holds what earlier passes added to it, on its device."""
        grad, left = self._params[name].grad, self._left.get(name)
        if grad is None or left is None or left[0] != id(grad):
            return False
        # Changed in place: zeroed for a new step, or clipped.
        return True if left[1] == grad._version else (grad != 0).any()

    def note(self, name: str) -> None:
        """Put a raw gradient beside ``p.grad``, which has just taken what was made of it."""
        grad = self._params[name].grad
        if grad is None:
            return
        fresh = self._fresh.pop(name, None)
        if fresh is not None:
            raw, masses = fresh.raw, [(self._number, step.groups.mass) for step in fresh.steps]
            earlier = self.kept.get(name)
            if earlier is not None and isinstance(fresh.goes_on, Tensor):
                raw = torch.where(fresh.goes_on, earlier + raw, raw)
            elif earlier is not None and fresh.goes_on:
                raw = earlier + raw
            if earlier is not None and bool(fresh.goes_on):
                masses = self._masses[name] + masses
            self.kept[name], self._masses[name] = raw, masses
        self._left[name] = id(grad), grad._version

    def take_all(self) -> dict[str, Tensor]:
        """Return the raw gradients by name of the parameters that have one, and forget all."""
        kept, self.kept, self._left, self._masses = self.kept, {}, {}, {}
        return {name: raw for name, raw in kept.items() if self._params[name].grad is not None}

    def take(self, name: str) -> Tensor | None:
        """Return the raw gradient of a parameter and forget it; None where it has none."""
        raw, masses = self.kept.pop(name, None), self._masses.pop(name, [])
        if self._params[name].grad is None:
            return None  # a gradient that the user has dropped
        self.passes.update(number for number, _ in masses)
        return raw

    def masses(self, names: Sequence[str], device: torch.device) -> Tensor:
        """Return what this process's samples count in the gradients of parameters, ``(N, 2)``.

        It is the mean of ``Groups.mass`` over the forward passes that the gradient goes back to: a
        gradient of several micro-batches counts no more than one of a single micro-batch. Where no
        sample reached a parameter, as many count as in the first forward pass that the running
        backward pass goes through; outside of a backward pass none.

        Args:
            names: the parameters' names.
            device: where the result is wanted.
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
            # Most parameters go back to the same passes: few launches.
            key = tuple(map(id, masses))
            if key not in means:
                means[key] = torch.stack(masses).mean(dim=0).to(device)
            rows.append(means[key])
        return torch.stack(rows)

    def _unreached(self, device: torch.device) -> Tensor:
        """Return what this process's samples count for a parameter that none of them reached."""
        if not in_backward():
            return torch.zeros(2, dtype=torch.float64, device=device)
        step = self._first_step()
        if step is None or (step.known_groups is None and step.features is None):
            # Nobody knows how many samples there are.
            return torch.ones(2, dtype=torch.float64, device=device)
        return step.groups.mass
