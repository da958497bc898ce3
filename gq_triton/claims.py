"""Claims on parameters: only one *door* may weight the gradients of a parameter.

A door is an entry to this package that weights gradients: the plug-in, the DDP hook, or the
optimizers. Two doors to one parameter would weight its gradient twice.
"""

import gc
import weakref
from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import Tensor

__all__ = ["ATTACH", "HOOK", "OPTIMIZER", "claim", "release"]

# The names of the doors in messages.
ATTACH = "GradQueue.attach"
HOOK = "the hook of gq_triton.dist"
OPTIMIZER = "GQSGD or GQAdamW"


def _always() -> bool:
    return True


class _Claim(NamedTuple):
    """What one owner weights: one object for all of its parameters."""

    door: str
    owner: Callable[[], object | None]
    active: Callable[[], bool]

    def holds(self) -> bool:
        return self.owner() is not None and self.active()


# By the id of the parameter. A weak reference would keep torch from swapping it, as FSDP2 does
# in ``model.cpu()``. An owner holds its parameters, so the ids are theirs while the owner lives.
_claims: dict[int, _Claim] = {}


def claim(
    params: Iterable[Tensor], owner: object, door: str, active: Callable[[], bool] = _always
) -> None:
    """Record that an owner weights the gradients of parameters from now on.

    An optimizer of this package takes claims over from an earlier optimizer, and a state of the
    hook from an earlier state, because a loop may build them anew. Any other second claim is
    refused.

    Args:
        params: the parameters.
        owner: the object that weights their gradients. It is held weakly: when the owner goes, its
            claims end.
        door: the owner's door, ``ATTACH``, ``HOOK`` or ``OPTIMIZER``.
        active: returns whether the owner weights gradients at present.

    Raises:
        ValueError: another owner weights one of the parameters already. No claim is recorded.
    """
    claimed = list(params)
    if _rival(claimed, owner, door):
        gc.collect()  # an owner that nobody holds any more is no rival
    rival = _rival(claimed, owner, door)
    if rival is not None:
        raise ValueError(_MESSAGES[rival.door, door])
    new = _Claim(door, weakref.ref(owner), active)
    for key in [key for key, known in _claims.items() if known.owner() is None]:
        del _claims[key]
    for param in claimed:
        _claims[id(param)] = new


def release(params: Iterable[Tensor], owner: object) -> None:
    """Delete an owner's claims on parameters."""
    for param in params:
        known = _claims.get(id(param))
        if known is not None and known.owner() is owner:
            del _claims[id(param)]


def _rival(params: Iterable[Tensor], owner: object, door: str) -> _Claim | None:
    """Return another owner's claim that rules out a new one on parameters; None if none does."""
    # One claim covers many parameters, and whether it holds may take long to find out.
    found = (_claims.get(id(param)) for param in params)
    claims = {id(known): known for known in found if known is not None}
    for known in claims.values():
        same_kind = known.door == door and door != ATTACH
        if known.owner() is not owner and not same_kind and known.holds():
            return known
    return None


_ONE = "keep one of the two"
_MESSAGES = {
    (ATTACH, ATTACH): (
        "GradQueue is attached already to these parameters, and a second one would weight twice: "
        "call remove() on the first handle"
    ),
    (ATTACH, OPTIMIZER): (
        f"GradQueue.attach weights these parameters already, and {OPTIMIZER} would weight them a "
        f"second time: {_ONE}, and call remove() on the handle of attach"
    ),
    (ATTACH, HOOK): (
        f"GradQueue.attach weights these parameters already, and {HOOK} would weight them a second "
        f"time: call remove() on the handle of attach, and give the options to register"
    ),
    (OPTIMIZER, ATTACH): (
        f"{OPTIMIZER} weights these parameters already, and GradQueue.attach would weight them a "
        f"second time: {_ONE}"
    ),
    (OPTIMIZER, HOOK): (
        f"{OPTIMIZER} weights these parameters already, and {HOOK} would weight them a second "
        "time: use torch.optim.SGD or torch.optim.AdamW with the hook"
    ),
    (HOOK, ATTACH): (
        f"{HOOK} weights these parameters already, and GradQueue.attach would weight them a second "
        "time: leave attach out"
    ),
    (HOOK, OPTIMIZER): (
        f"{HOOK} weights these parameters already, and {OPTIMIZER} would weight them a second "
        "time: use torch.optim.SGD or torch.optim.AdamW with the hook"
    ),
}
