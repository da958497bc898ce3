"""Functions that ``torch.compile`` does not look into: it calls them as they are."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar, cast

import torch

__all__ = ["Untraced", "untraced"]

F = TypeVar("F", bound=Callable[..., Any])


class Untraced:
    """A function that compiled graphs call as it is, through ``run``; used as a decorator."""

    _waiting: ClassVar[list["Untraced"]] = []

    def __init__(self, function: Callable[..., Any]) -> None:
        self.run = self._function = function
        self._waiting.append(self)

    @classmethod
    def prepare(cls) -> None:
        """Tell Dynamo not to look into the functions.

        The call imports Dynamo, so it comes when an optimizer, a plug-in or a hook is made, not
        when this package is imported. Torch's optimizers import Dynamo anyway.
        """
        while cls._waiting:
            one = cls._waiting.pop()
            one.run = torch.compiler.disable(one._function)


def untraced(function: F) -> F:
    """Mark a function or method as `Untraced`, with its own signature.

    A step reads addresses and counters, and calls compiled loops: a graph that was traced through
    it would fail, or replay the numbers of the step that it was traced in.
    """
    one = Untraced(function)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        return one.run(*args, **kwargs)

    return cast(F, run)
