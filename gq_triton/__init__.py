"""Grad Queue: weight every gradient element by how unusual it is against its own recent past."""

from importlib.metadata import version

from gq_triton.captured import cuda_graph
from gq_triton.cluster_grad import register_layer
from gq_triton.grad_queue import GradQueue
from gq_triton.law import scarcity_weight
from gq_triton.optim import GQSGD, GQAdamW

__all__ = ["GQSGD", "GQAdamW", "GradQueue", "cuda_graph", "register_layer", "scarcity_weight"]
__version__ = version("gq_triton")
