"""Grad Queue under DistributedDataParallel, installed as `gq_triton.dist`."""

from gq_triton.dist.comm_hook import grad_queue_hook, register
from gq_triton.dist.state import GradQueueState

__all__ = ["GradQueueState", "grad_queue_hook", "register"]
