"""Copies, files and recordings of a model with clusters: they are those of the model alone.

``copy.deepcopy`` and ``pickle``, hence ``torch.save(model)``, ask a module for its state. While
clusters are installed a module answers without what this package has put into it. ``torch.export``
and ``torch.jit.trace`` run the model, and record what its layers compute without clusters.
"""

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn

from gq_triton.aside import stands_aside
from gq_triton.cluster_grad.site import SITE

__all__ = ["recorded", "without_trace"]

# Every attribute of a module that this package sets, besides forward(), begins with it.
_PREFIX = "_gq_triton"
_GETSTATE = "__getstate__"
_HOOKS = "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"


def recorded() -> bool:
    """Return whether this is no training step.

    ``torch.export`` or ``torch.jit.trace`` records the model, a transform of ``torch.func`` runs
    it, or the pass stands aside. The model that ``torch.compile`` traces is trained.
    """
    # Not torch.compiler.is_exporting(): Dynamo of torch 2.8 takes it for True in every graph.
    traced = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    if torch.compiler._is_exporting_flag or traced or stands_aside():
        return True
    return not torch.compiler.is_compiling() and _transformed()


def _transformed() -> bool:
    """Return whether a transform of ``torch.func``, such as ``vmap`` or ``jacrev``, runs."""
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    return functorch.peek_interpreter_stack() is not None


def without_trace(model: nn.Module) -> Callable[[], None]:
    """Have copies and files of a model's modules hold nothing of this package; return the undo."""
    modules = list(model.modules())
    for module in modules:
        vars(module)[_GETSTATE] = MethodType(_state, module)

    def undo() -> None:
        for module in modules:
            vars(module).pop(_GETSTATE, None)

    return undo


def _state(module: nn.Module) -> Any:
    """Return the state of a module for a copy or a file."""
    of_class = getattr(type(module), _GETSTATE, None)  # Python 3.10 gives classes none
    state = vars(module) if of_class is None else of_class(module)
    if not isinstance(state, dict):
        return state
    converted = state.get(SITE)
    state = {name: value for name, value in state.items() if not name.startswith(_PREFIX)}
    state.pop(_GETSTATE, None)
    if _is_ours(state.get("forward")):
        del state["forward"]
        if converted is not None and converted.inner is not None:
            state["forward"] = converted.inner
    ours = {key for name in _HOOKS for key, hook in state.get(name, {}).items() if _is_ours(hook)}
    for name, hooks in state.items():
        # Beside the hooks lie flags by the same keys, such as _forward_hooks_with_kwargs.
        if ours and name.startswith(_HOOKS) and not ours.isdisjoint(hooks):
            state[name] = type(hooks)((k, hook) for k, hook in hooks.items() if k not in ours)
    return state


def _is_ours(function: Any) -> bool:
    """Return whether this package defines a function, a method or a partial application of one."""
    while isinstance(function, partial):
        function = function.func
    place = getattr(getattr(function, "__func__", function), "__module__", None)
    return isinstance(place, str) and place.partition(".")[0] == __name__.partition(".")[0]
