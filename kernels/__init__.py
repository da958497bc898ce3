"""Triton kernels, installed as `gq_triton.kernels`: one operation per file, no policy.

Every launcher takes lists of flat tensors that share a device and, list by list, a dtype, and
reaches all of them in one launch per alignment class. `gq_triton.eager` offers the same functions
with the same signatures. Bytes and oracles: README.md beside this file.
"""

from gq_triton.kernels.finite import all_finite
from gq_triton.kernels.gqadamw import gqadamw_
from gq_triton.kernels.gqsgd import gqsgd_
from gq_triton.kernels.weigh import weigh_

__all__ = ["all_finite", "gqadamw_", "gqsgd_", "weigh_"]
