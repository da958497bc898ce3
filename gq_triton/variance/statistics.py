"""The variance of a gradient estimate: exact moments, moments of draws, and the figures of both.

Faghri et al., "A Study of Gradient Variance in Deep Learning" (2020), section 4. Shapes: P trained
parameters, in one row.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["GradientVariance", "Moments", "Running", "exact_figures", "sampled_figures"]

# What the authors' code adds to the sum of squares of a coordinate's draws.
PAPER_EPSILON = 1e-7


@dataclass(frozen=True)
class GradientVariance:
    r"""The figures of one estimator of a gradient.

    Attributes:
        average: ``tr Cov / P``, the mean over parameters of the variance; unbiased.
        normalised: the mean over parameters of ``V / E[g^2]``, both from the same draws: at most 1
            by definition. A parameter whose gradient is always 0 counts as 0.
        noise_to_signal: ``tr Cov / ||E g||^2``, with an unbiased square of the mean; infinite where
            no signal is seen.
        paper_average: as the paper's protocol has it, whose mean is of other draws than its
            deviations: ``1 + 1/n`` times too large on average.
        paper_normalised: likewise: noise without any signal reads ``1 + 1/(n-2)``, not 1, and small
            gradients read too little.
        paper_noise_to_signal: likewise.
        draws: n, the draws of the mean and those of the deviations; None if exact, where the
            paper's forms are the same as the others.
    """

    average: float
    normalised: float
    noise_to_signal: float
    paper_average: float
    paper_normalised: float
    paper_noise_to_signal: float
    draws: int | None


class Moments(NamedTuple):
    """The variance and the mean of every coordinate of an estimate, ``(P,)`` in float64."""

    variance: Tensor
    mean: Tensor


class Running:
    """Mean and squared deviations of rows that come in parts, without cancellation."""

    def __init__(self) -> None:
        self.count = 0
        self._mean, self._squares = torch.zeros(()), torch.zeros(())

    def add(self, rows: Tensor) -> None:
        """Add rows ``(n, P)`` in float64."""
        count, mean = len(rows), rows.mean(0)
        squares = (rows - mean).square().sum(0)
        if self.count:
            total = self.count + count
            step = mean - self._mean
            squares = self._squares + squares + step.square() * (self.count * count / total)
            mean = self._mean + step * (count / total)
        self._mean, self._squares = mean, squares
        self.count += count

    @property
    def moments(self) -> Moments:
        """Mean and population variance."""
        return Moments(self._squares / self.count, self._mean)


def exact_figures(found: Moments) -> GradientVariance:
    """Return the figures of known moments."""
    figures = (
        float(found.variance.mean()),
        _normalised(found),
        _ratio(float(found.variance.sum()), float(found.mean.square().sum())),
    )
    return GradientVariance(*figures, *figures, draws=None)


def sampled_figures(estimates: Iterable[Tensor], draws: int) -> GradientVariance:
    """Return the figures of ``2 draws`` independent estimates ``(P,)``.

    The paper's forms take the mean from the first half and the deviations from the second; the
    others take all of both.
    """
    every = Running()
    centre = torch.zeros(())
    deviations, squares = torch.zeros(()), torch.zeros(())
    for number, estimate in enumerate(estimates):
        one = estimate.double()
        every.add(one[None])
        if number == draws - 1:
            centre = every.moments.mean
        elif number >= draws:
            deviations = deviations + (one - centre).square()
            squares = squares + one.square()
    found, count = every.moments, every.count
    trace = float(found.variance.sum()) * count / (count - 1)
    signal = float(found.mean.square().sum()) - trace / count
    return GradientVariance(
        average=trace / len(found.mean),
        normalised=_normalised(found),
        noise_to_signal=_ratio(trace, signal),
        paper_average=float((deviations / draws).mean()),
        paper_normalised=float((deviations / (squares + PAPER_EPSILON)).mean()),
        paper_noise_to_signal=_ratio(float(deviations.sum()) / draws, float(centre.square().sum())),
        draws=draws,
    )


def _normalised(found: Moments) -> float:
    second = found.variance + found.mean.square()
    return float((found.variance / second.where(second > 0, 1.0)).mean())


def _ratio(noise: float, signal: float) -> float:
    if noise == 0:
        return 0.0
    return noise / signal if signal > 0 else math.inf
