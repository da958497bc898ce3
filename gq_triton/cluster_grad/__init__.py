"""One backward pass, K cluster gradients, and no K-fold storage of the model.

Each family of layers (``layers/``) sums the gradients of each cluster's samples for one parameter
at a time and hands them to a ``Sink``. ``Weigh``, the sink of the law, weights the means and adds
them up on the spot.
"""

from gq_triton.cluster_grad.clusters import Clusters
from gq_triton.cluster_grad.sink import Sink, Taken
from gq_triton.cluster_grad.step import Step
from gq_triton.cluster_grad.weigh import Weigh

__all__ = ["Clusters", "Sink", "Step", "Taken", "Weigh"]
