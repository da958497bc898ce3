"""Products of samples' gradients with the centres of clusters, from the gradients' factors.

Equations 5 to 9 of Faghri et al., "A Study of Gradient Variance in Deep Learning" (2020). Shapes: B
samples, G groups of channels, T positions, I inputs, O outputs, K clusters, R terms of a centre.
"""

import torch
from torch import Tensor

__all__ = [
    "by_gradient",
    "by_position",
    "gradient_products",
    "squares",
    "squares_by_position",
    "whole",
]

# Elements of the samples' whole gradients that are formed at a time.
ROOM = 1 << 24


def gradient_products(
    inputs: Tensor,
    outputs: Tensor,
    centre_inputs: Tensor,
    centre_outputs: Tensor,
    dots: Tensor,
    norms: Tensor,
    *,
    whole_dots: bool,
    whole_norms: bool,
) -> None:
    """Write products and squared norms; see ``engines.protocol``."""
    dtype = torch.promote_types(torch.promote_types(inputs.dtype, outputs.dtype), torch.float32)
    found, centre = (inputs, outputs), (centre_inputs.to(dtype), centre_outputs.to(dtype))
    groups = inputs.shape[1]
    step = len(inputs)
    if whole_dots or whole_norms:
        step = max(1, ROOM // (groups * inputs.shape[3] * outputs.shape[3]))
    for begin in range(0, len(inputs), step):
        rows = slice(begin, begin + step)
        a, d = (factor[rows].to(dtype) for factor in found)
        gradients = whole(a, d) if whole_dots or whole_norms else a
        dots[rows] = by_gradient(gradients, *centre) if whole_dots else by_position(a, d, *centre)
        norms[rows] = squares(gradients) if whole_norms else squares_by_position(a, d)


def whole(inputs: Tensor, outputs: Tensor) -> Tensor:
    """Return the samples' gradients ``(B, G, O, I)``."""
    return torch.einsum("bgto,bgti->bgoi", outputs, inputs)


def squares(gradients: Tensor) -> Tensor:
    """Return the squared norms ``(B,)`` of whole gradients."""
    return gradients.flatten(1).square().sum(1)


def by_gradient(gradients: Tensor, centre_inputs: Tensor, centre_outputs: Tensor) -> Tensor:
    """Return ``(B, K)`` products from whole gradients (equation 8)."""
    halves = torch.einsum("bgoi,kgri->bkgro", gradients, centre_inputs)
    return torch.einsum("bkgro,kgro->bk", halves, centre_outputs)


def by_position(
    inputs: Tensor, outputs: Tensor, centre_inputs: Tensor, centre_outputs: Tensor
) -> Tensor:
    """Return ``(B, K)`` products by position (equation 9; equation 5 for one position)."""
    left = torch.einsum("bgti,kgri->bgtkr", inputs, centre_inputs)
    right = torch.einsum("bgto,kgro->bgtkr", outputs, centre_outputs)
    return left.mul_(right).sum((1, 2, 4))


def squares_by_position(inputs: Tensor, outputs: Tensor) -> Tensor:
    """Return the squared norms ``(B,)`` of gradients by pairs of positions (equation 9)."""
    left, right = inputs @ inputs.mT, outputs @ outputs.mT  # (B, G, T, T)
    return left.mul_(right).sum((1, 2, 3))
