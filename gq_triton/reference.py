"""The law of every operation in plain torch and float64: the oracle of the tests.

Nothing here is optimised, nothing here is ever changed to agree with a kernel, and nothing here is
imported by the code it judges. Equation numbers are those of Grad Queue (arXiv 2404.16917).

Shape legend: L = queue slots, P = elements of one parameter, K = clusters.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

__all__ = [
    "Ring",
    "adamw_update",
    "cluster_gradient",
    "effective_length",
    "scarcity_weight",
    "sgd_update",
    "stored",
    "weighted_gradient",
]


def scarcity_weight(
    grad: Tensor, queue: Tensor, *, rho: float = 3.0, sigma_scale: float = 1.0
) -> Tensor:
    r"""Return ``clip(|g - mu| / sigma, 1/rho, rho)``, equations 1 and 2, in float64.

    ``mu`` and ``sigma`` are the mean and the population standard deviation of the queue, which does
    not hold ``grad``. A constant queue has ``z = 0`` where ``grad`` equals it and ``z = inf``
    where it does not, as Lemma 3.3 requires.

    Args:
        grad: the new gradient, shape ``(*)``; rounded to the queue's type before the comparison.
        queue: the last L gradients, shape ``(L, *)``, in any order.
        rho: bound of the weight, at least 1.
        sigma_scale: multiplies sigma; ``sqrt(B / n_k)`` for a centroid's standard error.

    Returns:
        Weights of shape ``(*)`` in float64; all 1 where ``grad`` holds a NaN or an infinity.
    """
    if not bool(torch.isfinite(grad).all()):
        return torch.ones(grad.shape, dtype=torch.float64, device=grad.device)
    g = stored(grad, queue.dtype).double()
    q = queue.double()
    mu = q.mean(dim=0)
    sigma = (q - mu).square().mean(dim=0).sqrt() * sigma_scale
    constant = q.amax(dim=0) == q.amin(dim=0)
    z = torch.where(
        constant,
        torch.where(g == q[0], 0.0, math.inf),
        (g - mu).abs() / sigma,
    )
    return z.clamp(1.0 / rho, rho)


def stored(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what a queue of ``dtype`` keeps of a finite gradient: rounded, and still finite."""
    largest = torch.finfo(dtype).max
    return grad.double().clamp(-largest, largest).to(dtype)


def weighted_gradient(
    grad: Tensor, queue: Tensor | None, *, rho: float = 3.0, match_norm: bool = False
) -> Tensor:
    """Return ``w * g`` in float64; ``queue=None`` stands for the warm-up, when every weight is 1.

    ``match_norm`` rescales the result to the norm of ``grad``.
    """
    g = grad.double()
    if queue is None or not bool(torch.isfinite(g).all()):
        return g
    boosted = scarcity_weight(grad, queue, rho=rho) * g
    if match_norm and float(boosted.norm()) > 0:
        boosted = boosted * (g.norm() / boosted.norm())
    return boosted


def cluster_gradient(
    centroids: Tensor,
    sizes: Sequence[int],
    queue: Tensor | None,
    *,
    rho: float = 3.0,
    population_power: float = 1.0,
    centroid_scale: str = "paper",
) -> Tensor:
    r"""Return ``sum_k p_k w(c_k) c_k`` (Algorithm 1), ``p_k = n_k**a / sum_j n_j**a``, in float64.

    Args:
        centroids: mean gradient of each cluster, shape ``(K, *)``; those of empty clusters are
            ignored.
        sizes: samples in each cluster, K integers.
        queue: the last L mean gradients, shape ``(L, *)``, or None during the warm-up.
        rho: bound of the weights.
        population_power: the exponent ``a``; 1 is the paper's, 0 weights clusters equally.
        centroid_scale: ``"paper"`` compares with sigma, ``"standard_error"`` with
            ``sigma * sqrt(B / n_k)``.
    """
    batch = sum(sizes)
    mass = sum(n**population_power for n in sizes if n > 0)
    total = torch.zeros(centroids.shape[1:], dtype=torch.float64, device=centroids.device)
    for centroid, n in zip(centroids, sizes, strict=True):
        if n == 0:
            continue
        weight = torch.ones_like(total)
        if queue is not None:
            scale = math.sqrt(batch / n) if centroid_scale == "standard_error" else 1.0
            weight = scarcity_weight(centroid, queue, rho=rho, sigma_scale=scale)
        total += n**population_power / mass * weight * centroid.double()
    return total


def effective_length(losses: Sequence[float], window: int, shortest: int, longest: int) -> int:
    """Return how many of the newest gradients the statistics use (section 3.1, "variable queue").

    ``S_j`` is the sum of ``window`` losses that ends ``j`` steps ago. ``J`` is the largest ``j``
    for which ``S_0 < S_1 < ... < S_j``: the loss has been falling for ``J`` steps. The length is
    ``J + 1`` within ``[shortest, longest]``. A loss that is not finite ends the scan.

    Args:
        losses: newest first.
        window: losses in one sum.
        shortest: lower bound of the length.
        longest: upper bound of the length.
    """
    steps = 0
    sums = [sum(losses[j : j + window]) for j in range(len(losses) - window + 1)]
    for previous, following in pairwise(sums):
        if not (math.isfinite(previous) and math.isfinite(following) and previous < following):
            break
        steps += 1
    return min(max(steps + 1, shortest), longest)


class Ring:
    """The queue of one parameter as a Python list: newest last, raw gradients only."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.gradients: list[Tensor] = []

    def newest(self, count: int | None = None) -> Tensor | None:
        """Return the newest ``count`` gradients ``(count, *)``, or None until L are queued."""
        if len(self.gradients) < self.length:
            return None
        return torch.stack(self.gradients[-(count or self.length) :])

    def push(self, grad: Tensor, dtype: torch.dtype | None = None) -> None:
        """Append ``grad`` and forget the oldest, unless it holds a NaN or an infinity."""
        if bool(torch.isfinite(grad).all()):
            self.gradients.append(stored(grad.detach().clone(), dtype or grad.dtype))
            self.gradients = self.gradients[-self.length :]


def sgd_update(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return the parameter and the momentum after one step of SGD, out of place, in float64."""
    p, g = param.double(), grad.double()
    g = -g if maximize else g
    g = g + weight_decay * p
    if momentum != 0:
        old = momentum_buffer
        buffer = g if old is None else momentum * old.double() + (1 - dampening) * g
        g = g + momentum * buffer if nesterov else buffer
        return p - lr * g, buffer
    return p - lr * g, None


def adamw_update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return parameter, first and second moment after step number ``step`` (from 1) of AdamW."""
    beta1, beta2 = betas
    p, g = param.double() * (1 - lr * weight_decay), grad.double()
    g = -g if maximize else g
    m = beta1 * exp_avg.double() + (1 - beta1) * g
    v = beta2 * exp_avg_sq.double() + (1 - beta2) * g * g
    denominator = (v / (1 - beta2**step)).sqrt() + eps
    return p - lr * (m / (1 - beta1**step)) / denominator, m, v
