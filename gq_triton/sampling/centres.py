"""The centres of clusters in gradient space, one layer at a time, as products of vectors.

Faghri et al., "A Study of Gradient Variance in Deep Learning" (2020), section 3.1 and appendix. A
centre is ``sum_r d_r c_r^T`` with few terms, so that its distance from a sample's gradient needs no
gradient. Shapes: as in ``factors``; K clusters, R terms.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gq_triton.sampling.factors import Factors

__all__ = ["Centre", "Sums", "of_samples", "products", "truncated"]

# Elements of the samples' whole gradients that are formed at a time.
ROOM = 1 << 24


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


def products(found: Factors, centre: Centre) -> tuple[Tensor, Tensor]:
    """Return ``(B, K)`` products of gradients and centres, and the gradients' ``(B,)`` squares.

    Each is computed in the cheaper of two ways: by position (equation 9), or from the samples'
    whole gradients (equation 8), which are formed for few samples at a time.
    """
    batch, groups, positions, inputs = found.inputs.shape
    outputs, (clusters, _, terms, _) = found.outputs.shape[3], centre.inputs.shape
    whole_products, whole_squares = cheapest(positions, inputs, outputs, clusters * terms)
    if not (whole_products or whole_squares):
        return by_position(found, centre), squares_by_position(found)
    step = max(1, ROOM // (groups * inputs * outputs))
    dots, norms = [], []
    for begin in range(0, batch, step):
        part = Factors(*(factor[begin : begin + step] for factor in found))
        gradients = whole(part)
        dots.append(by_gradient(gradients, centre) if whole_products else by_position(part, centre))
        norms.append(squares(gradients) if whole_squares else squares_by_position(part))
    return torch.cat(dots), torch.cat(norms)


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


def whole(found: Factors) -> Tensor:
    """Return the samples' gradients ``(B, G, O, I)``."""
    return torch.einsum("bgto,bgti->bgoi", found.outputs, found.inputs)


def squares(gradients: Tensor) -> Tensor:
    """Return the squared norms ``(B,)`` of whole gradients."""
    return gradients.flatten(1).square().sum(1)


def by_gradient(gradients: Tensor, centre: Centre) -> Tensor:
    """Return ``(B, K)`` products from whole gradients (equation 8)."""
    halves = torch.einsum("bgoi,kgri->bkgro", gradients, centre.inputs)
    return torch.einsum("bkgro,kgro->bk", halves, centre.outputs)


def by_position(found: Factors, centre: Centre) -> Tensor:
    """Return ``(B, K)`` products by position (equation 9; equation 5 for one position)."""
    left = torch.einsum("bgti,kgri->bgtkr", found.inputs, centre.inputs)
    right = torch.einsum("bgto,kgro->bgtkr", found.outputs, centre.outputs)
    return left.mul_(right).sum((1, 2, 4))


def squares_by_position(found: Factors) -> Tensor:
    """Return the squared norms ``(B,)`` of gradients by pairs of positions (equation 9)."""
    left, right = (factor @ factor.mT for factor in found)  # (B, G, T, T)
    return left.mul_(right).sum((1, 2, 3))


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
        members = torch.nn.functional.one_hot(labels, self._clusters).T.to(found.inputs)  # (K, B)
        if self._rank == 1:
            # The number of positions divides one factor only: the gradient is a sum over them.
            parts = [found.inputs.mean(2), found.outputs.sum(2)]
            parts = [torch.einsum("kb,bgn->kgn", members, part) for part in parts]
        else:
            picked = [labels == k for k in range(self._clusters)]
            parts = [torch.stack([
                torch.einsum("bgto,bgti->goi", found.outputs[own], found.inputs[own])
                for own in picked
            ])]  # fmt: skip
        if self._mean:
            total = torch.einsum("bgto,bgti->goi", found.outputs, found.inputs).double()
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


def truncated(gradients: Tensor, rank: int) -> Centre:
    """Return the nearest centres of a rank to gradients ``(K, G, O, I)``."""
    left, values, right = torch.linalg.svd(gradients, full_matrices=False)
    half = values[..., :rank].sqrt()[..., None]
    return Centre(right[..., :rank, :] * half, left.mT[..., :rank, :] * half)


def of_samples(found: Factors, rank: int) -> Centre:
    """Return samples as centres, ``(B, G, R, ...)``: exact for one position."""
    one = found.inputs.mean(2, keepdim=True), found.outputs.sum(2, keepdim=True)
    blank = [torch.zeros_like(factor).expand(-1, -1, rank - 1, -1) for factor in one]
    return Centre(*(torch.cat(pair, dim=2) for pair in zip(one, blank, strict=True)))
