"""Rules of saved values, and ``check``, which applies them before any value is used.

A rule says what a value must be: its type, range or keys. Rules are nested as the saved value is.
``check`` walks both and raises one error, which names the first problems and counts the others. The
rules of one saved state stand with the code that saves it.
"""

import sys
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from gq_triton.options import shown

__all__ = [
    "COUNTER_LIMIT", "Also", "Bytes", "Either", "Exactly", "Flag", "Integer", "ListOf", "Maybe",
    "Number", "OneOf", "Record", "Rule", "Text", "check",
]  # fmt: skip

# One more than the largest counter: up to here float64 tells whole numbers apart.
COUNTER_LIMIT = 2**53
# How many problems one message names; it counts the others.
_LISTED = 4


class Rule(Protocol):
    """What a saved value must be."""

    def problems(self, value: Any, path: str) -> Iterator[str]:
        """Yield what is wrong with ``value``, each as a clause that opens with ``path``."""
        ...


def check(value: Any, rule: Rule, what: str) -> None:
    """Raise one ValueError that names what is wrong with a saved value.

    Args:
        value: the saved value, which nothing has used yet.
        rule: what the value must be.
        what: the value's name in the message, such as ``"the saved queue"``.

    Raises:
        ValueError: the value breaks the rule.

    Examples:
        >>> check({"step": -1}, Record({"step": Integer(0, 9)}), "the file")
        Traceback (most recent call last):
        ...
        ValueError: the file does not fit: step must be an integer from 0 to 9, got -1 (it was \
altered, or belongs to another model or to other options)
    """
    found = list(islice(rule.problems(value, ""), 1000))
    if found:
        more = f"; and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
        raise ValueError(
            f"{what} does not fit: {'; '.join(found[:_LISTED])}{more} (it was altered, or belongs "
            "to another model or to other options)"
        )


def must(path: str, requirement: str, value: Any) -> str:
    """Return the clause that says what the value at a path must be, and what it is."""
    return f"{path or 'it'} must be {requirement}, got {shown(value)}"


@dataclass(frozen=True)
class Exactly:
    """One value and its type.

    Args:
        expected: the value.
    """

    expected: Any

    def problems(self, value: Any, path: str) -> Iterator[str]:
        """Yield a problem unless the value is the expected one."""
        if not _same(value, self.expected):
            yield must(path, f"{self.expected!r} here", value)


def _same(value: Any, expected: Any) -> bool:
    """Return whether plain values are of the same types, and equal."""
    if type(value) is not type(expected):
        return False
    if isinstance(expected, (list, tuple)):
        return len(value) == len(expected) and all(map(_same, value, expected))
    return value == expected


@dataclass(frozen=True)
class OneOf:
    """One of several hashable values.

    Args:
        values: what is allowed.
    """

    values: Collection[Hashable]

    def problems(self, value: Any, path: str) -> Iterator[str]:
        """Yield a problem unless the value is allowed."""
        if not any(type(value) is type(one) and value == one for one in self.values):
            yield must(path, f"one of {', '.join(map(repr, self.values))}", value)


@dataclass(frozen=True)
class Flag:
    """True or False."""

    def problems(self, value: Any, path: str) -> Iterator[str]:
        """Yield a problem unless the value is a bool."""
        if not isinstance(value, bool):
            yield must(path, "True or False", value)


@dataclass(frozen=True)
class Text:
    """A string."""

    def problems(self, value: Any, path: str) -> Iterator[str]:
        """Yield a problem unless the value is a string."""
        if not isinstance(value, str):
            yield must(path, "a string", value)


@dataclass(frozen=True)
class Bytes:
    """A string of bytes."""

    def problems(self, value: Any, path: str) -> Iterator[str]:
        """Yield a problem unless the value is of type bytes."""
        if not isinstance(value, bytes):
            yield must(path, "bytes", value)


@dataclass(frozen=True)
class Integer:
    """A Python integer.

    Args:
        low: smallest allowed value.
        high: largest allowed value.
    """

    low: int = 0
    high: int = COUNTER_LIMIT - 1

    def problems(self, value: Any, path: str) -> Iterator[str]:
        """Yield a problem unless the value is an integer within the bounds."""
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or not self.low <= value <= self.high:
            yield must(path, f"an integer from {self.low} to {self.high}", value)


@dataclass(frozen=True)
class Number:
    """A finite Python number.

    Args:
        low: smallest allowed value.
        high: largest allowed value.
        below: what the value must stay below, or None.
    """

    low: float = -sys.float_info.max
    high: float = sys.float_info.max
    below: float | None = None

    def problems(self, value: Any, path: str) -> Iterator[str]:
        """Yield a problem unless the value is a number within the bounds."""
        real = isinstance(value, (int, float)) and not isinstance(value, bool)
        if (
            not real
            or not self.low <= value <= self.high
            or (self.below is not None and not value < self.below)
        ):
            yield must(path, f"a finite number{self._bounds()}", value)

    def _bounds(self) -> str:
        lower = "" if self.low == -sys.float_info.max else f" >= {self.low:g}"
        upper = "" if self.high == sys.float_info.max else f" <= {self.high:g}"
        below = "" if self.below is None else f" < {self.below:g}"
        return " and".join(bound for bound in (lower, upper, below) if bound)


@dataclass(frozen=True)
class Maybe:
    """None, or what another rule allows.

    Args:
        rule: the other rule.
    """

    rule: Rule

    def problems(self, value: Any, path: str) -> Iterator[str]:
        """Yield the other rule's problems unless the value is None."""
        return iter(()) if value is None else self.rule.problems(value, path)


@dataclass(frozen=True, init=False)
class Either:
    """What at least one of several rules allows.

    Args:
        *rules: the rules; if a value breaks all of them, the first one's problems are named.
    """

    rules: tuple[Rule, ...]

    def __init__(self, *rules: Rule) -> None:
        object.__setattr__(self, "rules", rules)

    def problems(self, value: Any, path: str) -> Iterator[str]:
        """Yield the first rule's problems unless one of the rules has none."""
        found = [list(rule.problems(value, path)) for rule in self.rules]
        return iter(found[0] if all(found) else ())


@dataclass(frozen=True)
class Also:
    """A value that another rule allows and that meets a condition.

    Args:
        rule: the other rule, checked first; the condition sees only values that pass it.
        condition: function of the value that returns what is wrong as a clause, or None.
    """

    rule: Rule
    condition: Callable[[Any], str | None]

    def problems(self, value: Any, path: str) -> Iterator[str]:
        """Yield the rule's problems, or the condition's if the rule has none."""
        found = False
        for problem in self.rule.problems(value, path):
            found = True
            yield problem
        problem = None if found else self.condition(value)
        if problem is not None:
            yield problem


@dataclass(frozen=True)
class ListOf:
    """A list or a tuple whose members all follow one rule.

    Args:
        rule: what every member must be.
        length: number of members; None leaves it open.
        shortest: smallest number of members.
    """

    rule: Rule
    length: int | None = None
    shortest: int = 0

    def problems(self, value: Any, path: str) -> Iterator[str]:
        """Yield the problems of the list and of its members."""
        if not isinstance(value, (list, tuple)):
            yield must(path, "a list", value)
        elif self.length is not None and len(value) != self.length:
            yield f"{path or 'it'} must have {self.length} entries, got {len(value)}"
        elif len(value) < self.shortest:
            yield f"{path or 'it'} must have {self.shortest} entries or more, got {len(value)}"
        else:
            for index, member in enumerate(value):
                yield from self.rule.problems(member, f"{path}[{index}]")


@dataclass(frozen=True)
class Record:
    """A mapping with known keys.

    Args:
        required: rules of the keys that must be there.
        optional: rules of the keys that may be there.
        unknown: None lets all other keys pass unread; a text refuses them and ends the message,
            such as ``"that this model lacks"``.
        named: whether a message puts an entry's name first, as in "queue_length of options"; False
            puts it last, as in "queue of 'weight'".
        label: the mapping's name in messages; None stands for its path in what is checked.
    """

    required: Mapping[Any, Rule]
    optional: Mapping[Any, Rule] | None = None
    unknown: str | None = None
    named: bool = True
    label: str | None = None

    def problems(self, value: Any, path: str) -> Iterator[str]:
        """Yield the problems of the mapping and of its entries."""
        path = path if self.label is None else self.label
        if not isinstance(value, Mapping):
            yield must(path, "a dict", value)
            return
        missing = [key for key in self.required if key not in value]
        if missing:
            yield f"{path or 'it'} lacks {', '.join(map(str, missing))}"
        known = {**self.required, **(self.optional or {})}
        for key, entry in value.items():
            if key in known:
                yield from known[key].problems(entry, self._path(path, key))
            elif self.unknown is not None:
                yield f"{path or 'it'} has {shown(key)} {self.unknown}"

    def _path(self, path: str, key: Any) -> str:
        if not path:
            return str(key)
        return f"{key} of {path}" if self.named else f"{path} of {key!r}"
