"""The loss scale that gradients carry, and the ``GradScaler`` that nobody was told of."""

import sys
import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from gq_triton.living import living, with_subclasses
from gq_triton.untraced import Untraced, untraced

__all__ = ["GradScale", "ScalerWatch", "scaler_of"]


class GradScale:
    """The loss scale that gradients carry, by the ``GradScaler`` that makes it.

    Args:
        scaler: a ``GradScaler``, or None; it may be set later.
    """

    def __init__(self, scaler: Any = None) -> None:
        self.scaler = scaler

    def __call__(self) -> Tensor | None:
        """Return the scale on its device; None where no scaler is given or it is disabled."""
        if self.scaler is None or not self.scaler.is_enabled():
            return None
        return self.scaler._get_scale_async()


def scaler_of(optimizer: Optimizer) -> GradScaler | None:
    """Return the ``GradScaler`` that is stepping an optimizer; None where none is.

    A scaler leaves no trace on the optimizer, but its ``step`` is on the stack, and until
    ``update()`` it knows the optimizer by ``id``: a loop may step an optimizer itself after
    ``unscale_``. So this function looks through the callers and all living objects, which takes
    milliseconds: call it once per run, from a hook of ``step``.
    """
    # A subclass may step the optimizer in a way of its own, whose first argument is the scaler.
    steps = [vars(kind).get("step") for kind in with_subclasses(GradScaler)]
    codes = {code for code in (getattr(step, "__code__", None) for step in steps) if code}
    frame = sys._getframe()
    while frame is not None:
        # To read the variables of a user's frame would keep them alive.
        if frame.f_code in codes:
            scaler = frame.f_locals.get(next(iter(frame.f_code.co_varnames), ""))
            if isinstance(scaler, GradScaler) and scaler.is_enabled():
                return scaler
        frame = frame.f_back
    return next((one for one in living(GradScaler) if _steps(one, optimizer)), None)


def _steps(scaler: GradScaler, optimizer: Optimizer) -> bool:
    return scaler.is_enabled() and id(optimizer) in scaler._per_optimizer_states


class ScalerWatch:
    """A look, in the first step of an optimizer, for a ``GradScaler`` that steps it.

    Args:
        params: the look is at the first optimizer that steps one of these parameters.
        message: the sentence of the error.

    Examples:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 2)
        >>> watch = ScalerWatch(layer.parameters(), "the scaler was forgotten")
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> torch.optim.SGD(layer.parameters()).step()  # a plain step: nothing is raised
        >>> watch.done
        True
    """

    def __init__(self, params: Iterable[Tensor], message: str) -> None:
        Untraced.prepare()
        self.done = False
        self._ids, self._message = {id(param) for param in params}, message
        watch = weakref.ref(self)  # torch's global hooks must not keep the parameters' owner alive

        def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            alive = watch()
            if alive is not None:
                alive._look(optimizer)

        handle = register_optimizer_step_pre_hook(before_step)
        self._end = weakref.finalize(self, handle.remove)

    def end(self) -> None:
        """Take the hook from torch's optimizers; not from inside a step, which iterates over it."""
        self._end()

    @untraced
    def _look(self, optimizer: Optimizer) -> None:
        groups = optimizer.param_groups
        if self.done or not any(id(p) in self._ids for group in groups for p in group["params"]):
            return
        self.done = True
        if scaler_of(optimizer) is not None:
            raise RuntimeError(self._message)
