"""Triton kernels, installed as `gq_triton.kernels`: one operation per file, no policy.

The operations are those of `gq_triton.engines.protocol`. The launchers that end in an underscore,
and `all_finite`, reach all tensors of a call in one launch per alignment class; `combine` takes one
parameter. Bytes and oracles: README.md in this folder.
"""

from gq_triton.kernels.adamw import gqadamw_
from gq_triton.kernels.combine import combine
from gq_triton.kernels.combine_all import combine_all
from gq_triton.kernels.combine_rows import combine_rows
from gq_triton.kernels.finite import all_finite
from gq_triton.kernels.gradient_products import gradient_products
from gq_triton.kernels.group import group
from gq_triton.kernels.lloyd import lloyd_
from gq_triton.kernels.push import push_
from gq_triton.kernels.sgd import gqsgd_
from gq_triton.kernels.statistics import queue_statistics
from gq_triton.kernels.sums import channel_sums, position_sums
from gq_triton.kernels.sums_all import sums_all
from gq_triton.kernels.weigh import weigh_
from gq_triton.kernels.weight_grad import convolution_sums, product_sums

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
