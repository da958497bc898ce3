"""Paired comparisons: bootstrap intervals of the mean difference, medians, wins."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Comparison", "compare", "interval", "median_interval"]

_RESAMPLES = 10_000


@dataclass(frozen=True)
class Comparison:
    """The paired differences between two groups over the same seeds; positive is better.

    Args:
        n: number of seeds.
        mean: mean of the differences.
        low: lower end of the 95 % interval of the mean.
        high: upper end of the 95 % interval of the mean.
        sure_low: lower end of the interval at the level of the verdict.
        sure_high: upper end of the interval at the level of the verdict.
        median: median of the differences.
        wins: number of seeds with a positive difference.
        losses: number of seeds with a negative difference; the rest are ties.
    """

    n: int
    mean: float
    low: float
    high: float
    sure_low: float
    sure_high: float
    median: float
    wins: int
    losses: int

    @property
    def sign(self) -> int:
        """1 for better, -1 for worse, 0 for no difference that these seeds can tell."""
        return (self.sure_low > 0) - (self.sure_high < 0)


def compare(differences: Sequence[float], comparisons: int = 1) -> Comparison:
    """Return the summary of paired differences.

    The interval of the verdict is the wider of the bootstrap's and Student's, since resampling
    never leaves the range of the values.

    Args:
        differences: one per seed, positive where the first group is better.
        comparisons: number of verdicts that are read together. Each has the level
            ``0.05 / comparisons`` (Bonferroni), so that any false verdict among all of them has a
            probability of at most 5 %.
    """
    values = np.asarray(differences, dtype=np.float64)
    low, high = interval(values)
    sure_low, sure_high = _wider(values, 1 - 0.05 / max(1, comparisons))
    return Comparison(
        n=len(values),
        mean=float(values.mean()),
        low=low,
        high=high,
        sure_low=sure_low,
        sure_high=sure_high,
        median=float(np.median(values)),
        wins=int((values > 0).sum()),
        losses=int((values < 0).sum()),
    )


def interval(values: Sequence[float] | np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Return the ends of a bootstrap interval of the mean.

    Percentiles of resampled means are too narrow for few values. Hesterberg's expansion (2015,
    "What Teachers Should Know About the Bootstrap") widens them as Student's t does. With 10 values
    the interval covers the mean of normal ones in 95 % and of exponential ones in 90 % of the
    cases. The resampling has a fixed seed: the same values give the same interval.

    Args:
        values: at least 2 finite numbers.
        level: nominal coverage.

    Raises:
        ValueError: there are fewer values, or one is not finite.
    """
    from scipy.stats import norm, t

    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    if n < 2 or not np.isfinite(values).all():
        raise ValueError(f"an interval needs at least 2 finite values, got {values.tolist()}")
    outside = norm.cdf(math.sqrt(n / (n - 1)) * t.ppf((1 - level) / 2, n - 1))
    draws = np.random.default_rng(0).integers(0, n, (_RESAMPLES, n))
    low, high = np.quantile(values[draws].mean(axis=1), [outside, 1 - outside])
    return float(low), float(high)


def _wider(values: np.ndarray, level: float) -> tuple[float, float]:
    """Return the ends of the union of the bootstrap's and Student's interval of the mean."""
    from scipy.stats import t

    low, high = interval(values, level)
    half = t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return min(low, float(values.mean() - half)), max(high, float(values.mean() + half))


def median_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Return the median of values that may be infinite, and the ends of its interval.

    The interval is from order statistics (binomial) and assumes no distribution. Its ends are
    values that occurred, or infinity.
    """
    from scipy.stats import binom

    ordered = sorted(values)
    n = len(ordered)
    middle = (ordered[(n - 1) // 2], ordered[n // 2])
    median = middle[0] if middle[0] == middle[1] else sum(middle) / 2
    below = int(binom.ppf((1 - level) / 2, n, 0.5))
    first = max(0, below - 1)
    return median, ordered[first], ordered[n - 1 - first]
