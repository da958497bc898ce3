"""Law and update fused into one pass over memory, compiled by Numba for the CPU.

The operations are those of ``engines.protocol``. Two kinds of tensors go to ``eager``: those whose
weights are all 1 (warm-up, rho = 1, a gradient that is not accepted), because ``eager`` then equals
``torch.optim`` bit for bit, and those of types that Numba does not know. Numba comes with the extra
``cpu``.
"""

from gq_triton.engines.compiled.adamw import gqadamw_
from gq_triton.engines.compiled.combine import combine
from gq_triton.engines.compiled.finite import all_finite
from gq_triton.engines.compiled.sgd import gqsgd_
from gq_triton.engines.compiled.statistics import queue_statistics
from gq_triton.engines.compiled.sums import channel_sums
from gq_triton.engines.compiled.weigh import weigh_
from gq_triton.engines.eager import (
    combine_all,
    combine_rows,
    convolution_sums,
    gradient_products,
    group,
    lloyd_,
    position_sums,
    product_sums,
    push_,
    sums_all,
)

__all__ = [
    "all_finite",
    "channel_sums",
    "combine",
    "combine_all",
    "combine_rows",
    "convolution_sums",
    "gqadamw_",
    "gqsgd_",
    "gradient_products",
    "group",
    "lloyd_",
    "position_sums",
    "product_sums",
    "push_",
    "queue_statistics",
    "sums_all",
    "weigh_",
]
