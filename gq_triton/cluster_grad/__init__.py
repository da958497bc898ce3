"""The gradients of K clusters from one backward pass, without K gradients of the whole model.

A family of layers (``layers/``) sums the gradients of each cluster's samples, for one parameter at
a time, and hands the sums to a ``Sink``. ``Weigh``, the sink of the law, weights the cluster means
and adds them up before the next parameter's turn.
"""

from gq_triton.cluster_grad.check import Check, Checked, check_batch
from gq_triton.cluster_grad.clusters import Clusters
from gq_triton.cluster_grad.declared import DeclaredPasses
from gq_triton.cluster_grad.layers.registry import register_layer
from gq_triton.cluster_grad.sink import Sink, Taken
from gq_triton.cluster_grad.step import Step
from gq_triton.cluster_grad.weigh import Weigh

__all__ = [
    "Check",
    "Checked",
    "Clusters",
    "DeclaredPasses",
    "Sink",
    "Step",
    "Taken",
    "Weigh",
    "check_batch",
    "register_layer",
]
