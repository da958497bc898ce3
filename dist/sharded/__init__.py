"""Models that ``fully_shard`` (FSDP2, HSDP) has divided: their queues, and clusters of every rank.

A layer's backward pass needs the statistics of the whole parameter, of which each rank holds a
part. Mean and 1 / sigma of one FSDP module are gathered shortly before its layers need them, beside
the gathering of its parameters. The raw gradient is reduce-scattered when the module's weighted one
has been. The model gets no parameter, buffer or key in addition.
"""

from gq_triton.dist.sharded.clusters import ShardedClusters
from gq_triton.dist.sharded.layout import sharded_parameters
from gq_triton.dist.sharded.queues import ShardedQueues

__all__ = ["ShardedClusters", "ShardedQueues", "sharded_parameters"]
