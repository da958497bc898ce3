"""The look for gradients that hold a NaN or an infinity."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["all_finite"]


def all_finite(grads: Sequence[Tensor]) -> Tensor:
    """Return for each gradient whether all of its elements are finite; see ``protocol``."""
    device = grads[0].device if grads else None
    # A sum is one read of the gradient; only where it overflows is a second look needed.
    flags = [math.isfinite(grad.sum()) or bool(torch.isfinite(grad).all()) for grad in grads]
    return torch.tensor(flags, dtype=torch.bool, device=device)
