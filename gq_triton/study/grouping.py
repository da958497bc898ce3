"""How a law groups the samples of a batch."""

import torch
from torch import Tensor

from gq_triton.grouping import KMeans
from gq_triton.study.arms import Law

__all__ = ["Grouping"]


class Grouping:
    """Finds the clusters of a batch as the law says: a clusterer of ``GradQueue``.

    Args:
        law: with K.
        generator: of random clusters.
    """

    def __init__(self, law: Law, generator: torch.Generator) -> None:
        assert law.n_clusters is not None
        self.law, self.generator = law, generator
        self.kmeans = KMeans(law.n_clusters)
        self.batch_labels: Tensor | None = None

    def __call__(self, features: Tensor) -> Tensor:
        """Return the cluster of every sample ``(B,)``; ``batch_labels`` are those of the batch."""
        if self.law.cluster_by == "labels":
            assert self.batch_labels is not None
            return self.batch_labels
        found = self.kmeans(features)
        if self.law.permuted:
            return found[torch.randperm(len(found), generator=self.generator)]
        return found
