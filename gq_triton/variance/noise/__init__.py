"""The noise meter: how far a batch's gradient is noise, from one backward pass.

A backward pass that is measured sums its gradients by random groups of samples
(``cluster_grad/``). The sink of this package takes squared norms of the groups' gradients and hands
the sum on, so that training goes on as without it.
"""

from gq_triton.variance.noise.meter import NoiseScale
from gq_triton.variance.noise.predict import CONSTANT, WITHIN, steps_ratio
from gq_triton.variance.noise.report import LayerNoise, NoiseReport

__all__ = ["CONSTANT", "WITHIN", "LayerNoise", "NoiseReport", "NoiseScale", "steps_ratio"]
