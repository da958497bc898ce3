"""Triton's interpreter without its largest cost, which is a search in Triton's own modules.

Around every call of a kernel or of a function of a kernel, the interpreter looks through all names
of ``triton.language`` for the builtins that it has to replace. The search takes more than half of a
kernel's time, and it finds the same names each time.
"""

import inspect
from functools import cache
from types import SimpleNamespace
from typing import Any

from triton.language.core import is_builtin
from triton.runtime import interpreter


@cache
def builtin_names(owner: Any) -> list[str]:
    """Return the names of Triton's builtins in a module or class that nobody has replaced yet."""
    return [name for name, member in inspect.getmembers(owner) if is_builtin(member)]


def builtins_of(owner: Any) -> list[tuple[str, Any]]:
    """Return what the interpreter looks for in ``inspect.getmembers(owner)``."""
    return [(name, getattr(owner, name)) for name in builtin_names(owner)]


def install() -> None:
    """Give the interpreter an ``inspect`` that remembers where Triton's builtins are."""
    own = SimpleNamespace(**{**vars(inspect), "getmembers": builtins_of})
    interpreter.inspect = own  # pyright: ignore[reportAttributeAccessIssue]
