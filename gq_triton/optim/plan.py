"""The plan of one parameter group: its batches, found once, kept as long as they fit.

For a model of a hundred tensors it takes the host milliseconds to find the batches: flat views of
all tensors, and tables of addresses for the kernels. From step to step only the gradients change. A
step therefore keeps the batches of its plan if every tensor is as it was then; see `Plan.found`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, compress, repeat
from operator import attrgetter, is_, is_not, itemgetter, not_
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gq_triton.divided import dtensor
from gq_triton.optim.batches import QUEUE, QUEUED, Batch, Column, Flats, State, States
from gq_triton.optim.layout import Layout
from gq_triton.optim.referrers import Watched, accesses, alone, unshared
from gq_triton.ring import flat, local, rows

__all__ = ["Found", "Plan"]

# Keys of single numbers, and their types; the tensor of any other key is as large as the parameter.
_COUNTERS = {QUEUED: torch.int64, "step": torch.float32}

_grad = attrgetter("grad")


@dataclass
class _Part:
    """One batch of a plan.

    Attributes:
        indices: the positions of the batch's members among the parameters with a gradient.
        copied: the positions, within the batch, of gradients that have no flat view in the memory
            order of their parameter, or are negated in memory. They are copied in every step.
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
    shapes, strides and addresses with the record; those of the states only where a program may
    have changed them, which `referrers` tells.
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
        self._params, self._ring = list(group["params"]), _ring(group)
        self._absent, members, grads = _with_gradient(self._params)
        own = [states[member] for member in members]
        self.keys = tuple(key for key in keys if all(key in state for state in own))
        kinds = {
            type(t)
            for member, state in zip(members, own, strict=True)
            for t in (member, member.grad, *state.values())
        }
        self._sharded = any(issubclass(kind, dtensor()) for kind in kinds)
        self._names = QUEUE, QUEUED, *self.keys
        self._entries = itemgetter(*self._names)
        places = {id(param): place for place, param in enumerate(states)}
        self._places = [places[id(member)] for member in members]
        # The accesses at the last comparison of states, the comparisons since then, and the
        # accesses when nothing else referred to the states.
        self._accesses, self._compared, self._unshared = -1, 0, -1
        found = Found(members, grads, lambda: own, self._entries, self._sharded)
        self._placements, self._addresses = found.placements, found.addresses[len(members) :]
        self._layout, self._layout_of_states = Layout(found.tensors), Layout(found.entries())
        self._addresses_of_states = _addresses(found.entries())
        self.devices = list({shard.device: None for shard in found.shards})
        indices: dict[Any, list[int]] = {}
        for index, member in enumerate(members):
            indices.setdefault(key_of(member), []).append(index)
        self._parts = [_part(found, self._names, chosen) for chosen in indices.values()]

    def found(self, group: dict[str, Any], owner: Watched, keys: Sequence[str]) -> "Found | None":
        """Return the tensors of a step, or None if anything the batches depend on has changed.

        The plan fits if the same parameters have a gradient, all tensors have the types, shapes and
        strides that they had, parameters and states have the same addresses, and the group asks for
        queues of the same length and type.
        """
        params = group["params"]
        if tuple(keys) != self.keys or not _are(params, self._params):
            return None
        if _ring(group) != self._ring:  # the rings are to be converted, or the change is refused
            return None
        absent, members, grads = _with_gradient(params)
        if absent != self._absent:
            return None
        known = accesses(owner) == self._unshared and alone(owner)
        settled = not known and self._is_unshared(owner)

        def states() -> list[State]:
            return self._picked(list(vars(owner)["state"].values()))

        try:
            if not known and not _are(self._picked(list(vars(owner)["state"])), members):
                return None
            found = Found(members, grads, states, self._entries, self._sharded)
            same = found.addresses[len(members) :] == self._addresses
            if not same or not self._layout.fits(found.tensors):
                return None
            if not known and not self._fits(found.entries()):
                return None
        except (IndexError, KeyError, RuntimeError):  # a state is gone; a sparse gradient
            return None
        if found.placements != self._placements:
            return None
        if settled:
            self._unshared = self._accesses  # another thread may have read the attribute since
        return found

    def _picked(self, entries: list[Any]) -> list[Any]:
        """Return the members' entries of a list with one for each state."""
        return [entries[place] for place in self._places]

    def _fits(self, entries: list[Tensor]) -> bool:
        """Return whether the tensors of all states are as they were."""
        same = _addresses(entries) == self._addresses_of_states
        return same and self._layout_of_states.fits(entries)

    def _is_unshared(self, owner: Watched) -> bool:
        """Return whether nothing but the owner refers to the states, where it is time to look.

        That takes longer than to compare the states. A program that reads them in every step does
        not pay for it, and one that keeps a reference pays rarely.
        """
        if accesses(owner) != self._accesses:
            self._accesses, self._compared = accesses(owner), 0
        self._compared += 1
        power_of_two = self._compared & (self._compared - 1) == 0
        if self._compared == 1 or not power_of_two or self._sharded or not alone(owner):
            return False
        return unshared(self._picked(list(vars(owner)["state"].values())), self._entries)

    def batches(self, found: "Found") -> list[Batch]:
        """Return the batches of a step; gradients in another memory order are copied."""
        return [_batch(found, part, self._names) for part in self._parts]


class Found(States):
    """The tensors of one step, one entry per parameter with a gradient.

    Attributes:
        members: the parameters.
        shards: the parts of the parameters that this rank holds: the parameters themselves, or the
            local parts of DTensors.
        grads: the shards of the gradients.
        placements: types, meshes and placements where parameters are DTensors.
        tensors: the shards of gradients and parameters.
        addresses: the addresses of these.
    """

    def __init__(
        self,
        members: Sequence[Tensor],
        grads: list[Tensor],
        lookup: Callable[[], list[State]],
        entries: Callable[[State], tuple[Tensor, ...]],
        sharded: bool,
    ) -> None:
        super().__init__(lookup, entries, sharded)
        self.members = self.shards = members
        self.grads, self.placements = grads, []
        if sharded:
            self.placements = [
                (type(m), type(g), getattr(m, "device_mesh", None), getattr(m, "placements", None))
                for m, g in zip(members, grads, strict=True)
            ]
            self.shards, self.grads = list(map(local, members)), list(map(local, grads))
        self.tensors = [*self.grads, *self.shards]
        self.addresses = _addresses(self.tensors)

    def entries(self) -> list[Tensor]:
        """Return the tensors of all rows."""
        return list(chain.from_iterable(self.rows))


def _ring(group: dict[str, Any]) -> tuple[Any, ...]:
    return group["queue_length"], group["queue_dtype"]


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


def _addresses(tensors: list[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def _check(key: str, entry: Tensor, shard: Tensor) -> None:
    """Raise a ValueError if an entry of a state is not what the kernels take its memory for."""
    wrong, shape = "", entry.shape
    size = (shape[1:] if key == QUEUE else shape).numel()
    if size != (1 if key in _COUNTERS else shard.numel()):
        wrong = f"shape {tuple(shape)}"
    elif entry.dtype != _COUNTERS.get(key, entry.dtype):
        wrong = f"type {entry.dtype}, not {_COUNTERS[key]}"
    elif entry.device != shard.device:
        wrong = f"device {entry.device}, not {shard.device}"
    if wrong:
        raise ValueError(
            f"the state {key!r} of a parameter of shape {tuple(shard.shape)} has {wrong}: it was "
            "altered, load a checkpoint or clear the state"
        )


def _part(found: Found, keys: tuple[str, ...], indices: list[int]) -> _Part:
    columns = dict(zip(keys, zip(*found.rows, strict=True), strict=True))
    for index in indices:
        grad, shard = found.grads[index], found.shards[index]
        if grad.shape != shard.shape:  # p.data was replaced
            raise ValueError(
                f"a gradient must have the shape of its parameter, got {tuple(grad.shape)} and "
                f"{tuple(shard.shape)}: call zero_grad() after changing a parameter's shape"
            )
        for key, column in columns.items():
            _check(key, column[index], shard)

    def is_view(tensor: Tensor, index: int) -> bool:
        return flat(tensor, found.shards[index]).data_ptr() == tensor.data_ptr()

    def is_read(grad: Tensor, index: int) -> bool:
        # Autograd may return the imaginary part of a conjugate as memory of the negated numbers.
        return is_view(grad, index) and not grad.is_neg()

    copied = [at for at, index in enumerate(indices) if not is_read(found.grads[index], index)]
    vectors = [found.shards, *(column for key, column in columns.items() if key != QUEUE)]
    kept = all(
        is_view(c[index], index) for c in vectors for index in indices if c[index].numel() > 1
    )
    # Only the address of a plain tensor says where its elements are.
    plain = {type(found.grads[index]) for index in indices} <= {Tensor, Parameter}
    return _Part(indices, copied, {} if kept and plain else None)


def _batch(found: Found, part: _Part, keys: tuple[str, ...]) -> Batch:
    members, shards, grads = found.members, found.shards, found.grads
    addresses, indices, memo = found.addresses[: len(grads)], part.indices, part.memo
    if len(indices) < len(members):
        members, shards, grads = (
            [tensors[index] for index in indices] for tensors in (members, shards, grads)
        )
        addresses = [addresses[index] for index in indices]
    if part.copied:
        grads = list(grads)
        for at in part.copied:
            grads[at] = flat(grads[at].resolve_neg(), shards[at])
        addresses = _addresses(grads)
    return Batch(
        members, found, indices, keys, shards,
        params=Flats(shards, shards, flat, memo),
        grads=Flats(grads, shards, _flat_grad, memo, None if memo is None else tuple(addresses)),
        queues=Flats(Column(found, indices, keys.index(QUEUE)), shards, _flat_ring, memo),
    )  # fmt: skip


def _are(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Return whether the tensors are the same objects."""
    return len(tensors) == len(others) and all(map(is_, tensors, others))


def _flat_grad(grad: Tensor, like: Tensor) -> Tensor:
    # A gradient that was copied is flat, whatever the parameter's order.
    return grad if grad.dim() == 1 and grad.is_contiguous() else flat(grad, like)


def _flat_ring(queue: Tensor, _: Tensor) -> Tensor:
    return rows(queue)
