"""The state of one parameter of an optimizer: its ring, its memory order, and what is loaded.

What a step adds to torch's state lies in ``optimizer.state`` too, where checkpoint libraries look.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gq_triton.divided import dtensor
from gq_triton.float8 import slots, stored_type
from gq_triton.optim.batches import QUEUE, QUEUED, State
from gq_triton.optim.saved import EXP_AVG, EXP_AVG_SQ, MOMENTUM_BUFFER, STEP
from gq_triton.ring import fill_ring, local, new_counter, new_queue
from gq_triton.saved.state import filled

__all__ = ["allocate_ring", "check_length", "reorder", "saved_states", "take_over"]


def allocate_ring(param: Tensor, group: dict[str, Any], state: State) -> None:
    """Give a state its ring and the counter of the ring, unless it has them.

    A ring of another type than the one that the group asks for, as it comes from a checkpoint, is
    converted.
    """
    chosen = group["queue_dtype"]
    if QUEUE not in state:
        state[QUEUE] = new_queue(param, group["queue_length"], chosen)
        state[QUEUED] = new_counter(param)
    elif chosen is not None and state[QUEUE].dtype != stored_type(chosen, param.dtype):
        ring = state[QUEUE]
        state[QUEUE] = fill_ring(new_queue(param, slots(ring), chosen), ring)


def check_length(
    name_of: Callable[[Tensor], str], param: Tensor, group: dict[str, Any], state: State
) -> None:
    """Raise a ValueError if a ring has another length than its group asks for.

    A change of the group's option between two steps cannot be followed: a ring keeps no older
    gradients than its own.
    """
    if QUEUE in state and slots(state[QUEUE]) != group["queue_length"]:
        raise ValueError(
            f"the queue of {name_of(param)} holds {slots(state[QUEUE])} gradients, got "
            f'queue_length={group["queue_length"]}: set it back, or delete "{QUEUE}" of its state, '
            "to start with an empty one"
        )


def reorder(param: Tensor, state: State) -> None:
    """Copy a parameter's state to the parameter's memory order.

    A checkpoint, or a tensor that a program puts into the state, may have another one.
    """
    if isinstance(param, dtensor()):
        return
    order = torch.empty_like(param, device="meta").stride()
    for name, value in state.items():
        if name == QUEUE:
            if value.stride() != (param.numel(), *order) and value.shape[1:] == param.shape:
                state[name] = new_queue(param, slots(value), value.dtype).copy_(value)
        elif (
            isinstance(value, Tensor)
            and value.dim()
            and value.shape == param.shape
            and value.stride() != order
        ):
            state[name] = torch.empty_like(param, dtype=value.dtype).copy_(value)


def take_over(param: Tensor, state: State, name: str, value: Any) -> None:
    """Copy one entry of a checked state into new memory with the layout that a step needs.

    An entry of an unknown name stays as torch has loaded it.
    """
    if name == QUEUE:
        state[name] = filled(new_queue(param, slots(value), value.dtype), value)
    elif name == QUEUED:
        state[name] = filled(new_counter(param), value)
    elif name == STEP:
        fresh = torch.zeros((), dtype=torch.float32, device=local(param).device)
        state[name] = fresh.copy_(torch.as_tensor(value))
    elif name in (EXP_AVG, EXP_AVG_SQ, MOMENTUM_BUFFER):
        if value is None:
            del state[name]
            return
        fresh = torch.zeros_like(param, memory_format=torch.preserve_format)
        state[name] = filled(fresh.requires_grad_(False), value)


def saved_states(
    groups: Sequence[dict[str, Any]], saved: dict[str, Any]
) -> Iterator[tuple[Tensor, State]]:
    """Yield each parameter of the groups with its saved state."""
    keys = [key for group in saved["param_groups"] for key in group["params"]]
    params = [param for group in groups for param in group["params"]]
    for key, param in zip(keys, params, strict=True):
        yield param, saved["state"].get(key, {})
