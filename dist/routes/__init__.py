"""The ways a bucket can take from this rank's gradients to the weighted mean over all ranks."""

from collections.abc import Mapping

from torch import Tensor, nn

from gq_triton.dist.routes.base import Context, Route
from gq_triton.dist.routes.clustered import Clustered
from gq_triton.dist.routes.clustered_sliced import ClusteredSliced
from gq_triton.dist.routes.sliced import Sliced
from gq_triton.dist.routes.whole import Whole
from gq_triton.options import ClusterOptions, LawOptions

__all__ = ["Context", "Route", "match"]


def match(
    context: Context,
    model: nn.Module,
    params: Mapping[str, Tensor],
    law: LawOptions,
    clusters: ClusterOptions,
    *,
    shard_queue: bool,
) -> Route:
    """Return the route that all buckets of a state take.

    Args:
        context: what the route needs to know of the state.
        model: the bare model; with clusters its backward passes leave weighted gradients from now
            on.
        params: the model's parameters by name.
        law: how gradients are queued and weighted.
        clusters: how each rank clusters its own samples; without ``n_clusters`` there is one
            cluster over the global batch.
        shard_queue: divide the queue among the ranks.
    """
    if clusters.n_clusters is None:
        return (Sliced if shard_queue else Whole)(context, params, law)
    return (ClusteredSliced if shard_queue else Clustered)(context, model, params, law, clusters)
