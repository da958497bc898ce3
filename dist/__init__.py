"""Grad Queue under DistributedDataParallel, installed as `gq_triton.dist`."""

from gq_triton.dist.comm_hook import GradQueueState, grad_queue_hook, register

__all__ = ["GradQueueState", "grad_queue_hook", "register"]
