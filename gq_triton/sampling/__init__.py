"""Samplers that lower the variance of a mini-batch's gradient, for torch's own data loading."""

from gq_triton.sampling.clustering import GradientClustering
from gq_triton.sampling.costs import EpochCost
from gq_triton.sampling.gradients import gradient_norms
from gq_triton.sampling.history import HistoryBatchSampler
from gq_triton.sampling.importance import ImportanceBatch, ImportanceLoader
from gq_triton.sampling.scores import importance_score, total_variation, variance_reduction
from gq_triton.sampling.stratified import StratifiedBatchSampler

__all__ = [
    "EpochCost",
    "GradientClustering",
    "HistoryBatchSampler",
    "ImportanceBatch",
    "ImportanceLoader",
    "StratifiedBatchSampler",
    "gradient_norms",
    "importance_score",
    "total_variation",
    "variance_reduction",
]
