"""The connection of a ``GradQueue`` to an optimizer: which one it may be, and its end."""

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from gq_triton.optim.base import GradQueueOptimizer

__all__ = ["Handle", "check_optimizer", "own_parameters"]


class Handle:
    """The connection of a ``GradQueue`` to an optimizer; ``remove`` ends it."""

    def __init__(self, undo: Callable[[], None]) -> None:
        self._undo: Callable[[], None] | None = undo

    def remove(self) -> None:
        """End the connection: later steps use plain gradients. A second call does nothing."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()


def own_parameters(optimizer: Optimizer, known: Collection[Tensor]) -> list[Tensor]:
    """Return the optimizer's parameters that are among those of the model."""
    return [p for group in optimizer.param_groups for p in group["params"] if p in known]


def check_optimizer(optimizer: Any, known: Collection[Tensor]) -> None:
    """Raise an error unless the optimizer's gradients can be weighted, and only once.

    Args:
        optimizer: what was to be attached to.
        known: the parameters of the model.

    Raises:
        TypeError: it is no torch optimizer.
        ValueError: it weights gradients itself, or has no parameter of the model.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"attach needs a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise ValueError(
            f"{type(optimizer).__name__} did not initialise torch.optim.Optimizer: attach to "
            "the optimizer that it wraps"
        )
    for own in (optimizer, *vars(optimizer).values()):
        if isinstance(own, GradQueueOptimizer):
            name = type(own).__name__
            raise ValueError(
                f"{name} weights its gradients itself: attach to a plain torch optimizer, or "
                f"use {name} without GradQueue"
            )
    if not own_parameters(optimizer, known):
        raise ValueError(
            "none of the optimizer's parameters belongs to the model: build the GradQueue from "
            "the model that the optimizer updates, after fully_shard"
        )
