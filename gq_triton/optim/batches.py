"""A batch: parameters that one launch updates together, with flat views of their tensors.

In a step of many tensors most of them are never asked for: the kernels find them by a table of
addresses that was made before. So states are looked up and views made at their first use.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import Any, overload

import torch
from torch import Tensor

from gq_triton.ring import flat, local, shard_number, write_back_

__all__ = ["QUEUE", "QUEUED", "Batch", "Column", "Flats", "State", "States"]

# Keys of the state of one parameter.
QUEUE, QUEUED = "queue", "queued"

# The places of one part's tensors for the random bits of their rounding.
_MOST_TENSORS = 1 << 20

State = dict[str, Any]


class Flats(Sequence[Tensor]):
    """A sequence of flat tensors, each made at its first use: a view where memory allows it.

    Attributes:
        memo: a dict in which `gq_triton.kernels` keeps data for the next steps, all of it
            independent of the gradients' addresses; None where that data would not stay valid.
        addresses: the addresses of the flat tensors, or None where they are not known yet.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        likes: Sequence[Tensor],
        flatten: Callable[[Tensor, Tensor], Tensor],
        memo: dict[Any, Any] | None = None,
        addresses: tuple[int, ...] | None = None,
    ) -> None:
        self._tensors, self._likes, self._flatten = tensors, likes, flatten
        self._made: dict[int, Tensor] = {}
        self.memo, self.addresses = memo, addresses

    def __len__(self) -> int:
        return len(self._tensors)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self[at] for at in range(len(self))[index]]
        index = range(len(self))[index]
        if index not in self._made:
            self._made[index] = self._flatten(self._tensors[index], self._likes[index])
        return self._made[index]

    @property
    def device(self) -> torch.device:
        """The device of the tensors; there must be one."""
        return self._tensors[0].device

    def write_back(self) -> None:
        """Copy flat tensors that are not views back into the tensors they were made from."""
        for index, made in self._made.items():
            write_back_(self._tensors[index], made)


class States:
    """The states of the parameters of one step.

    Args:
        lookup: returns the states.
        entries: returns the tensors of a state that the step uses.
        sharded: whether any of them is a DTensor.
    """

    def __init__(
        self,
        lookup: Callable[[], list[State]],
        entries: Callable[[State], tuple[Tensor, ...]],
        sharded: bool,
    ) -> None:
        self._lookup, self._entries, self._sharded = lookup, entries, sharded

    @cached_property
    def states(self) -> list[State]:
        """One state per parameter."""
        return self._lookup()

    @cached_property
    def rows(self) -> list[tuple[Tensor, ...]]:
        """Of each state the tensors that the step uses, or this rank's shards of them."""
        rows = list(map(self._entries, self.states))
        return [tuple(map(local, row)) for row in rows] if self._sharded else rows


class Column(Sequence[Tensor]):
    """One entry of every state of a batch.

    Args:
        found: the states of all parameters.
        indices: the batch's members among them.
        place: the entry's place in a row.
    """

    def __init__(self, found: States, indices: Sequence[int], place: int) -> None:
        self._found, self._indices, self._place = found, indices, place

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[Tensor]:
        rows = self._found.rows
        chosen = rows if len(rows) == len(self) else [rows[index] for index in self._indices]
        return map(itemgetter(self._place), chosen)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return list(self)[index]
        return self._found.rows[self._indices[index]][self._place]


@dataclass
class Batch:
    """Parameters that one launch updates together, with flat views of their tensors.

    Attributes:
        members: the parameters.
        found: the states of these and other parameters.
        indices: the members' places among all of these.
        keys: the keys of the entries of a row.
        shards: the parts of the parameters that this rank holds.
        params: the parameters' shards, flat.
        grads: the gradients' shards, flat.
        queues: the rings, ``(L, P)`` each.
        place: the tensors that the step updates before these.
    """

    members: Sequence[Tensor]
    found: States
    indices: Sequence[int]
    keys: tuple[str, ...]
    shards: Sequence[Tensor]
    params: Flats
    grads: Sequence[Tensor]
    queues: Flats
    place: int = 0

    @property
    def states(self) -> Sequence[State]:
        """The members' states."""
        return [self.found.states[index] for index in self.indices]

    @property
    def queued(self) -> Sequence[Tensor]:
        """The counters of queued gradients, one per member."""
        return self.column(QUEUED)

    def column(self, key: str) -> Sequence[Tensor]:
        """Return one entry of every state, or this rank's shard of it."""
        if key in self.keys:
            return Column(self.found, self.indices, self.keys.index(key))
        return [local(state[key]) for state in self.states]  # they were made after the batch

    def state(self, key: str) -> Flats:
        """Return one entry of every state, flat and in the order of the parameter's memory."""
        return Flats(self.column(key), self.shards, flat)

    def rounding(self, group: dict[str, Any]) -> dict[str, Any]:
        """Return an engine's arguments of the rounding.

        No two tensors of a step have the same place, and no two parts of one, so that none is
        rounded with the random bits of another.
        """
        if not group["stochastic_rounding"]:
            return {}
        part = shard_number(self.members[0])
        return {"stochastic_rounding": True, "place": (part * _MOST_TENSORS + self.place) % 2**31}
