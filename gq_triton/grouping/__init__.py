"""The grouping of a batch: features of its samples, k-means on them, and the groups."""

from gq_triton.grouping.groups import Groups
from gq_triton.grouping.kmeans import KMeans

__all__ = ["Groups", "KMeans"]
