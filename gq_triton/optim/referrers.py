"""Whether anything but an optimizer can reach the tensors of its states.

A step must know that no tensor of a state has other memory, another type or another shape than when
its plan was made. To ask a thousand tensors takes the host longer than the rest of the step. But a
program can change a tensor only if it refers to it, and it gets hold of one only through the
optimizer's attribute ``state``. If nothing else refers to the tensors, and nobody has read the
attribute since that was seen, they are as they were.

References are counted: Python's to the dicts, the tensors and their storages, weak ones included,
and those of C++ to tensors and storages. Another tensor in the same memory counts, because a
program can resize the memory of both through it. What the counts of an unshared state are depends
on the version of Python, so a trial tells. Where the trial does not see every kind of reference,
as it may happen if torch lacks a function that is not public, every state counts as shared.
"""

import sys
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from itertools import chain
from operator import itemgetter
from typing import Any
from weakref import getweakrefcount, ref

import torch
from torch import Tensor

__all__ = ["Watched", "accesses", "alone", "unshared"]

Counts = tuple[set[Any], ...]


class Watched:
    """An optimizer's attribute ``state``, which counts how often it was read or set."""

    _accesses = 0

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The states of the parameters, as in torch.

        Whoever reads it may change them, so a step compares all of them again.
        """
        self._accesses += 1
        return vars(self)["state"]

    @state.setter
    def state(self, states: defaultdict[Tensor, Any]) -> None:
        self._accesses += 1
        vars(self)["state"] = states


class _Owner:
    """A stand-in for an optimizer, with a mapping of states."""

    def __init__(self) -> None:
        self.state = {
            at: {name: torch.zeros(1, device="cpu") for name in ("a", "b")} for at in range(2)
        }


def accesses(owner: Watched) -> int:
    """Return how often the attribute ``state`` was read or set."""
    return owner._accesses


def alone(owner: Any) -> bool:
    """Return whether nothing but ``owner`` refers to its attribute ``state``, a mapping."""
    return _references(owner) == _references_of_a_trial()


@cache
def _references_of_a_trial() -> tuple[int, int]:
    return _references(_Owner())


def _references(owner: Any) -> tuple[int, int]:
    return sys.getrefcount(vars(owner)), sys.getrefcount(vars(owner)["state"])


def unshared(
    states: list[dict[Any, Any]], entries: Callable[[dict[Any, Any]], tuple[Tensor, ...]]
) -> bool:
    """Return whether nothing but one mapping and the list refers to the states and their tensors.

    Args:
        states: the dicts, each of them a value of the mapping.
        entries: returns the tensors of a dict that count, at least two.
    """
    expected = _counts_of_a_trial()
    return expected is not None and _counts(states, entries) == expected


def _counts(
    states: list[dict[Any, Any]], entries: Callable[[dict[Any, Any]], tuple[Tensor, ...]]
) -> Counts:
    tensors = list(chain.from_iterable(map(entries, states)))
    return (
        set(map(sys.getrefcount, states)),
        set(map(sys.getrefcount, tensors)),
        set(map(getweakrefcount, tensors)),
        set(map(Tensor._use_count, tensors)),  # pyright: ignore[reportAttributeAccessIssue]
        set(map(_counts_of_storage, tensors)),
    )


def _counts_of_storage(tensor: Tensor) -> tuple[int, int, int]:
    storage = tensor.untyped_storage()
    uses = torch._C._storage_Use_Count(storage._cdata)
    return sys.getrefcount(storage), getweakrefcount(storage), uses


_HOLDERS: tuple[Callable[[dict[Any, Any]], Any], ...] = (
    lambda state: state,
    lambda state: state["a"],
    lambda state: ref(state["a"]),
    lambda state: state["a"].detach(),
    lambda state: state["a"].untyped_storage(),
    lambda state: ref(state["a"].untyped_storage()),
)


@cache
def _counts_of_a_trial() -> Counts | None:
    """Return the counts of states that nothing else refers to; None where a reference is missed."""
    owner, entries = _Owner(), itemgetter("a", "b")
    try:
        found = _counts(list(owner.state.values()), entries)
        for hold in _HOLDERS:
            held = hold(owner.state[0])
            if _counts(list(owner.state.values()), entries) == found:
                return None
            del held
        same = _counts(list(owner.state.values()), entries) == found
    except (AttributeError, TypeError, RuntimeError):
        return None
    return found if same and all(len(counts) == 1 for counts in found) else None
