"""What the sums by cluster of a layer's shift and scale are formed from.

Shape legend: B = samples, K = clusters, T or S = positions, N = columns, G = groups.
"""

from typing import NamedTuple

from torch import Tensor

__all__ = ["LayerSums"]


class LayerSums(NamedTuple):
    """What the operation ``sums_all`` adds up for one layer, and where the sums go.

    The shapes need not be those of ``position_sums`` and ``channel_sums``, because a view costs the
    host more than the sums of a small layer cost the device.

    Attributes:
        dy: gradients, contiguous, ``(B, T, N)``, or ``(B, N, *)`` for images.
        x: the layer's inputs, contiguous, in the same shape, or None.
        mean: B T elements, or None; for images ``(B, G)``, ``(1, G)`` or ``(G,)``.
        rstd: likewise; None without x.
        shifts: the sums of dy, ``(K, N)`` or flat, float32 at least.
        scales: the sums of dy times the normalised input, likewise; None without x.
        images: whether ``channel_sums`` says what the tensors are, or ``position_sums``.
    """

    dy: Tensor
    x: Tensor | None
    mean: Tensor | None
    rstd: Tensor | None
    shifts: Tensor
    scales: Tensor | None
    images: bool

    def as_declared(self, clusters: int) -> "LayerSums":
        """Return the layer in the shapes of ``position_sums`` or ``channel_sums``; K clusters."""
        dy, x, mean, rstd, shifts, scales, images = self
        if images and dy.dim() != 3:
            dy = dy.flatten(2) if dy.dim() > 3 else dy[..., None]
            x = None if x is None else x.reshape(dy.shape)
        columns = dy.shape[1 if images else 2]

        def statistic(given: Tensor | None) -> Tensor | None:
            if given is None or (images and given.dim() != 1):
                return given
            fits = images or given.numel() == dy.shape[0] * dy.shape[1]
            return given.view((1, -1) if images else dy.shape[:2]) if fits else given

        def sums(given: Tensor) -> Tensor:
            return given.view(clusters, columns) if given.dim() == 1 else given

        return LayerSums(
            dy, x, statistic(mean), statistic(rstd), sums(shifts),
            None if scales is None else sums(scales), images,
        )  # fmt: skip
