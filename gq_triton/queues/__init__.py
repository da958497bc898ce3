"""The last raw gradients of a model, by parameter name, and the law that reads them."""

from gq_triton.queues.queues import Queues
from gq_triton.queues.saved import LOSSES, sha

__all__ = ["LOSSES", "Queues", "sha"]
