"""Which door weights the gradients of which parameter: two doors would weight twice."""

import gc
import weakref
from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["ATTACH", "HOOK", "OPTIMIZER", "claim", "release"]

# The doors, as messages call them.
ATTACH = "GradQueue.attach"
HOOK = "the hook of gq_triton.dist"
OPTIMIZER = "GQSGD or GQAdamW"


def _always() -> bool:
    return True


class _Claim(NamedTuple):
    door: str
    owner: Callable[[], object | None]
    active: Callable[[], bool]

    def holds(self) -> bool:
        return self.owner() is not None and self.active()


_claims = WeakIdKeyDictionary()


def claim(
    params: Iterable[Tensor], owner: object, door: str, active: Callable[[], bool] = _always
) -> None:
    """Note that an owner weights the gradients of parameters from now on.

    Another optimizer of this package, or another state of the hook, takes over from an earlier one
    of its kind: a loop may build them anew. Everything else would weight twice.

    Args:
        params: the parameters.
        owner: what weights them; held weakly, and a claim ends with it.
        door: ``ATTACH``, ``HOOK`` or ``OPTIMIZER``.
        active: returns whether the owner weights at all.

    Raises:
        ValueError: another owner weights one of them already. Nothing is noted.
    """
    claimed = list(params)
    if any(_rival(param, owner, door) for param in claimed):
        gc.collect()  # an owner that nobody holds any more is no rival
    for param in claimed:
        rival = _rival(param, owner, door)
        if rival is not None:
            raise ValueError(_MESSAGES[rival.door, door])
    for param in claimed:
        _claims[param] = _Claim(door, weakref.ref(owner), active)


def release(params: Iterable[Tensor], owner: object) -> None:
    """Forget the claims of an owner on parameters."""
    for param in params:
        known = _claims.get(param)
        if known is not None and known.owner() is owner:
            del _claims[param]


def _rival(param: Tensor, owner: object, door: str) -> _Claim | None:
    """Return the claim on a parameter that a new one would contradict; None where there is none."""
    known: _Claim | None = _claims.get(param)
    if known is None or known.owner() is owner or (known.door == door and door != ATTACH):
        return None
    return known if known.holds() else None


_ONE = "keep one of the two"
_MESSAGES = {
    (ATTACH, ATTACH): (
        "attached already to these parameters, and a second time would weight twice: call remove() "
        "on the first handle"
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
