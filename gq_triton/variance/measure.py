"""The variance of gradient estimators at one point of a training, which does not notice."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from gq_triton.options import shown
from gq_triton.sampling.checks import count, raise_all
from gq_triton.sampling.ranks import stream
from gq_triton.sampling.scores import Loss
from gq_triton.variance.estimators import Estimator
from gq_triton.variance.frozen import Frozen, undisturbed
from gq_triton.variance.statistics import GradientVariance, exact_figures, sampled_figures

__all__ = ["measure_variance"]


def measure_variance(
    model: nn.Module,
    loss: Loss,
    dataset: Any,
    estimators: Mapping[str, Estimator],
    exact: bool = False,
    *,
    draws: int = 50,
    seed: int = 0,
) -> dict[str, GradientVariance]:
    r"""Measure how far estimates of the dataset's gradient scatter, for a model as it is now.

    The training that is watched goes on bit for bit as without the measuring: parameters, ``grad``,
    buffers, modes and the random numbers of torch, Python and NumPy stay as they were. Gradients
    are taken on a copy of the model in evaluation mode, where no sample depends on another.

    Args:
        model: the model.
        loss: as in ``importance_score``.
        dataset: a map-style dataset of ``(inputs, ..., targets)`` or dicts with ``"labels"``.
        estimators: ``UniformBatches``, ``StratifiedBatches``, ``ImportanceBatches`` and
            ``AnchoredBatches``, by names of your own.
        exact: whether the variances are computed from the gradients of all samples, one pass for
            each estimator, else estimated from draws.
        draws: n, the draws for the mean, after which as many fresh ones give the deviations, as in
            the paper; unbiased figures use all ``2 n``. At least 3.
        seed: of the draws.

    Returns:
        The figures by the estimators' names.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: the dataset is empty, an argument is out of its range, or an estimator does not
            fit the dataset.

    Examples:
        >>> import torch
        >>> from gq_triton.variance import UniformBatches, measure_variance
        >>> x = torch.randn(50, 4)
        >>> data = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())
        >>> model = torch.nn.Linear(4, 2)
        >>> estimators = {"SG-B": UniformBatches(10), "SG-2B": UniformBatches(20)}
        >>> found = measure_variance(model, "cross_entropy", data, estimators, exact=True)
        >>> round(found["SG-B"].average / found["SG-2B"].average, 6)
        2.0
    """
    raise_all(count("draws", draws, 3), count("seed", seed, 0))
    if not isinstance(estimators, Mapping) or not estimators:
        raise TypeError(
            f"estimators must be a dict of at least one estimator by name, got {shown(estimators)}"
        )
    for name, estimator in estimators.items():
        if not isinstance(estimator, Estimator) or isinstance(estimator, type):
            raise TypeError(
                f"estimators[{name!r}] must be an estimator such as UniformBatches(32), got "
                f"{shown(estimator)}"
            )
    with undisturbed():
        frozen = Frozen(model, loss, dataset)
        for estimator in estimators.values():
            estimator.check(frozen)
        found = {}
        for name, estimator in estimators.items():
            if exact:
                found[name] = exact_figures(estimator.moments(frozen))
            else:
                generator = stream(seed, name)
                estimates = (estimator.estimate(frozen, generator) for _ in range(2 * draws))
                found[name] = sampled_figures(estimates, draws)
        return found
