"""The clusters of a batch that a law asks for."""

import torch
from torch import Tensor

from gq_triton.grouping import KMeans
from gq_triton.study.design.law import StudyLaw

__all__ = ["StudyClusterer"]


class StudyClusterer:
    """A clusterer of ``GradQueue`` that finds k-means clusters, random ones, or one per class.

    ``batch_labels`` must be set to the labels of the batch before a call with clusters by class.

    Args:
        law: the law; ``n_clusters`` must not be None.
        generator: of random clusters.
        classes: the number of classes; None if there are none.

    Attributes:
        n_clusters: a label is below this number.
    """

    def __init__(
        self, law: StudyLaw, generator: torch.Generator, classes: int | None = None
    ) -> None:
        assert law.n_clusters is not None
        self.law, self.generator = law, generator
        by_class = law.cluster_by == "labels"
        self.n_clusters = max(law.n_clusters, (classes or 0) if by_class else 0)
        self.kmeans = KMeans(law.n_clusters)
        self.batch_labels: Tensor | None = None

    def __call__(self, features: Tensor) -> Tensor:
        """Return the cluster of every sample, ``(B,)``, from its features ``(B, D)``."""
        if self.law.cluster_by == "labels":
            assert self.batch_labels is not None
            return self.batch_labels
        found = self.kmeans(features)
        if self.law.permuted:
            return found[torch.randperm(len(found), generator=self.generator)]
        return found
