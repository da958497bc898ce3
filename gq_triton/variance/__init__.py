"""How noisy a gradient is: the noise meter."""

from gq_triton.variance.noise import NoiseReport, NoiseScale, steps_ratio

__all__ = ["NoiseReport", "NoiseScale", "steps_ratio"]
