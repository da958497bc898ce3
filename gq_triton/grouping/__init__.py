"""From a batch's features to the clusters of its samples."""

from gq_triton.grouping.groups import Groups
from gq_triton.grouping.kmeans import KMeans

__all__ = ["Groups", "KMeans"]
