"""How many samples a step scores and trains on, when that pays, and what a drawn sample weighs.

Shapes: S scored samples, b drawn samples.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["SCHEDULES", "Plan", "Smoothing", "draw", "plan", "threshold", "weights_of"]

# What stays constant while samples are drawn by score, against a uniform step of batch_size.
SCHEDULES = ("constant_batch", "constant_time", "constant_variance")
# Seconds of a backward pass in those of a forward pass, as the papers' cost model has it.
BACKWARD = 2.0
# The authors' settings: scored samples lie this part of the way from b to what the time allows, ...
TIME_RATIO = 0.5
# ... at least this part of a batch is trained on, ...
LEAST = 0.2
# ... and a batch of constant variance is larger by this part than tau says.
EXTRA = 0.2


class Plan(NamedTuple):
    """What a step reads: ``scored`` samples of which ``trained`` are drawn, or 0 and a batch."""

    scored: int
    trained: int

    @property
    def read(self) -> int:
        """How many samples are taken from the dataset."""
        return self.scored or self.trained


def threshold(schedule: str, batch_size: int, presample: float, price: float = 1.0) -> float:
    """Return the value of tau above which drawing by score pays, by the cost model.

    With b = ``batch_size`` and B = ``int(presample * b)`` a step by score costs B times ``price``
    forward passes and b steps, each of 3; a batch as good as it would cost ``3 tau b``.
    """
    if schedule == "constant_time":
        return 2.0
    if schedule == "constant_variance":
        return 1 / (BACKWARD / (1 + BACKWARD) - EXTRA)
    one = 1 + BACKWARD
    return (price * int(presample * batch_size) + one * batch_size) / (one * batch_size)


def plan(schedule: str, batch_size: int, presample: float, tau: float) -> Plan:
    """Return how many samples are scored and drawn in a step that draws by score."""
    b = batch_size
    if schedule == "constant_batch":
        return Plan(int(presample * b), b)
    if schedule == "constant_variance":
        return Plan(b, min(b, max(1, int((1 / tau + EXTRA) * b))))
    time = (1 + BACKWARD) * b  # of a uniform step
    least = max(LEAST * b, b / tau)
    most = time - (1 + BACKWARD) * least
    scored = max(1, int(b + (most - b) * TIME_RATIO))
    return Plan(scored, max(1, int((time - scored) / (1 + BACKWARD))))


class Smoothing(NamedTuple):
    """The change of scores before they are drawn by: ``score**power + constant + part * mean``.

    Attributes:
        power: from 0, all scores alike, to 1, as they are.
        constant: what is added to every score.
        part: how much of the mean score of past steps is added to every score.
    """

    power: float = 1.0
    constant: float = 0.0
    part: float = 0.0

    def __call__(self, scores: Tensor, mean: float) -> Tensor:
        """Return scores ``(S,)`` smoothed; all zeros stay zeros."""
        if not bool(scores.any()):
            return scores
        return scores**self.power + (self.constant + self.part * mean)


def draw(scores: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return the places ``(count,)`` of samples drawn with replacement, by score ``(S,)``."""
    if not bool(scores.any()):
        return torch.randint(len(scores), (count,), generator=generator)
    # Where cumulated scores pass uniform numbers. torch.multinomial would round them to float32.
    ends = (scores / scores.max()).cumsum(0)
    points = torch.rand(count, dtype=ends.dtype, generator=generator) * ends[-1]
    return torch.searchsorted(ends, points, right=True).clamp_(max=_last(scores))


def _last(scores: Tensor) -> int:
    """Return the last place that may be drawn: rounding must not lead to a score of zero."""
    return int(scores.nonzero()[-1])


def weights_of(scores: Tensor, drawn: Tensor, power: float = 1.0) -> Tensor:
    r"""Return the weights ``(b,)`` with which the mean loss of drawn samples is unbiased.

    The weight is ``1 / (S g_i)`` with the probability ``g_i``. With ``power`` k below 1 it is
    ``w^k``, times ``(w . s) / (w^k . s)`` over the drawn samples: the batch then looks more to hard
    samples, and is biased.

    Args:
        scores: ``(S,)`` float64.
        drawn: places of the drawn samples ``(b,)``.
        power: k, at most 1.
    """
    if not bool(scores.any()):
        return torch.ones(len(drawn), dtype=scores.dtype)
    own = scores[drawn]
    weights = scores.mean() / own
    if power == 1:
        return weights
    biased = weights**power
    return biased * ((weights @ own) / (biased @ own))
