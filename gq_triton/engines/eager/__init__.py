"""Plain torch, block by block: for any device, and for all cases that other engines leave out.

A block's intermediates stay in cache. The operations are those of ``engines.protocol``.
"""

from gq_triton.engines.eager.adamw import gqadamw_
from gq_triton.engines.eager.combine import combine, combine_all
from gq_triton.engines.eager.finite import all_finite
from gq_triton.engines.eager.gradient_products import gradient_products
from gq_triton.engines.eager.group import group
from gq_triton.engines.eager.lloyd import lloyd_
from gq_triton.engines.eager.push import push_
from gq_triton.engines.eager.rows import combine_rows
from gq_triton.engines.eager.sgd import gqsgd_
from gq_triton.engines.eager.statistics import queue_statistics
from gq_triton.engines.eager.sums import channel_sums, position_sums, sums_all
from gq_triton.engines.eager.weigh import weigh_
from gq_triton.engines.eager.weight_grad import convolution_sums, product_sums

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
