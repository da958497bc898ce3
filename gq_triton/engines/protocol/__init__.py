"""The operations that every engine offers, documented once.

All tensors of a call share a device. Operations whose name ends in an underscore change tensors in
place and take lists with one entry per parameter; the tensors of a list share a type.
"""

from typing import Protocol

from gq_triton.engines.protocol.clusters import ClusterOperations
from gq_triton.engines.protocol.law import LawOperations

__all__ = ["Engine"]


class Engine(LawOperations, ClusterOperations, Protocol):
    """A module that computes the law: ``kernels`` (Triton), ``compiled`` (Numba) or ``eager``."""
