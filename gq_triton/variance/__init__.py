"""How noisy a gradient is: the noise meter, and the variance of estimators of a gradient."""

from gq_triton.variance.anchored import SCSG, SVRG, AnchoredBatches
from gq_triton.variance.estimators import ImportanceBatches, StratifiedBatches, UniformBatches
from gq_triton.variance.katyusha import Katyusha
from gq_triton.variance.measure import measure_variance
from gq_triton.variance.noise import NoiseReport, NoiseScale, steps_ratio
from gq_triton.variance.statistics import GradientVariance

__all__ = [
    "SCSG",
    "SVRG",
    "AnchoredBatches",
    "GradientVariance",
    "ImportanceBatches",
    "Katyusha",
    "NoiseReport",
    "NoiseScale",
    "StratifiedBatches",
    "UniformBatches",
    "measure_variance",
    "steps_ratio",
]
