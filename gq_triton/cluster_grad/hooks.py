"""The two hooks of a parameter, around what autograd does with its gradient."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

__all__ = ["LOST", "hooks_around"]

LOST = (
    "{name} has lost the hook that clusters its gradient: keep the hooks of parameters, and have "
    "an autograd function that runs under a checkpoint or saved_tensors_hooks save parameters as "
    "param.detach(), because torch 2.8 drops the hooks of those that it saves"
)


def hooks_around(
    leaf: Tensor, before: Callable[[Tensor], Tensor | None], after: Callable[[], None]
) -> list[Any]:
    """Have autograd call two functions around the addition to ``p.grad``; return the handles.

    Args:
        leaf: the parameter.
        before: called, before the parameter's other hooks, with the gradient; returns the one that
            takes its place, or None.
        after: called when ``p.grad`` has the gradient.
    """
    handle = leaf.register_hook(before)
    hooks: Any = leaf._backward_hooks
    others = [(key, other) for key, other in hooks.items() if key != handle.id]
    for key, other in others:  # autograd calls hooks in the order of insertion
        del hooks[key]
        hooks[key] = other
    return [handle, leaf.register_post_accumulate_grad_hook(lambda _: after())]
