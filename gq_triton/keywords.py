"""How a door takes its options: as keywords that are read once, and shown in signature and help."""

import inspect
import re
import textwrap
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import fields
from typing import Any, TypeVar, get_type_hints

from gq_triton.options import LawOptions, Options

__all__ = ["help_of", "read", "takes"]

Door = TypeVar("Door", bound=Callable[..., Any])


def help_of(kind: type[Options], name: str) -> str:
    """Return the help sentence of an option."""
    return next(entry.metadata["help"] for entry in fields(kind) if entry.name == name)


def read(
    keywords: Mapping[str, Any], *kinds: type[Options], also: Iterable[str] = ()
) -> tuple[Any, ...]:
    """Return one object per kind from a door's keywords.

    Args:
        keywords: the options that were given, by name.
        *kinds: whose options they are.
        also: what is wrong with the door's own arguments, for the same message.

    Raises:
        TypeError: a keyword that no kind has.
        ValueError: names every invalid option.

    Warns:
        UserWarning: a queue of one gradient.
    """
    known = {name for kind in kinds for name in kind.names()}
    for name in keywords:
        if name not in known:
            raise TypeError(f"got an unexpected keyword argument {name!r}")
    problems = [*(problem for kind in kinds for problem in kind.problems(keywords)), *also]
    if problems:
        raise ValueError("; ".join(problems))
    if keywords.get("queue_length") == 1 and keywords.get("rho", LawOptions.rho) > 1:
        warnings.warn(
            "queue_length=1: one gradient has no deviation, so every weight is 1/rho or rho; take "
            "3 or more",
            stacklevel=3,
        )
    return tuple(kind.of(keywords) for kind in kinds)


def takes(*kinds: type[Options], without: Collection[str] = ()) -> Callable[[Door], Door]:
    """Return a decorator that writes options into the signature and docstring of a door.

    The door is a class or a function that takes ``**options``. Its ``inspect.signature`` then
    shows every option by name, with type and default, and the entry ``**options: ...`` of its
    docstring becomes one entry per option.

    Args:
        *kinds: the kinds of options that the door takes.
        without: names of options that the door does not take.
    """

    def decorate(door: Door) -> Door:
        function: Any = vars(door).get("__init__", door)  # of a class, or the function itself
        signature = inspect.signature(function)
        shown = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        lines: list[str] = []
        for kind in kinds:
            types = get_type_hints(kind)
            for entry in fields(kind):
                if entry.name in without:
                    continue
                shown.append(
                    inspect.Parameter(
                        entry.name,
                        inspect.Parameter.KEYWORD_ONLY,
                        default=entry.default,
                        annotation=types[entry.name],
                    )
                )
                lines.append(f"{entry.name}: {help_of(kind, entry.name)}")
        function.__signature__ = signature.replace(parameters=shown)
        door.__doc__ = _with_lines(door.__doc__ or "", lines)
        return door

    return decorate


def _with_lines(text: str, lines: list[str]) -> str:
    """Return a docstring with ``lines`` in place of the entry ``**options: ...``."""
    place = re.search(r"^([ ]*)\*\*options:.*\n(?:\1[ ]+.*\n)*", text, re.MULTILINE)
    if place is None:
        return text  # python -OO has no docstrings
    indent = place.group(1)
    wrapped = [
        textwrap.fill(line, 100, initial_indent=indent, subsequent_indent=indent + "    ")
        for line in lines
    ]
    return text[: place.start()] + "\n".join(wrapped) + "\n" + text[place.end() :]
