"""What biases, and the scales and shifts of normalisation layers, get from each cluster.

Shape legend: B = samples, K = clusters, T or S = positions, N or C = columns, G = groups.
"""

import torch
from torch import Tensor

__all__ = ["by_cluster", "channel_sums", "per_channel", "position_sums", "sample_sums"]


def by_cluster(per_sample: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """Sum ``(B, N)`` rows by cluster, ``(K, N)``, by a product: in a fixed order."""
    place = torch.arange(len(order), device=order.device)
    sorted_ = (place >= offsets[:-1, None]) & (place < offsets[1:, None])
    members = torch.empty(sorted_.shape, dtype=per_sample.dtype, device=order.device)
    return members.index_copy_(1, order, sorted_.to(members)) @ per_sample


def position_sums(
    dy: Tensor,
    order: Tensor,
    offsets: Tensor,
    *,
    x: Tensor | None = None,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Sum ``dy`` and ``dy * (x - mean) * rstd`` by cluster and column, over all positions.

    Args:
        dy: ``(B, T, N)`` gradients at the output.
        order: ``(B,)`` int64, the samples sorted by cluster.
        offsets: ``(K + 1,)`` int64: cluster k has the samples ``order[offsets[k]]`` to
            ``order[offsets[k + 1] - 1]``.
        x: ``(B, T, N)`` the layer's inputs, or None.
        mean: ``(B, T)`` of each row of x, or None for 0.
        rstd: ``(B, T)`` reciprocal standard deviations; with x only.

    Returns:
        The sums of dy ``(K, N)``, and those of the product or None without x, in float32 at least.
    """
    dtype = torch.promote_types(dy.dtype, torch.float32)
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
    """Sum ``dy`` and ``dy * (x - mean) * rstd`` by cluster and channel, over all positions.

    Args:
        dy: ``(B, C, S)`` gradients at the output.
        order: as in ``position_sums``.
        offsets: as in ``position_sums``.
        x: ``(B, C, S)`` the layer's inputs, or None.
        mean: ``(B, G)`` of each sample's G groups of C / G channels, or ``(1, G)`` for all samples.
        rstd: reciprocal standard deviations, of the shape of ``mean``.

    Returns:
        The sums of dy ``(K, C)``, and those of the product or None without x, in float32 at least.
    """
    if x is None:
        dtype = torch.promote_types(dy.dtype, torch.float32)
        return by_cluster(dy.sum(dim=2, dtype=dtype), order, offsets), None
    assert mean is not None
    assert rstd is not None
    channels = dy.shape[1]
    scale, shift = sample_sums(dy, x, per_channel(mean, channels), per_channel(rstd, channels))
    return by_cluster(shift, order, offsets), by_cluster(scale, order, offsets)


def per_channel(statistic: Tensor, channels: int) -> Tensor:
    """Return ``(B or 1, C)`` from ``(B or 1, G)``."""
    width = channels // max(1, statistic.shape[1])
    return statistic if width == 1 else statistic.repeat_interleave(width, dim=1)


def sample_sums(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over positions what a normalisation layer's scale and shift get from each sample.

    Args:
        grad: gradient at the layer's output, ``(B, C, S)``.
        x: the layer's input, in the same shape.
        mean: what the layer subtracted, ``(B or 1, C)``.
        rstd: what it then multiplied by, ``(B or 1, C)``.

    Returns:
        ``(B, C)`` for the scale and for the shift, in float32 at least.
    """
    dtype = torch.promote_types(grad.dtype, torch.float32)
    wide = grad.to(dtype)
    centered = x.to(dtype) - mean[..., None]
    scale = centered.mul_(wide).sum(dim=2) * rstd
    return scale.to(dtype), wide.sum(dim=2)
