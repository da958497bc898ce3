"""Triton kernels, installed as `gq_triton.kernels`: one operation per file, no policy.

The launchers that end in an underscore, and `all_finite`, take lists of flat tensors that share a
device and, list by list, a dtype, and reach all of them in one launch per alignment class;
`combine` takes one parameter. `gq_triton.eager` offers the same functions with the same signatures.
Bytes and oracles: README.md in this folder.
"""

from gq_triton.kernels.cluster_combine import combine
from gq_triton.kernels.finite import all_finite
from gq_triton.kernels.gqadamw import gqadamw_
from gq_triton.kernels.gqsgd import gqsgd_
from gq_triton.kernels.segment_sums import channel_sums, position_sums
from gq_triton.kernels.statistics import queue_statistics
from gq_triton.kernels.weigh import push_, weigh_

__all__ = [
    "all_finite",
    "channel_sums",
    "combine",
    "gqadamw_",
    "gqsgd_",
    "position_sums",
    "push_",
    "queue_statistics",
    "weigh_",
]
