"""One backward pass, K cluster gradients, and no K-fold storage of the model.

One file per family of layers; each computes the sums of the gradients of each cluster's samples
for one parameter at a time, and ``session`` weights and adds them up on the spot.
"""

from gq_triton.cluster_grad.convert import Layer, convert, survey
from gq_triton.cluster_grad.session import Session
from gq_triton.cluster_grad.step import Groups, Mixing, Step

__all__ = ["Groups", "Layer", "Mixing", "Session", "Step", "convert", "survey"]
