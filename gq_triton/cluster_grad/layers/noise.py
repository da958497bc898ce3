"""The random numbers that a module draws, so that a second run of it repeats the first.

A run for some of the samples draws fewer numbers, and others. What the run of the whole batch drew
is recorded, and each sample is given its own rows again.

Shapes: B samples.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Noise", "Repeated", "random_state", "set_random_state"]

# Operations whose results are random numbers, or all that their backward passes know of them.
_DRAWN = {
    "bernoulli", "bernoulli_", "native_dropout", "rand", "rand_like", "randn", "randn_like",
    "randint", "randint_like", "uniform", "uniform_", "normal", "normal_", "exponential_",
}  # fmt: skip


def random_state(device: torch.device) -> list[Tensor]:
    """Return the state of the random numbers of the CPU and of a device."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def set_random_state(device: torch.device, states: list[Tensor]) -> None:
    """Set what ``random_state`` returned."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


class Noise(TorchDispatchMode):
    """Records the random numbers that operations draw.

    Attributes:
        drawn: the operations and their results, in order.
        whole: whether all of them can be given again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[tuple[Any, list[Tensor]]] = []
        self.whole = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation."""
        out = func(*args, **(kwargs or {}))
        if _draws(func, args, kwargs or {}):
            self.whole = self.whole and func.overloadpacket.__name__ in _DRAWN
            # What follows may change them in place.
            self.drawn.append((func, [part.clone() for part in _tensors(out)]))
        return out


class Repeated(TorchDispatchMode):
    """Gives operations the random numbers that were recorded.

    Args:
        noise: the record of a run of the whole batch.
        batch: B.
        number: the number of samples of this run.
        rows: returns the samples' rows of a tensor along a dimension.

    Raises:
        RuntimeError: the run draws other random numbers than the recorded one.
    """

    def __init__(
        self, noise: Noise, batch: int, number: int, rows: Callable[[Tensor, int], Tensor]
    ) -> None:
        super().__init__()
        self._drawn, self._next = noise.drawn, 0
        self._batch, self._number, self._rows = batch, number, rows

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation."""
        out = func(*args, **(kwargs or {}))
        if _draws(func, args, kwargs or {}):
            if self._next == len(self._drawn) or self._drawn[self._next][0] is not func:
                raise RuntimeError("the second run draws other random numbers than the first")
            parts = self._drawn[self._next][1]
            self._next += 1
            for part, old in zip(_tensors(out), parts, strict=True):
                part.copy_(self._of_samples(old, part.shape))
        return out

    def _of_samples(self, old: Tensor, shape: torch.Size) -> Tensor:
        """Return the rows of this run's samples; all that was drawn where samples share it."""
        if old.dim() != len(shape):
            raise RuntimeError("the second run draws random numbers of other shapes")
        other = [dim for dim, size in enumerate(shape) if size != old.shape[dim]]
        if not other:
            return old
        (dim, *more), size = other, old.shape[other[0]]
        if more or size % self._batch or size // self._batch * self._number != shape[dim]:
            raise RuntimeError("the second run draws random numbers of other shapes")
        return self._rows(old, dim)


def _draws(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether an operation draws random numbers."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    for place, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":  # of attention, which draws none without dropout
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            return bool(argument.default_value if given is None else given)
    return True


def _tensors(out: Any) -> list[Tensor]:
    return [part for part in tree_leaves(out) if isinstance(part, Tensor)]
