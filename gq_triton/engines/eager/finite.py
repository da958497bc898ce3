"""The search for gradients that hold a NaN or an infinity."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["all_finite"]


def all_finite(grads: Sequence[Tensor]) -> Tensor:
    """Return for each gradient whether all of its elements are finite; see ``protocol``."""
    device = grads[0].device if grads else None
    # A finite sum proves finite elements in one read; an overflow of the sum needs a second look.
    flags = [math.isfinite(grad.sum()) or bool(torch.isfinite(grad).all()) for grad in grads]
    return torch.tensor(flags, dtype=torch.bool, device=device)
