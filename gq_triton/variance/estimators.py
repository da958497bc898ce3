"""The estimators of a gradient whose variance can be measured, each with its exact moments.

Shapes: N samples, B of them in a batch, P trained parameters; g_i is the gradient of sample i.
"""

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from gq_triton.sampling.checks import count, number, one_of, raise_all
from gq_triton.sampling.importance_options import SCORES
from gq_triton.sampling.presample import draw, plan, weights_of
from gq_triton.sampling.stratified import checked_labels
from gq_triton.variance.frozen import Frozen
from gq_triton.variance.statistics import Moments, Running

__all__ = ["Estimator", "ImportanceBatches", "StratifiedBatches", "UniformBatches"]


@runtime_checkable
class Estimator(Protocol):
    """What ``measure_variance`` asks of an estimator."""

    def check(self, frozen: Frozen) -> None:
        """Raise a ValueError if the estimator does not fit the model or the dataset."""

    def estimate(self, frozen: Frozen, generator: torch.Generator) -> Tensor:
        """Return one estimate ``(P,)`` of the gradient."""
        ...

    def moments(self, frozen: Frozen) -> Moments:
        """Return the exact moments, from the gradients of all samples."""
        ...


@dataclass(frozen=True)
class UniformBatches:
    """The mean of B samples that are drawn uniformly, with replacement: SG-B.

    Its exact variance is ``V / B``, with V that of one sample. A batch of an epoch, drawn without
    replacement, has ``(N - B) / (N - 1)`` times as much.

    Args:
        batch_size: B; SG-2B is this estimator with twice the batch.

    Raises:
        ValueError: ``batch_size`` is not an integer of at least 1.
    """

    batch_size: int

    def __post_init__(self) -> None:
        raise_all(count("batch_size", self.batch_size))

    def check(self, frozen: Frozen) -> None:
        """Accept every model and dataset."""

    def estimate(self, frozen: Frozen, generator: torch.Generator) -> Tensor:
        """Return one estimate ``(P,)`` of the gradient."""
        return frozen.gradient(uniform(frozen.samples, self.batch_size, generator))

    def moments(self, frozen: Frozen) -> Moments:
        """Return the exact moments, from the gradients of all samples."""
        every = Running()
        for _, rows in frozen.rows(torch.arange(frozen.samples)):
            every.add(rows)
        return Moments(every.moments.variance / self.batch_size, every.moments.mean)


@dataclass(frozen=True)
class StratifiedBatches:
    """One sample of each cluster, times the cluster's share of all samples: the paper's GC.

    Its exact variance is ``sum_k N_k^2 V_k / N^2`` (proposition 3.1), with V_k the variance of the
    true gradients within cluster k; the centres with which the clusters were found play no part.

    Args:
        labels: the cluster of every sample, ``(N,)``, such as ``GradientClustering.labels_``.

    Raises:
        ValueError: the labels are not ``(N,)`` integers of at least 0.
    """

    labels: Tensor
    _order: Tensor = field(init=False, repr=False)
    _sizes: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _, own, sizes = checked_labels(self.labels).unique(return_inverse=True, return_counts=True)
        object.__setattr__(self, "_order", own.argsort(stable=True))
        object.__setattr__(self, "_sizes", sizes)

    def check(self, frozen: Frozen) -> None:
        """Raise a ValueError if the labels are of another number of samples."""
        if len(self._order) != frozen.samples:
            raise ValueError(
                f"labels must be those of the dataset's {frozen.samples} samples, got "
                f"{len(self._order)}"
            )

    def estimate(self, frozen: Frozen, generator: torch.Generator) -> Tensor:
        """Return one estimate ``(P,)`` of the gradient."""
        points = torch.rand(len(self._sizes), dtype=torch.float64, generator=generator)
        within = (points * self._sizes).long().minimum(self._sizes - 1)
        first = self._sizes.cumsum(0) - self._sizes
        return frozen.gradient(self._order[first + within], self._sizes.double() / frozen.samples)

    def moments(self, frozen: Frozen) -> Moments:
        """Return the exact moments, from the gradients of all samples."""
        variance = mean = torch.zeros(frozen.size, dtype=torch.float64, device=frozen.device)
        for members in self._order.split(self._sizes.tolist()):
            own, share = Running(), len(members) / frozen.samples
            for _, rows in frozen.rows(members):
                own.add(rows)
            variance = variance + share**2 * own.moments.variance
            mean = mean + share * own.moments.mean
        return Moments(variance, mean)


@dataclass(frozen=True)
class ImportanceBatches:
    r"""B samples drawn by score from S that are drawn uniformly: what ``ImportanceLoader`` yields.

    With the scores s the exact variance is
    ``V / S + (1 - 1/S) (mean(||g_i||^2 / s_i) mean(s) - ||mean(g)||^2) / B``: that of the
    uniform S, and that of the draw from them. A sample whose score is 0 is never drawn; its
    gradient is 0, as the score bounds it.

    Args:
        batch_size: B.
        presample: S / B, above 1.
        score: ``"gradient"``, ``"loss"`` or ``"norm"``, as in ``ImportanceLoader``.

    Raises:
        ValueError: an argument is out of its range.
    """

    batch_size: int
    presample: float = 3.0
    score: str = "gradient"

    def __post_init__(self) -> None:
        raise_all(
            count("batch_size", self.batch_size),
            number("presample", self.presample, 1, 1e6),
            one_of("score", self.score, SCORES),
        )

    def check(self, frozen: Frozen) -> None:
        """Accept every model and dataset."""

    @property
    def _scored(self) -> int:
        return plan("constant_batch", self.batch_size, self.presample, 0).scored

    def estimate(self, frozen: Frozen, generator: torch.Generator) -> Tensor:
        """Return one estimate ``(P,)`` of the gradient."""
        read = uniform(frozen.samples, self._scored, generator)
        scores = frozen.scores(read, self.score).cpu()
        drawn = draw(scores, self.batch_size, generator)
        return frozen.gradient(read[drawn], weights_of(scores, drawn) / self.batch_size)

    def moments(self, frozen: Frozen) -> Moments:
        """Return the exact moments, from the gradients and the scores of all samples."""
        indices = torch.arange(frozen.samples)
        scores = frozen.scores(indices, self.score)
        inverse = torch.where(scores > 0, 1 / scores, 0.0)
        every, by_score = Running(), torch.zeros((), dtype=torch.float64, device=frozen.device)
        for places, rows in frozen.rows(indices):
            every.add(rows)
            by_score = by_score + inverse[places.to(inverse.device)] @ rows.square()
        second = by_score / frozen.samples * scores.mean()
        one = (second - every.moments.mean.square()).clamp(min=0)  # rounding must not lead below 0
        scored = self._scored
        variance = every.moments.variance / scored + (1 - 1 / scored) * one / self.batch_size
        return Moments(variance, every.moments.mean)


def uniform(samples: int, size: int, generator: torch.Generator) -> Tensor:
    """Return the indices ``(size,)`` of samples drawn uniformly with replacement."""
    return torch.randint(samples, (size,), generator=generator)
