"""The rules of a parameter's saved state, and the copy of that state into memory of a step.

Each rule describes a tensor that ``gq_triton.ring`` or an optimizer makes. No step uses a loaded
tensor itself: its values are copied into memory made for the parameter (``filled``). A step
therefore meets the shape, type and layout that it expects, whatever a file held.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gq_triton.divided import dtensor
from gq_triton.float8 import BYTE, EXPONENT_HIGH, ring_rows
from gq_triton.ring import local
from gq_triton.saved.rules import COUNTER_LIMIT, Also, Rule
from gq_triton.saved.tensors import REAL_TYPES, Sharding, TensorLike

__all__ = ["counter_rule", "filled", "losses_rule", "ring_rule", "twin_rule"]


def ring_rule(param: Tensor, length: int) -> Rule:
    """Return the rule of a ring: ``(length, *param.shape)`` of a real type, finite; or bytes.

    No queue holds an infinity: gradients are clamped to its type's range.
    """
    held = ring_rows(length, BYTE)
    in_bytes = TensorLike((held, *param.shape), (BYTE,), sharding=_sharding(param, held))
    return _Ring(
        TensorLike((length, *param.shape), finite=True, sharding=_sharding(param, length)),
        Also(in_bytes, _exponents),
    )


@dataclass(frozen=True)
class _Ring:
    """The rule of a ring: one for floating types, one for bytes."""

    wide: Rule
    in_bytes: Rule

    def problems(self, value: Any, path: str) -> Iterator[str]:
        """Yield the problems under the rule for the value's type."""
        narrow = isinstance(value, Tensor) and value.dtype == BYTE
        yield from (self.in_bytes if narrow else self.wide).problems(value, path)


def _exponents(ring: Tensor) -> str | None:
    """Return a clause where a ring in bytes has exponents that no gradient has."""
    highest = local(ring)[-1]
    wrong = highest.numel() > 0 and int(highest.max()) > EXPONENT_HIGH
    return f"the exponents of a queue in bytes must be at most {EXPONENT_HIGH}" if wrong else None


def counter_rule(highest: int = COUNTER_LIMIT - 1) -> TensorLike:
    """Return the rule of a counter of queued gradients: 0-d int64 from 0 to ``highest``."""
    return TensorLike((), dtypes=(torch.int64,), low=0, high=highest)


def losses_rule(window: int, longest: int) -> TensorLike:
    """Return the rule of a history of losses: ``(longest + window - 1,)``, NaN where unknown."""
    return TensorLike((longest + window - 1,), dtypes=(torch.float32, torch.float64))


def twin_rule(param: Tensor, low: float | None = None) -> TensorLike:
    """Return the rule of a tensor of the parameter's shape, such as a moment, of any real type.

    NaN and infinity pass: a step takes a gradient that is not finite into its moments, as torch's
    optimizers do.
    """
    return TensorLike(tuple(param.shape), REAL_TYPES, low=low, sharding=_sharding(param))


def filled(fresh: Tensor, saved: Tensor) -> Tensor:
    """Copy the values of a checked tensor into ``fresh``, made for them, and return ``fresh``."""
    local(fresh).copy_(local(saved.detach()))
    return fresh


def _sharding(param: Tensor, length: int | None = None) -> Sharding | None:
    """Return how a tensor of a parameter's state is divided among processes, or None.

    None stands for an ordinary tensor. A ring has its ``length`` before the parameter's dimensions.
    """
    if not isinstance(param, dtensor()):
        return None
    part = tuple(param.to_local().shape)
    if length is None:
        return Sharding(param.device_mesh, tuple(param.placements), part)
    from torch.distributed.tensor import Shard

    placements = tuple(Shard(p.dim + 1) if isinstance(p, Shard) else p for p in param.placements)
    return Sharding(param.device_mesh, placements, (length, *part))
