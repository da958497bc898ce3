"""Grad Queue: weight every gradient element by how unusual it is against its own recent past."""

from gq_triton.optim import GQSGD, GQAdamW
from gq_triton.ring import scarcity_weight

__all__ = ["GQSGD", "GQAdamW", "scarcity_weight"]
