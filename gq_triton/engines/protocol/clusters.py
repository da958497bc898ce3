"""The operations of clusters: samples are grouped, and their gradients summed by group.

Shape legend: B = samples, K = clusters, T and S = positions.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from gq_triton.layer_sums import LayerSums

__all__ = ["ClusterOperations"]


class ClusterOperations(Protocol):
    """What an engine does with samples: their groups, and sums of gradients by group."""

    def lloyd_(
        self,
        features: Tensor,
        centers: Tensor,
        flag: Tensor,
        *,
        max_iter: int,
        tol: float,
        zero: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run k-means on a batch from given centres, and replace them by those that it found.

        On a GPU nothing waits for the device. Here F is the number of features.

        Args:
            features: ``(B, F)``, of any floating type; read only.
            centers: ``(K, F)`` finite, contiguous, float64 for float64 features, else float32.
            flag: 0-d bool, set to True where a feature on a GPU is not finite. All samples then get
                label 0, and the centres stay.
            max_iter: iterations, at least 1.
            tol: iterations end once the squared shift of all centres is at most tol times the mean
                variance of a feature, or no label changes.
            zero: whether features that are not finite count as 0.

        Returns:
            By the centres that were found: labels ``(B,)`` int64, sizes ``(K,)`` int64, and the sum
            of the squared distances, 0-d in the centres' type; and the iterations, 0-d int64.

        Raises:
            ValueError: a feature on the CPU is not finite; nothing is changed.
        """
        ...

    def group(
        self,
        labels: Tensor,
        clusters: int,
        *,
        sample_weights: Tensor | None,
        whole_batch: int | Tensor,
        steps: int,
        power: float,
        unit: float,
        standard_error: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Order the samples of a batch by cluster, and compute the numbers of the clusters.

        On a GPU nothing waits for the device. n_k is the number of samples of cluster k, or the sum
        of their weights, and n the sum of all n_k.

        Args:
            labels: ``(B,)`` int64 in ``[0, clusters)``.
            clusters: K.
            sample_weights: how much each sample counts, ``(B,)`` of any type, or None.
            whole_batch: the number of samples of the whole batch, at least B; a tensor is 0-d.
            steps: backward passes of one step.
            power: the exponent ``a`` of n_k.
            unit: a gradient of the loss divided by this number is a mean over samples.
            standard_error: whether sigma is scaled by the square root of ``whole / size``.

        Returns:
            The samples sorted by cluster ``(B,)`` int64, a cluster's in their own order; where each
            cluster begins and the last one ends in it, ``(K + 1,)`` int64; and a table ``(8, W)``
            float64, ``W >= K``. Its rows 0 to 2 have ``n * steps / (n_k * unit)``, which is 0 for
            an empty cluster, ``n_k**a * unit / (sum_j n_j**a * steps)`` and the scale of sigma, for
            each cluster. Row 3 begins with ``sum_j n_j**a`` and n. Rows 4 to 7 begin with the same
            three numbers for all samples as one cluster, and ``n**a``.
        """
        ...

    def position_sums(
        self,
        dy: Tensor,
        order: Tensor,
        offsets: Tensor,
        *,
        x: Tensor | None = None,
        mean: Tensor | None = None,
        rstd: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Sum ``dy`` and ``dy * (x - mean) * rstd`` by cluster and column, over all positions.

        For the biases of linear layers, LayerNorm and RMSNorm. Here N is the number of columns.

        Args:
            dy: ``(B, T, N)`` gradients at the output, of any floating type.
            order: ``(B,)`` int64, the samples sorted by cluster.
            offsets: ``(K + 1,)`` int64: cluster k has the samples ``order[offsets[k]]`` to
                ``order[offsets[k + 1] - 1]``; begins with 0 and ends with B.
            x: ``(B, T, N)`` the layer's inputs, of any floating type, or None.
            mean: ``(B, T)`` of each row of x in float32 or float64, or None for 0 (RMSNorm).
            rstd: ``(B, T)`` reciprocal standard deviations; with x only.

        Returns:
            The sums of dy ``(K, N)``, and those of the product or None without x, in float32 at
            least; 0 for an empty cluster.
        """
        ...

    def channel_sums(
        self,
        dy: Tensor,
        order: Tensor,
        offsets: Tensor,
        *,
        x: Tensor | None = None,
        mean: Tensor | None = None,
        rstd: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Sum ``dy`` and ``dy * (x - mean) * rstd`` by cluster and channel, over all positions.

        For the biases of convolutions, GroupNorm and BatchNorm. Here N is the number of channels.

        Args:
            dy: ``(B, N, S)`` gradients at the output, of any floating type.
            order: ``(B,)`` int64, the samples sorted by cluster.
            offsets: ``(K + 1,)`` int64, as in ``position_sums``.
            x: ``(B, N, S)`` the layer's inputs, of any floating type, or None.
            mean: ``(B, G)`` of each sample's G groups of N / G channels in float32 or float64, or
                ``(1, G)`` for all samples: ``(1, N)`` for BatchNorm.
            rstd: reciprocal standard deviations, of the shape of ``mean``; with x only.

        Returns:
            The sums of dy ``(K, N)``, and those of the product or None without x, in float32 at
            least; 0 for an empty cluster.
        """
        ...

    def sums_all(self, layers: Sequence[LayerSums], order: Tensor, offsets: Tensor) -> None:
        """Write what ``position_sums`` and ``channel_sums`` return, for many layers at once.

        Args:
            layers: the layers, all with B samples; written to.
            order: ``(B,)`` int64, as in ``position_sums``.
            offsets: ``(K + 1,)`` int64, likewise.
        """
        ...

    def product_sums(
        self,
        left: Tensor,
        right: Tensor,
        order: Tensor,
        offsets: Tensor,
        out: Tensor,
        *,
        tf32: bool = False,
    ) -> None:
        """Write the sums of ``left.T @ right`` by cluster: the gradient of a linear layer's weight.

        Args:
            left: ``(B, T, M)``, of any floating type.
            right: ``(B, T, N)``, of the same type.
            order: ``(B,)`` int32 or int64, the samples sorted by cluster.
            offsets: ``(K + 1,)`` int32 or int64, as in ``position_sums``.
            out: ``(K, M, N)`` at any strides, in the type of the sums: float32, or float64 for
                float64. The sums of an empty cluster are 0.
            tf32: whether a GPU may round float32 factors to tf32, which plain torch leaves to
                torch's own setting.
        """
        ...

    def convolution_sums(
        self,
        dy: Tensor,
        x: Tensor,
        order: Tensor,
        offsets: Tensor,
        out: Tensor,
        *,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int = 1,
        tf32: bool = False,
    ) -> None:
        """Write the gradients of a convolution's kernel by cluster.

        The kernel of a transposed convolution is that of the convolution which leads back: its
        gradient has input and ``dy`` exchanged.

        Args:
            dy: ``(B, O, *)`` gradients at the output in one to three dimensions, of any floating
                type.
            x: ``(B, I, *)`` the layer's input, of the same type. It may be larger than the windows
                reach.
            order: ``(B,)`` int32 or int64, the samples sorted by cluster.
            offsets: ``(K + 1,)`` int32 or int64, as in ``position_sums``.
            out: ``(K, O, I / groups, *taps)`` at any strides, in the type of the sums, as in
                ``product_sums``.
            stride: distance of the window's places, by dimension.
            padding: zeros that were added on both sides.
            dilation: distance of the window's taps.
            groups: groups of channels.
            tf32: as in ``product_sums``.
        """
        ...

    def gradient_products(
        self,
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
        """Write the products of samples' gradients with centres, and the gradients' squared norms.

        The distances of gradient clustering follow from both. A sample's gradient of a weight is
        the sum over T positions of outer products, and a centre one of R. Here G is the number of
        groups of channels, I of inputs, and O of outputs.

        Args:
            inputs: ``(B, G, T, I)`` at any strides, of any floating type.
            outputs: ``(B, G, T, O)``, likewise.
            centre_inputs: ``(K, G, R, I)``, float64 where a factor is, else float32.
            centre_outputs: ``(K, G, R, O)``, likewise.
            dots: ``(B, K)`` of any type wide enough; written to.
            norms: ``(B,)``, likewise.
            whole_dots: whether products come from the whole gradients (equation 8), else by
                position (equation 9).
            whole_norms: the same of the squared norms.
        """
        ...
