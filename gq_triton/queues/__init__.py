"""The last raw gradients of a model, by parameter name, and the law that reads them."""

from gq_triton.queues.queues import Queues
from gq_triton.queues.saved import LOSSES, sha
from gq_triton.ring import in_use

__all__ = ["LOSSES", "Queues", "in_use", "sha"]
