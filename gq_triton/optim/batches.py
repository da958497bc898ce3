"""The batches of one parameter group: found once, kept as long as they fit.

For a model of a hundred tensors it takes the host milliseconds to find the batches: flat views of
all tensors, and tables of addresses for the kernels. From step to step only the gradients change. A
step therefore keeps the batches of its plan if every tensor is as it was then; see `Plan.found`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, compress, islice, repeat
from operator import attrgetter, is_, is_not, itemgetter, not_
from typing import Any, overload

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from gq_triton.optim.layout import Layout
from gq_triton.ring import flat, local, rows, shard_number, write_back_

__all__ = ["QUEUE", "QUEUED", "Batch", "Flats", "Plan", "State"]

# Keys of the state of one parameter.
QUEUE, QUEUED = "queue", "queued"

# Keys of single numbers; the tensor of any other key is as large as the parameter.
_COUNTERS = QUEUED, "step"

# The places of one part's tensors for the random bits of their rounding.
_MOST_TENSORS = 1 << 20

State = dict[str, Any]
_grad = attrgetter("grad")
_NOTHING: State = {}


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

    def write_back(self) -> None:
        """Copy flat tensors that are not views back into the tensors they were made from."""
        for index, made in self._made.items():
            write_back_(self._tensors[index], made)


class _Column(Sequence[Tensor]):
    """One entry of every state; nothing is looked up before somebody asks."""

    def __init__(self, rows: Sequence[tuple[Tensor, ...]], place: int) -> None:
        self._rows, self._place = rows, place

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Tensor]:
        return map(itemgetter(self._place), self._rows)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [row[self._place] for row in self._rows[index]]
        return self._rows[index][self._place]


@dataclass
class Batch:
    """Parameters that one launch updates together, with flat views of their tensors.

    Attributes:
        members: the parameters.
        states: their states.
        columns: by key, the tensors of all states, or this rank's shards of them; a key that not
            every member has is left out.
        shards: the parts of the parameters that this rank holds.
        params: the parameters' shards, flat.
        grads: the gradients' shards, flat.
        queues: the rings, ``(L, P)`` each.
        place: the tensors that the step updates before these.
    """

    members: Sequence[Tensor]
    states: Sequence[State]
    columns: dict[str, Sequence[Tensor]]
    shards: Sequence[Tensor]
    params: Flats
    grads: Sequence[Tensor]
    queues: Flats
    place: int = 0

    @property
    def queued(self) -> Sequence[Tensor]:
        """The counters of queued gradients, one per member."""
        return self.columns[QUEUED]

    def state(self, key: str) -> Flats:
        """Return one entry of every state, flat and in the order of the parameter's memory."""
        tensors = self.columns.get(key)
        if tensors is None:  # these tensors were made after the batch
            tensors = [local(state[key]) for state in self.states]
        return Flats(tensors, self.shards, flat)

    def rounding(self, group: dict[str, Any]) -> dict[str, Any]:
        """Return an engine's arguments of the rounding.

        No two tensors of a step have the same place, and no two parts of one, so that none is
        rounded with the random bits of another.
        """
        if not group["stochastic_rounding"]:
            return {}
        part = shard_number(self.members[0])
        return {"stochastic_rounding": True, "place": (part * _MOST_TENSORS + self.place) % 2**31}


@dataclass
class _Part:
    """One batch of a plan.

    Attributes:
        indices: the positions of the batch's members among the parameters with a gradient.
        copied: the positions, within the batch, of gradients that have no flat view in the memory
            order of their parameter, and are copied in every step.
        memo: the memo of `Flats`, or None.
    """

    indices: list[int]
    copied: list[int]
    memo: dict[Any, Any] | None


class Plan:
    """The batches of one group, and a record of everything that they depend on.

    Attributes:
        keys: the keys of the states' tensors that a step uses, beside the ring and its counter.
        devices: the devices of the parameters.

    The plan refers to the parameters, as their group does. It refers to no tensor of a state, so
    that a state that a user drops is freed. It holds no weak references either, because
    ``torch.utils.swap_tensors`` refuses a tensor that has one. Instead a step compares all types,
    shapes, strides and addresses with the record.
    """

    def __init__(
        self,
        group: dict[str, Any],
        states: Mapping[Tensor, State],
        keys: Sequence[str],
        key_of: Callable[[Tensor], Any],
    ) -> None:
        """Divide the group's parameters that have a gradient into batches.

        Args:
            group: a parameter group of the optimizer.
            states: the states of its parameters, which hold queues and counters.
            keys: keys of further tensors of a state that a step uses; a key that any of the states
                lacks is left out.
            key_of: returns the properties that all members of one batch share.
        """
        self._params, self._queue_dtype = list(group["params"]), group["queue_dtype"]
        self._absent, members, grads = _with_gradient(self._params)
        own = [states[member] for member in members]
        self.keys = tuple(key for key in keys if all(key in state for state in own))
        kinds = {
            type(t)
            for member, state in zip(members, own, strict=True)
            for t in (member, member.grad, *state.values())
        }
        self._sharded = any(issubclass(kind, DTensor) for kind in kinds)
        self._entries = itemgetter(QUEUE, QUEUED, *self.keys)
        found = _find(members, grads, states, self._entries, self._sharded)
        self._placements, self._addresses = found.placements, found.addresses
        self._layout = Layout(found.tensors)
        self.devices = list({shard.device: None for shard in found.shards})
        indices: dict[Any, list[int]] = {}
        for index, member in enumerate(members):
            indices.setdefault(key_of(member), []).append(index)
        columns = _columns(found.rows, (QUEUE, QUEUED, *self.keys))
        self._parts = [_part(found, columns, chosen) for chosen in indices.values()]

    def found(
        self, group: dict[str, Any], states: Mapping[Tensor, State], keys: Sequence[str]
    ) -> "Found | None":
        """Return the tensors of a step, or None if anything the batches depend on has changed.

        The plan fits if the same parameters have a gradient, all tensors have the types, shapes and
        strides that they had, parameters and states have the same addresses, and the group asks for
        queues of the same type.
        """
        params = group["params"]
        if tuple(keys) != self.keys or not _are(params, self._params):
            return None
        if group["queue_dtype"] != self._queue_dtype:  # the rings are to be converted
            return None
        absent, members, grads = _with_gradient(params)
        if absent != self._absent:
            return None
        try:
            found = _find(members, grads, states, self._entries, self._sharded)
            same = found.addresses == self._addresses and self._layout.fits(found.tensors)
        except (KeyError, RuntimeError):  # a state is gone; a sparse gradient has no strides
            return None
        return found if same and found.placements == self._placements else None

    def batches(self, found: "Found") -> list[Batch]:
        """Return the batches of a step; gradients in another memory order are copied."""
        return [_batch(found, part, (QUEUE, QUEUED, *self.keys)) for part in self._parts]


@dataclass
class Found:
    """The tensors of one step, one entry per parameter with a gradient, and the plan's record.

    Attributes:
        members: the parameters.
        states: the states of the parameters.
        shards: the parts of the parameters that this rank holds: the parameters themselves, or the
            local parts of DTensors.
        grads: the shards of the gradients.
        rows: of each state, the shards of the tensors that the step uses.
        placements: types, meshes and placements where parameters are DTensors.
        tensors: the shards of gradients, parameters and states.
        addresses: the addresses of parameters and states.
    """

    members: Sequence[Tensor]
    states: list[State]
    shards: Sequence[Tensor]
    grads: list[Tensor]
    rows: list[tuple[Tensor, ...]]
    placements: list[Any]
    tensors: list[Tensor]
    addresses: list[int]


def _with_gradient(
    params: Sequence[Tensor],
) -> tuple[list[bool] | None, Sequence[Tensor], list[Tensor]]:
    """Return which parameters have no gradient or None, the others, and their gradients."""
    grads: list[Any] = list(map(_grad, params))
    if all(map(is_not, grads, repeat(None))):
        return None, params, grads
    present = list(map(is_not, grads, repeat(None)))
    absent = list(map(not_, present))
    return absent, list(compress(params, present)), list(compress(grads, present))


def _find(
    members: Sequence[Tensor],
    grads: list[Tensor],
    states: Mapping[Tensor, State],
    entries: Callable[[State], tuple[Tensor, ...]],
    sharded: bool,
) -> Found:
    # map() over functions written in C: this runs in every step.
    if _are(list(states), members):
        own = list(states.values())  # to look up a tensor is slow
    else:
        own = list(map(states.get, members, repeat(_NOTHING)))  # [] would add an entry
    rows = list(map(entries, own))
    shards, placements = members, []
    if sharded:
        placements = [
            (type(m), type(g), getattr(m, "device_mesh", None), getattr(m, "placements", None))
            for m, g in zip(members, grads, strict=True)
        ]
        shards, grads = list(map(local, members)), list(map(local, grads))
        rows = [tuple(map(local, row)) for row in rows]
    tensors = [*grads, *shards, *chain.from_iterable(rows)]
    addresses = list(map(Tensor.data_ptr, islice(tensors, len(grads), None)))
    return Found(members, own, shards, grads, rows, placements, tensors, addresses)


def _columns(rows: list[tuple[Tensor, ...]], keys: tuple[str, ...]) -> dict[str, Sequence[Tensor]]:
    return {key: _Column(rows, place) for place, key in enumerate(keys)}


def _part(found: Found, columns: dict[str, Sequence[Tensor]], indices: list[int]) -> _Part:
    for key, column in columns.items():
        for index in indices:
            shape, own = column[index].shape, found.shards[index].shape
            size = (shape[1:] if key == QUEUE else shape).numel()
            if size != (1 if key in _COUNTERS else own.numel()):
                raise ValueError(
                    f"the state {key!r} of a parameter of shape {tuple(own)} has shape "
                    f"{tuple(shape)}: it was altered, load a checkpoint or clear the state"
                )

    def is_view(tensor: Tensor, index: int) -> bool:
        return flat(tensor, found.shards[index]).data_ptr() == tensor.data_ptr()

    copied = [at for at, index in enumerate(indices) if not is_view(found.grads[index], index)]
    vectors = [found.shards, *(column for key, column in columns.items() if key != QUEUE)]
    kept = all(
        is_view(c[index], index) for c in vectors for index in indices if c[index].numel() > 1
    )
    # Only the address of a plain tensor says where its elements are.
    plain = {type(found.grads[index]) for index in indices} <= {Tensor, Parameter}
    return _Part(indices, copied, {} if kept and plain else None)


def _batch(found: Found, part: _Part, keys: tuple[str, ...]) -> Batch:
    def pick(column: Sequence[Any]) -> Sequence[Any]:
        return column if len(part.indices) == len(column) else [column[i] for i in part.indices]

    shards, grads, memo = pick(found.shards), pick(found.grads), part.memo
    if part.copied:
        grads = list(grads)
        for at in part.copied:
            grads[at] = flat(grads[at], shards[at])
    columns = _columns(list(pick(found.rows)), keys)
    addresses = None if memo is None else tuple(map(Tensor.data_ptr, grads))
    return Batch(
        pick(found.members), pick(found.states), columns, shards,
        params=Flats(shards, shards, flat, memo),
        grads=Flats(grads, shards, _flat_grad, memo, addresses),
        queues=Flats(columns[QUEUE], shards, _flat_ring, memo),
    )  # fmt: skip


def _are(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Return whether the tensors are the same objects."""
    return len(tensors) == len(others) and all(map(is_, tensors, others))


def _flat_grad(grad: Tensor, like: Tensor) -> Tensor:
    # A gradient that was copied is flat, whatever the parameter's order.
    return grad if grad.dim() == 1 and grad.is_contiguous() else flat(grad, like)


def _flat_ring(queue: Tensor, _: Tensor) -> Tensor:
    return rows(queue)
