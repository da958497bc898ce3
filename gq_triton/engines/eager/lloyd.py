"""K-means of one batch in plain torch: Lloyd's iterations with relocation.

On a GPU nothing waits for the device, so all iterations run; those after convergence change
nothing. On the CPU the loop ends at convergence, with the same result.

Ties are broken by the lowest index. A sample equally near to several centres gets the lowest label.
Of centres that coincide (to rounding) the lowest gets all samples. Of samples equally far from
their centres the lowest is relocated first.

Shapes: B samples, F features, K clusters, M = min(B, K).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gq_triton.engines.eager.distances import nearest_centers, row_norms

__all__ = ["NOT_FINITE", "Frame", "assign", "iterate", "lloyd_", "standardise"]

NOT_FINITE = "features must be finite; KMeans(nonfinite='zero') counts NaN and infinity as 0"


class Frame(NamedTuple):
    """The coordinates of the arithmetic: scaled, so that squares are finite, then centred.

    The scale is a power of two, so scaling rounds nothing. Centring reduces the cancellation in
    squared distances.
    """

    unit: Tensor  # () a power of two, at most the largest |feature|
    mean: Tensor  # (F,) of the scaled features

    def enter(self, centers: Tensor) -> Tensor:
        """Return centres (K, F) in these coordinates, where samples are within 4 of the origin."""
        centers = centers.to(self.mean) / self.unit - self.mean
        return centers.clamp_(-(2.0**40), 2.0**40)  # a distant one stays distant, and finite

    def leave(self, centers: Tensor) -> Tensor:
        """Return centres (K, F) in the caller's coordinates."""
        return (centers + self.mean) * self.unit


def _host_may_read(tensor: Tensor) -> bool:
    """Return whether a value can be read without a wait: on the CPU, outside traced graphs."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def standardise(features: Tensor, zero: bool) -> tuple[Tensor, Frame, Tensor | None]:
    """Return features (B, F) in their frame, the frame, and whether all of them are finite.

    The frame is float64 for float64 features, else float32.

    Args:
        features: of any floating type.
        zero: whether features that are not finite count as 0, so that all are finite.

    Returns:
        Whether they are finite is () bool where the host may not read it, else None. Where they are
        not, all features count as 0.

    Raises:
        ValueError: a feature is not finite, and the host may read that.
    """
    x = features.to(torch.float64 if features.dtype == torch.float64 else torch.float32)
    if zero:
        x = torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)
    low, high = torch.aminmax(x)
    peak = torch.maximum(-low, high)  # NaN if any feature is
    finite = None
    if not _host_may_read(peak):
        finite = peak.isfinite()
        x, peak = torch.where(finite, x, 0.0), torch.where(finite, peak, 0.0)
    elif not bool(peak.isfinite()):
        raise ValueError(NOT_FINITE)
    mantissa, _ = torch.frexp(peak)  # in [1/2, 1): the quotient below is exact
    unit = torch.where(peak > 0, peak / (2 * mantissa), 1.0)
    x = x / unit
    mean = x.mean(0)
    return x.sub_(mean), Frame(unit, mean), finite


def assign(x: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Return the labels (B,) int64 of x's nearest centres, and the squared distances (B,)."""
    # Of centres that are equal up to the rounding of a mean only the first gets samples. So
    # rounding cannot spread equal samples over several labels.
    reach = 64 * torch.finfo(x.dtype).eps * centers.abs().amax(1, keepdim=True)
    same = torch.cdist(centers, centers, p=math.inf) <= reach
    distinct = same.int().argmax(1) == torch.arange(len(centers), device=x.device)
    return nearest_centers(x, centers, distinct)


def _relocate(
    x: Tensor, norms: Tensor, centers: Tensor, labels: Tensor, nearest: Tensor, members: Tensor
) -> Tensor:
    """Return memberships (K, B) after each empty cluster took a sample far from its centre.

    This is scikit-learn's rule: the samples farthest from their centres move. A sample whose
    squared distance is below the resolution ``eps * ||x||^2`` stays, so with fewer distinct samples
    than clusters some clusters remain empty.
    """
    empty = ~members.any(1)
    if _host_may_read(empty) and not bool(empty.any()):
        return members
    # M candidates by the distances of the product, then exact distances for these. The sorts are
    # stable, so the lowest index comes first.
    far = nearest.sort(descending=True, stable=True).indices[: len(empty)]
    gap = x.index_select(0, far) - centers.index_select(0, labels.index_select(0, far))
    gap, order = row_norms(gap).sort(descending=True, stable=True)
    far = far.index_select(0, order)
    far = torch.where(gap > torch.finfo(x.dtype).eps * norms.index_select(0, far), far, -1)
    # The e-th empty cluster takes the e-th farthest sample, if there is one.
    rank = empty.cumsum(0) - 1
    sample = far.index_select(0, rank.clamp(0, len(far) - 1))
    sample = torch.where(empty & (rank < len(far)), sample, -1)
    moved = torch.arange(len(x), device=x.device) == sample[:, None]
    return torch.where(moved.any(0), moved, members)


def _update(x: Tensor, norms: Tensor, centers: Tensor, labels: Tensor, nearest: Tensor) -> Tensor:
    """Return the means (K, F), without atomics; an empty cluster gets the largest one's mean."""
    members = labels == torch.arange(len(centers), device=x.device)[:, None]  # (K, B)
    members = _relocate(x, norms, centers, labels, nearest, members)
    sizes = members.sum(1)
    means = members.to(x.dtype) @ x / sizes.clamp(min=1)[:, None]
    largest = means.index_select(0, sizes.argmax().view(1))
    return torch.where((sizes > 0)[:, None], means, largest)


def iterate(x: Tensor, centers: Tensor, max_iter: int, tol: float) -> tuple[Tensor, Tensor]:
    """Return the final centres (K, F), and the iterations until convergence () int64."""
    norms = row_norms(x)
    limit = tol * norms.sum() / x.numel()
    done = torch.zeros((), dtype=torch.bool, device=x.device)
    n_iter = torch.zeros((), dtype=torch.int64, device=x.device)
    previous = torch.full_like(norms, -1, dtype=torch.int64)
    for _ in range(max_iter):
        labels, nearest = assign(x, centers)
        moved = _update(x, norms, centers, labels, nearest)
        n_iter = n_iter + ~done
        shift = (moved - centers).square().sum()
        centers = torch.where(done, centers, moved)
        done = done | (labels == previous).all() | (shift <= limit)
        previous = labels
        # Iterations after convergence do not change the centres.
        if _host_may_read(done) and bool(done):
            break
    return centers, n_iter


def lloyd_(
    features: Tensor, centers: Tensor, flag: Tensor, *, max_iter: int, tol: float, zero: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run k-means on one batch and replace the centres; see ``engines.protocol``."""
    x, frame, finite = standardise(features, zero)
    found, n_iter = iterate(x, frame.enter(centers), max_iter, tol)
    moved = frame.leave(found)
    centers.copy_(moved if finite is None else torch.where(finite, moved, centers))
    found = frame.enter(centers)  # as a later assignment does, for the same labels
    labels = assign(x, found)[0]
    if finite is not None:
        labels = torch.where(finite, labels, 0)
        flag.logical_or_(~finite)
    clusters = torch.arange(len(centers), device=x.device)
    sizes = (labels == clusters[:, None]).sum(1)
    gaps = x.sub_(found.index_select(0, labels))
    return labels, sizes, row_norms(gaps).sum() * frame.unit * frame.unit, n_iter
