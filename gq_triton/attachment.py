"""The connection of a ``GradQueue`` to an optimizer: which one it may be, and its end."""

import warnings
import weakref
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gq_triton.names import parameter_names
from gq_triton.optim.base import GradQueueOptimizer

__all__ = [
    "SCALED",
    "WITHIN",
    "Added",
    "Handle",
    "attached_to",
    "before_step",
    "check_dense",
    "check_optimizer",
    "note_attached",
    "own_parameters",
]

# The plug-ins of each optimizer.
_attached: weakref.WeakKeyDictionary[Optimizer, weakref.WeakSet[Any]] = weakref.WeakKeyDictionary()


class Handle:
    """The connection of a ``GradQueue`` to an optimizer; ``remove`` ends it."""

    def __init__(self, undo: Callable[[], None]) -> None:
        self._undo: Callable[[], None] | None = undo

    def remove(self) -> None:
        """End the connection: later steps use plain gradients. A second call does nothing."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()


def note_attached(optimizer: Optimizer, queue: object) -> Callable[[], None]:
    """Note that a plug-in serves an optimizer; return what ends that."""
    queues = _attached.setdefault(optimizer, weakref.WeakSet())
    queues.add(queue)
    return lambda: queues.discard(queue)


def attached_to(optimizer: Optimizer) -> list[Any]:
    """Return the plug-ins that serve an optimizer."""
    return list(_attached.get(optimizer, ()))


def before_step(
    optimizer: Optimizer, weigh: Callable[[Optimizer], None], record_loss: Callable[[Any], None]
) -> Callable[[Optimizer, tuple[Any, ...], dict[str, Any]], Any]:
    """Return the hook that has gradients weighted in ``optimizer.step``, before they are used.

    Args:
        optimizer: the optimizer.
        weigh: weights the gradients that the optimizer is about to use.
        record_loss: called with the loss that a closure returns.
    """
    # A compiled step calls them as they are, as the optimizers' own step.
    untraced: Any = torch.compiler.disable
    weigh, record_loss = untraced(weigh), untraced(record_loss)

    def hook(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # args[0] is the optimizer itself.
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            weigh(optimizer)
            return None

        def weighing() -> Any:
            # The closure computes the gradients inside step(): weight them when it returns.
            loss = closure()
            if loss is not None:
                record_loss(loss)
            weigh(optimizer)
            return loss

        rest = {name: value for name, value in kwargs.items() if name != "closure"}
        return (optimizer, weighing, *args[2:]), rest

    return hook


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


def check_dense(name: str, grad: Tensor) -> None:
    """Raise an error for a gradient that a queue cannot hold.

    Raises:
        ValueError: it is sparse or complex.
    """
    if grad.layout != torch.strided or grad.is_complex():
        raise ValueError(
            f"{name} has a gradient of layout {grad.layout} and type {grad.dtype}, which a queue "
            "cannot hold: build the layer with sparse=False, or give the parameter to another "
            "optimizer"
        )


class Added:
    """The parameters that came into a model, and its optimizer, after the queue was built.

    Args:
        model: the model.
        strict: whether they are an error.
    """

    def __init__(self, model: nn.Module, strict: bool) -> None:
        self._model, self._strict = model, strict
        self._known: set[Tensor] = set()
        self._new: set[Tensor] = set()

    def meet(self, param: Tensor) -> None:
        """Note a parameter that the queue does not know, with a gradient that a step uses."""
        if param not in self._known:
            self._new.add(param)

    def tell(self) -> None:
        """Warn of what was noted since the last call, by name.

        Parameters that are none of the model's are left alone, as ``attach`` promises.

        Raises:
            RuntimeError: with ``strict``.
        """
        if not self._new:
            return
        new, self._new = self._new, set()
        added = [name for name, param in parameter_names(self._model).items() if param in new]
        if not (added and self._strict):
            self._known |= new
        if not added:
            return
        sentence = (
            f"this GradQueue was built before {', '.join(added)} came into the model, and does not "
            "weight their gradients: call remove() on its handle, and attach a GradQueue that is "
            "built after the last change of the model"
        )
        if self._strict:
            raise RuntimeError(sentence)
        warnings.warn(sentence, stacklevel=2)


WITHIN = (
    "optimizer.step() was called within the backward pass, when the weighted gradients are not "
    "complete: call it after loss.backward()"
)
SCALED = (
    "a GradScaler scales the loss, and with clusters GradQueue weights gradients while they carry "
    "its scale: call remove() on the handle, and attach(optimizer, grad_scaler=scaler)"
)
