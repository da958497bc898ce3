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
    "float8",
    "float8_rows",
    "scarcity_weight",
    "sgd_update",
    "stochastic_bfloat16",
    "stored",
    "weighted_gradient",
]


def scarcity_weight(
    grad: Tensor,
    queue: Tensor,
    *,
    rho: float = 3.0,
    sigma_scale: float = 1.0,
    queue_dtype: torch.dtype | str | None = None,
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
        queue_dtype: the queue's type where that of the tensor ``queue`` does not tell.

    Returns:
        Weights of shape ``(*)`` in float64; all 1 where ``grad`` holds a NaN or an infinity.
    """
    if not bool(torch.isfinite(grad).all()):
        return torch.ones(grad.shape, dtype=torch.float64, device=grad.device)
    g = stored(grad, queue_dtype or queue.dtype).double()
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


def stored(grad: Tensor, dtype: torch.dtype | str) -> Tensor:
    """Return what a queue of ``dtype`` keeps of a finite gradient: rounded, and still finite."""
    if isinstance(dtype, str):
        return float8(grad)
    largest = torch.finfo(dtype).max
    return grad.double().clamp(-largest, largest).to(dtype)


def float8(grad: Tensor) -> Tensor:
    """Return gradients rounded to 6 significant bits, within the range of ``float8_rows``."""
    largest = 63 / 32 * 2.0**126
    fraction, exponent = torch.frexp(grad.double().clamp(-largest, largest))
    return torch.ldexp((fraction * 64).round() / 64, exponent)


def float8_rows(rows: Tensor) -> Tensor:
    """Return what a queue in bytes holds of gradients of 6 significant bits, ``(L, *)``.

    With ``2**E`` at most an element's largest gradient, which is below ``2**(E + 1)``, a gradient
    from ``2**(E - 2)`` on keeps its 6 bits, and a smaller one is a multiple of ``2**(E - 7)``.
    """
    rows = rows.double()
    exponents = torch.frexp(rows)[1] - 1
    largest = (torch.frexp(rows.abs().amax(dim=0))[1] - 1).clamp(-119, 126)
    steps = torch.maximum(exponents, largest - 2) - 5
    return torch.ldexp(torch.ldexp(rows, -steps).round(), steps)


def stochastic_bfloat16(x: Tensor, bits: Tensor) -> Tensor:
    """Return numbers rounded to a neighbour in bfloat16, the one away from zero for high ``bits``.

    Args:
        x: finite numbers of bfloat16's normal range.
        bits: integers from 0 to 65535; with evenly distributed ones the mean of the result is x,
            if x has the 24 significant bits of float32.
    """
    size = x.double().abs()
    step = torch.ldexp(torch.ones_like(size), torch.frexp(size)[1] - 8)
    below = (size / step).floor() * step
    away = (size - below) / step + bits.double() / 65536 >= 1
    return (torch.where(away, below + step, below) * x.double().sign()).to(torch.bfloat16)


def weighted_gradient(
    grad: Tensor,
    queue: Tensor | None,
    *,
    rho: float = 3.0,
    match_norm: bool = False,
    queue_dtype: torch.dtype | str | None = None,
) -> Tensor:
    """Return ``w * g`` in float64; ``queue=None`` stands for the warm-up, when every weight is 1.

    ``match_norm`` rescales the result to the norm of ``grad``; ``queue_dtype`` as in
    ``scarcity_weight``.
    """
    g = grad.double()
    if queue is None or not bool(torch.isfinite(g).all()):
        return g
    boosted = scarcity_weight(grad, queue, rho=rho, queue_dtype=queue_dtype) * g
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
    queue_dtype: torch.dtype | str | None = None,
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
        queue_dtype: as in ``scarcity_weight``.
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
            weight = scarcity_weight(
                centroid, queue, rho=rho, sigma_scale=scale, queue_dtype=queue_dtype
            )
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

    def push(self, grad: Tensor, dtype: torch.dtype | str | None = None) -> None:
        """Append ``grad`` and forget the oldest, unless it holds a NaN or an infinity.

        In a queue in bytes (``"float8"``) the largest gradient decides what is kept of the others,
        for the last time when it is forgotten.
        """
        if bool(torch.isfinite(grad).all()):
            self.gradients.append(stored(grad.detach().clone(), dtype or grad.dtype))
            if dtype == "float8":
                self.gradients = list(float8_rows(torch.stack(self.gradients)).unbind(0))
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
