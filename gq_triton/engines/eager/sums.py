"""Sums by cluster for biases, and for the scales and shifts of normalisation layers.

Shape legend: B = samples, K = clusters, T or S = positions, N or C = columns, G = groups.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gq_triton.layer_sums import LayerSums

__all__ = [
    "by_cluster",
    "channel_sums",
    "per_channel",
    "position_sums",
    "sample_sums",
    "sums_all",
]


def by_cluster(per_sample: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """Return ``(B, N)`` rows summed by cluster, ``(K, N)``: a matrix product, in a fixed order."""
    place = torch.arange(len(order), device=order.device)
    sorted_ = (place >= offsets[:-1, None]) & (place < offsets[1:, None])
    members = torch.empty(sorted_.shape, dtype=per_sample.dtype, device=order.device)
    return members.index_copy_(1, order, sorted_.to(members)) @ per_sample


def _sum_type(dy: Tensor, x: Tensor | None) -> torch.dtype:
    """Return the type of a layer's sums: the wider one of its tensors, float32 at least."""
    dtype = torch.promote_types(dy.dtype, torch.float32)
    return dtype if x is None else torch.promote_types(dtype, x.dtype)


def position_sums(
    dy: Tensor,
    order: Tensor,
    offsets: Tensor,
    *,
    x: Tensor | None = None,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Sum by cluster and column, over all positions; see ``protocol``."""
    dtype = _sum_type(dy, x)
    shifts = by_cluster(dy.sum(dim=1, dtype=dtype), order, offsets)
    if x is None:
        return shifts, None
    assert rstd is not None
    normalised = (x if mean is None else x - mean[..., None]) * rstd[..., None]
    products = dy.to(dtype) * normalised.to(dtype)
    return shifts, by_cluster(products.sum(dim=1), order, offsets)


def channel_sums(
    dy: Tensor,
    order: Tensor,
    offsets: Tensor,
    *,
    x: Tensor | None = None,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Sum by cluster and channel, over all positions; see ``protocol``."""
    if x is None:
        dtype = torch.promote_types(dy.dtype, torch.float32)
        return by_cluster(dy.sum(dim=2, dtype=dtype), order, offsets), None
    assert mean is not None
    assert rstd is not None
    channels = dy.shape[1]
    scale, shift = sample_sums(dy, x, per_channel(mean, channels), per_channel(rstd, channels))
    return by_cluster(shift, order, offsets), by_cluster(scale, order, offsets)


def sums_all(layers: Sequence[LayerSums], order: Tensor, offsets: Tensor) -> None:
    """Write the sums by cluster of many layers; see ``protocol``."""
    for layer in layers:
        dy, x, mean, rstd, shifts, scales, images = layer.as_declared(len(offsets) - 1)
        sums_of = channel_sums if images else position_sums
        shift, scale = sums_of(dy, order, offsets, x=x, mean=mean, rstd=rstd)
        shifts.copy_(shift)
        if scales is not None:
            assert scale is not None
            scales.copy_(scale)


def per_channel(statistic: Tensor, channels: int) -> Tensor:
    """Return the statistics ``(B or 1, G)`` of groups for each channel, ``(B or 1, C)``."""
    width = channels // max(1, statistic.shape[1])
    return statistic if width == 1 else statistic.repeat_interleave(width, dim=1)


def sample_sums(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of a normalisation layer's scale and shift, sample by sample.

    Args:
        grad: gradient at the layer's output, ``(B, C, S)``.
        x: the layer's input, in the same shape.
        mean: the means that the layer subtracted, ``(B or 1, C)``.
        rstd: the factors that the layer then multiplied by, ``(B or 1, C)``.

    Returns:
        ``(B, C)`` for the scale and for the shift, in float32 at least.
    """
    dtype = _sum_type(grad, x)
    wide = grad.to(dtype)
    centered = x.to(dtype) - mean[..., None]
    scale = centered.mul_(wide).sum(dim=2) * rstd
    return scale.to(dtype), wide.sum(dim=2)
