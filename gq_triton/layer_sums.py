"""What the sums by cluster of a layer's shift and scale are formed from.

Shape legend: B = samples, K = clusters, T or S = positions, N = columns, G = groups.
"""

from typing import NamedTuple

from torch import Tensor

__all__ = ["LayerSums"]


class LayerSums(NamedTuple):
    """What the operation ``sums_all`` adds up for one layer, and where the sums go.

    Attributes:
        dy: gradients, contiguous, as in ``position_sums``, or in ``channel_sums`` for images.
        x: the layer's inputs, contiguous, or None.
        mean: as in either, or None.
        rstd: as in either; None without x.
        shifts: the sums of dy, ``(K, N)``, float32 at least.
        scales: the sums of dy times the normalised input, likewise; None without x.
        images: whether ``channel_sums`` says what the tensors are.
    """

    dy: Tensor
    x: Tensor | None
    mean: Tensor | None
    rstd: Tensor | None
    shifts: Tensor
    scales: Tensor | None
    images: bool
