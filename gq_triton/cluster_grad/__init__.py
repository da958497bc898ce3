"""One backward pass, K cluster gradients, and no K-fold storage of the model.

Each family of layers (``layers/``) sums the gradients of each cluster's samples for one parameter
at a time; ``session`` weights and adds them up on the spot.
"""

from gq_triton.cluster_grad.clusters import OUTPUT_GRADIENT, Clusters
from gq_triton.cluster_grad.step import Step

__all__ = ["OUTPUT_GRADIENT", "Clusters", "Step"]
