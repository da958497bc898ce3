"""The law of Grad Queue in plain torch, and the two decisions that every door shares.

A door is an entry for users: an optimizer, the plug-in or the DDP state. The module holds the
weight of an element (`scarcity_weight`), the arguments of one step (`Law`), the choice of the
gradients that are weighted and queued (`accepted`) and the rescaling of ``match_norm``
(`match_norm_`). Engines compute the law; doors call these functions before and after the engines.

Shape legend: L = queue slots, E = effective length, P = elements of one parameter, N = tensors.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gq_triton.float8 import BYTE, narrowed, significant
from gq_triton.options import check_rho

__all__ = [
    "VARIANCE_FLOOR", "Law", "Spread", "accepted", "all_zero", "compute_type", "match_norm_",
    "scarcity_weight", "square_norm", "to_queue",
]  # fmt: skip

# Deviations are scaled by the largest of them, so the variance of a queue that is not constant lies
# above this floor. The variance of a constant queue, 0, is raised to the floor: z is then 0 where
# the gradient equals the queue and above rho where it does not, without a branch.
VARIANCE_FLOOR = 1e-36


class Law(NamedTuple):
    """The arguments of an engine's operation that belong to the law and not to a tensor.

    Attributes:
        rho: bound of the weight, at least 1; 1 switches the law off.
        length: effective length E, 0-d int64 on the device; None stands for L.
        grad_scale: the loss scale that the gradients carry, 0-d float32; None where there is none.
        found_inf: non-zero where a loss scaler skips the step: nothing is written or counted. 0-d
            float32, or None. Only the updates (``gqsgd_``, ``gqadamw_``) read it; ``weigh_`` and
            ``push_`` get the answer of `accepted`, which has read it.
    """

    rho: float
    length: Tensor | None = None
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    @property
    def unscale(self) -> float:
        """The factor that removes the loss scale, 1 without one; the host waits for the scale."""
        return 1.0 if self.grad_scale is None else 1.0 / float(self.grad_scale)

    @property
    def skips(self) -> bool:
        """True where a loss scaler skips this step; the host waits for the answer."""
        return self.found_inf is not None and bool(self.found_inf)


def scarcity_weight(grad: Tensor, queue: Tensor, *, rho: float = 3.0) -> Tensor:
    r"""Return how unusual each gradient element is: ``clip(|g - mu| / sigma, 1/rho, rho)``.

    Equations 1 and 2 of Grad Queue (arXiv 2404.16917). ``mu`` and ``sigma`` are
    the mean and the population standard deviation of the queue, which must not hold ``grad``
    itself. Where the queue is constant the weight is ``1/rho`` if ``grad`` equals it, else ``rho``.

    Args:
        grad: the new gradient, shape ``(*)``, any floating type. It is rounded to the queue's type
            before the comparison.
        queue: the last L gradients, shape ``(L, *)``; their order does not matter.
        rho: bound of the weight, at least 1; with 1 every weight is exactly 1.

    Returns:
        Weights of the shape of ``grad``, float32; float64 where ``grad`` or ``queue`` is float64.
        All 1 where ``grad`` holds a NaN or an infinity, and 1 where the queue does.

    Raises:
        ValueError: ``rho < 1``, ``L < 1``, or shapes, types or devices that do not fit.

    Examples:
        >>> queue = torch.tensor([[1.0], [2.0], [3.0]])
        >>> scarcity_weight(torch.tensor([3.0]), queue)
        tensor([1.2247])
    """
    check_rho(rho)
    for name, tensor in (("grad", grad), ("queue", queue)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must have a real floating type, got {tensor.dtype}")
    if queue.dim() == 0 or queue.shape[0] < 1 or queue.shape[1:] != grad.shape:
        raise ValueError(
            "queue must have shape (L, *grad.shape) with L >= 1, got queue "
            f"{tuple(queue.shape)} for grad {tuple(grad.shape)}"
        )
    if queue.device != grad.device:
        raise ValueError(f"grad is on {grad.device}, queue on {queue.device}: move one of them")
    dtype = compute_type(grad, queue)
    with torch.no_grad():
        x = to_queue(grad, queue.dtype).to(dtype)
        weights = Spread.of(queue.to(dtype).unbind(0)).weight(x, rho)
        known = torch.isfinite(queue).all(dim=0) & torch.isfinite(grad).all() & ~weights.isnan()
        return torch.where(known, weights, torch.ones_like(weights))


class Spread(NamedTuple):
    """Statistics of a queue, element by element, from the deviations from its newest row.

    The deviations of a constant queue are exactly 0. All deviations are divided by the largest of
    them before they are squared, so that no square underflows or overflows. The variance is the
    two-pass one (never ``E[g^2] - E[g]^2``).

    Attributes:
        base: the newest row.
        mean: mean of the deviations from ``base``.
        inverse: reciprocal of the largest deviation's size.
        sigma: standard deviation of the scaled deviations.
    """

    base: Tensor
    mean: Tensor
    inverse: Tensor
    sigma: Tensor

    @staticmethod
    def of(rows: Sequence[Tensor]) -> "Spread":
        """Return the statistics of E rows of one shape and type, newest first."""
        base, count = rows[0], len(rows)
        tiny = torch.finfo(base.dtype).tiny
        if count == 1:
            zeros = torch.zeros_like(base)
            return Spread(base, zeros, torch.full_like(base, 1 / tiny), zeros + VARIANCE_FLOOR**0.5)
        deviations = torch.stack(list(rows[1:])).sub_(base)
        inverse = deviations.abs().amax(dim=0).clamp_(min=tiny).reciprocal_()
        mean = deviations.sum(dim=0).div_(count)
        squares = (mean * inverse).square_()
        squares.add_(deviations.sub_(mean).mul_(inverse).square_().sum(dim=0))
        return Spread(base, mean, inverse, squares.div_(count).clamp_(min=VARIANCE_FLOOR).sqrt_())

    @staticmethod
    def known(center: Tensor, rate: Tensor) -> "Spread":
        """Return the statistics from the mean and 1 / sigma."""
        return Spread(center, torch.zeros_like(center), rate, torch.ones_like(rate))

    def weight(self, x: Tensor, rho: float, sigma_scale: float = 1.0) -> Tensor:
        """Return ``clip(|x - mu| / (sigma * sigma_scale), 1/rho, rho)``."""
        z = (x - self.base).sub_(self.mean).mul_(self.inverse).abs_().div_(self.sigma)
        return z.div_(sigma_scale).clamp_(1.0 / rho, rho)


def compute_type(grad: Tensor, queue: Tensor) -> torch.dtype:
    """Return the type of the arithmetic: float64 where either tensor has it, else float32."""
    return torch.promote_types(torch.promote_types(grad.dtype, queue.dtype), torch.float32)


def to_queue(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a gradient rounded to the queue's type, clamped to that type's finite range.

    For a ring in bytes the result is float32.
    """
    return significant(grad) if dtype == BYTE else narrowed(grad, dtype)


def accepted(
    finite: Tensor,
    *,
    absent: Tensor | None = None,
    found_inf: Tensor | None = None,
    least: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return which gradients are weighted and queued; all others pass through untouched.

    A gradient is accepted if all of it is finite, if it stands for a parameter that was used, and
    if no loss scaler skips the step. All ranks that hold parts of one parameter get the same
    answer. Each votes on its part: 0 where the part is not finite, 1 where it is a gradient, 2
    where it is zeros that stand for an unused parameter. The least vote decides; 1 accepts.

    Args:
        finite: ``(N,)`` bool, whether all elements held here are finite (``all_finite``).
        absent: ``(N,)`` bool, whether zeros stand for a parameter that no rank used; or None.
        found_inf: non-zero where a loss scaler skips the step, one number; or None.
        least: takes this rank's votes, ``(N,)`` uint8, and returns for each the least vote of all
            ranks that hold a part of the same parameter; None where each parameter is whole here.

    Returns:
        ``(N,)`` bool on the device of ``finite``.
    """
    answers = finite
    if absent is not None or least is not None:
        votes = finite.to(torch.uint8)
        votes = votes if absent is None else votes + absent.to(votes)
        answers = (votes if least is None else least(votes)) == 1
    if found_inf is not None:
        answers = answers & (found_inf == 0).to(answers.device)
    return answers


def all_zero(grads: Sequence[Tensor]) -> Tensor:
    """Return for each of N gradients, N at least 1, whether every element is 0: ``(N,)`` bool.

    The sum of magnitudes is 0 only where every element is 0; a sum of squares can underflow.
    """
    return torch.stack(torch._foreach_norm(list(grads), 1)) == 0  # pyright: ignore[reportPrivateImportUsage]


def square_norm(values: Tensor, grad_scale: Tensor | None = None) -> Tensor:
    """Return the squared norm of a tensor without the loss scale that it carries, 0-d float64."""
    wide = torch.promote_types(values.dtype, torch.float32)
    norm = torch.linalg.vector_norm(values, dtype=wide).double()
    return (norm if grad_scale is None else norm * (1.0 / grad_scale.double())).square()


def match_norm_(grads: Sequence[Tensor], statistics: Tensor, squares: Tensor | None = None) -> None:
    """Give weighted gradients the norm of the raw ones, parameter by parameter (``match_norm``).

    Every door calls this function wherever ``match_norm`` is set, also with ``rho=1``: clusters
    mixed with a ``population_power`` other than 1 differ from the raw mean even where every weight
    is 1. Where weighted and raw gradient are the same (warm-up, or rho = 1, without clusters) the
    factor is exactly 1. A gradient whose norm is not finite, or 0, stays as it is.

    Args:
        grads: N weighted gradients, or the parts of them that this rank holds; changed in place.
        statistics: ``(N, 5)``, the statistics of an engine. Column 0 holds the squared norm
            of each raw gradient; it is copied over column 1, that of the weighted gradient.
        squares: ``(N, 2)`` or more, squared norms of the whole raw and of the whole weighted
            gradient where ``grads`` are parts; None takes them from ``statistics``.
    """
    raw, weighted = (statistics if squares is None else squares)[:, :2].unbind(dim=1)
    known = (weighted > 0) & torch.isfinite(weighted) & torch.isfinite(raw)
    factors = torch.where(known, (raw / weighted).sqrt(), torch.ones_like(raw))
    for grad, factor in zip(grads, factors.unbind(0), strict=True):
        grad.mul_(factor.to(grad.dtype))
    statistics[:, 1] = statistics[:, 0]
