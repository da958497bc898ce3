"""The same operations as the kernels, in plain torch: for the CPU and devices without Triton.

Every function takes lists of flat tensors, one entry per parameter, and works block by block so
that intermediates stay in cache. ``kernels`` and ``compiled`` offer the same functions with the
same signatures; ``backend.engine`` chooses.
"""

from gq_triton.eager.bucket import all_finite, push_, weigh_
from gq_triton.eager.combine import combine, queue_statistics
from gq_triton.eager.law import BLOCK, scarcity_weight, to_queue
from gq_triton.eager.norms import channel_sums, position_sums
from gq_triton.eager.optimizers import gqadamw_, gqsgd_

__all__ = [
    "BLOCK",
    "all_finite",
    "channel_sums",
    "combine",
    "gqadamw_",
    "gqsgd_",
    "position_sums",
    "push_",
    "queue_statistics",
    "scarcity_weight",
    "to_queue",
    "weigh_",
]
