"""The update of one step fused into one pass over memory, compiled for the CPU by Numba.

The same functions as ``eager`` and ``kernels``. A tensor whose weights are all 1 (warm-up, rho = 1,
a gradient that is not finite) or whose types Numba does not know goes to ``eager``, which there is
bit for bit ``torch.optim``. Numba comes with the extra ``gq_triton[cpu]``.
"""

from gq_triton.compiled.bucket import weigh_
from gq_triton.compiled.combine import combine, queue_statistics
from gq_triton.compiled.norms import channel_sums
from gq_triton.compiled.optimizers import gqadamw_, gqsgd_
from gq_triton.eager import all_finite, position_sums, push_

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
