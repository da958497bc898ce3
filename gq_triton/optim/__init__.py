"""Optimizers that weight gradients by their scarcity."""

from gq_triton.optim.adamw import GQAdamW
from gq_triton.optim.sgd import GQSGD

__all__ = ["GQSGD", "GQAdamW"]
