"""The centres of clusters in gradient space, one layer at a time, as products of vectors.

Faghri et al., "A Study of Gradient Variance in Deep Learning" (2020), section 3.1 and appendix. A
centre is ``sum_r d_r c_r^T`` with few terms, so that its distance from a sample's gradient needs no
gradient. Shapes: as in ``factors``; K clusters, R terms.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gq_triton.engines import engine
from gq_triton.sampling.factors import Factors

__all__ = ["Centre", "Sums", "of_samples", "products", "truncated"]


class Centre(NamedTuple):
    """The centres of one layer: ``inputs`` c ``(K, G, R, I)``, ``outputs`` d ``(K, G, R, O)``."""

    inputs: Tensor
    outputs: Tensor

    @property
    def squares(self) -> Tensor:
        """The squared norms of the centres, ``(K,)``."""
        left = torch.einsum("kgri,kgsi->kgrs", self.inputs, self.inputs)
        right = torch.einsum("kgro,kgso->kgrs", self.outputs, self.outputs)
        return (left * right).sum((1, 2, 3))


def products(found: Factors, centre: Centre, dots: Tensor, norms: Tensor) -> None:
    """Write the products of gradients and centres ``(B, K)``, and the gradients' squares ``(B,)``.

    Each is computed in the cheaper of two ways: by position (equation 9), or from the samples'
    whole gradients (equation 8). A GPU does all in one or two launches, and nothing waits for it.

    Args:
        found: the factors of the gradients.
        centre: the centres.
        dots: ``(B, K)`` float64; written to.
        norms: ``(B,)`` float64; written to.
    """
    positions, inputs = found.inputs.shape[2:]
    outputs, (clusters, _, terms, _) = found.outputs.shape[3], centre.inputs.shape
    whole_dots, whole_norms = cheapest(positions, inputs, outputs, clusters * terms)
    kernels_fit = found.wide != torch.float64
    engine(found.inputs.device, "auto" if kernels_fit else "torch").gradient_products(
        *found, *centre, dots, norms, whole_dots=whole_dots, whole_norms=whole_norms
    )


def cheapest(positions: int, inputs: int, outputs: int, centres: int) -> tuple[bool, bool]:
    """Return whether products with centres, and squares, come from whole gradients.

    The cost is that of a sample, in multiplications; whole gradients are formed once for both.
    """
    forming, size = positions * inputs * outputs, inputs * outputs
    sides = inputs + outputs + 1
    by_positions = centres * positions * sides, positions**2 * sides
    by_gradients = centres * size, size

    def cost(choice: tuple[bool, bool]) -> int:
        both = zip(choice, by_gradients, by_positions, strict=True)
        return forming * any(choice) + sum(one if taken else other for taken, one, other in both)

    return min([(False, False), (False, True), (True, False), (True, True)], key=cost)


class Sums:
    """The sums of a pass over the samples from which new centres of one layer follow.

    Args:
        rank: R. 1 takes the means of both factors over a cluster (equation 6), which need no
            gradient. More are the largest singular triples of the cluster's mean gradient, for
            which K gradients of the layer are kept.
        clusters: K.
        mean: whether the mean gradient of all samples is summed too.
    """

    def __init__(self, rank: int, clusters: int, mean: bool = False) -> None:
        self._rank, self._clusters, self._mean = rank, clusters, mean
        self.counts: Tensor | None = None
        self._parts: list[Tensor] = []
        self.total: Tensor | None = None

    def add(self, found: Factors, labels: Tensor) -> None:
        """Add samples ``(B,)`` with their labels."""
        clusters = torch.arange(self._clusters, device=labels.device)
        members = (labels == clusters[:, None]).to(found.wide)  # (K, B)
        if self._rank == 1:
            # The number of positions divides one factor only: the gradient is a sum over them.
            parts = [found.inputs.mean(2, dtype=found.wide), found.outputs.sum(2, dtype=found.wide)]
            parts = [torch.einsum("kb,bgn->kgn", members, part) for part in parts]
        else:
            picked = [labels == k for k in range(self._clusters)]
            parts = [torch.stack([_summed(Factors(*(f[own] for f in found))) for own in picked])]
        if self._mean:
            total = _summed(found).double()
            self.total = total if self.total is None else self.total + total
        if self.counts is None:
            self.counts, self._parts = members.sum(1), parts
            return
        self.counts = self.counts + members.sum(1)
        self._parts = [old + new for old, new in zip(self._parts, parts, strict=True)]

    def share(self, total: Callable[[Tensor], Tensor]) -> None:
        """Put the sums over all ranks in the place of this rank's."""
        assert self.counts is not None
        self.counts = total(self.counts)
        self._parts = [total(part) for part in self._parts]
        self.total = None if self.total is None else total(self.total)

    def means(self) -> list[Tensor]:
        """Return the means over clusters; zeros for an empty one."""
        assert self.counts is not None
        least = self.counts.clamp(min=1)
        return [part / least.view(-1, *[1] * (part.dim() - 1)) for part in self._parts]

    def centre(self) -> Centre:
        """Return the centres; an empty cluster has zeros."""
        means = self.means()
        if self._rank == 1:
            return Centre(means[0].unsqueeze(2), means[1].unsqueeze(2))
        return truncated(means[0], self._rank)


def _summed(found: Factors) -> Tensor:
    """Return the sum of the samples' gradients, ``(G, O, I)``."""
    inputs, outputs = (factor.to(found.wide) for factor in found)
    return torch.einsum("bgto,bgti->goi", outputs, inputs)


def truncated(gradients: Tensor, rank: int) -> Centre:
    """Return the nearest centres of a rank to gradients ``(K, G, O, I)``."""
    left, values, right = torch.linalg.svd(gradients, full_matrices=False)
    half = values[..., :rank].sqrt()[..., None]
    return Centre(right[..., :rank, :] * half, left.mT[..., :rank, :] * half)


def of_samples(found: Factors, rank: int) -> Centre:
    """Return samples as centres, ``(B, G, R, ...)``: exact for one position."""
    one = (
        found.inputs.mean(2, keepdim=True, dtype=found.wide),
        found.outputs.sum(2, keepdim=True, dtype=found.wide),
    )
    blank = [torch.zeros_like(factor).expand(-1, -1, rank - 1, -1) for factor in one]
    return Centre(*(torch.cat(pair, dim=2) for pair in zip(one, blank, strict=True)))
