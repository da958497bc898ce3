"""Compile, when imported, what Numba would compile again in ranks and runs of launch/train.py.

It takes ten seconds. The server that all of them are forked from imports this module; see
``rank_checks`` and ``train_runs``. Nothing here may start a thread, such as that of a backward
pass: a forked process has none of the threads.
"""

import torch

from gq_triton.engines import compiled
from gq_triton.law import Law
from gq_triton.ring import new_queue

# The checks of ranks have 3 slots. A run with a window of losses has both lengths.
RINGS = (
    (3, torch.float32, None), (3, torch.float64, None), (3, torch.float32, "float8"),
    (4, torch.float32, None), (5, torch.float32, None),
)  # fmt: skip
for length, dtype, queue_dtype in RINGS:
    grad = torch.ones(1, dtype=dtype)
    ring = new_queue(grad, length, queue_dtype)
    compiled.weigh_([grad], [ring.view(len(ring), -1)], [torch.tensor(length)], None, Law(3.0))
# Three clusters, of which a run of launch/train.py and a study with clusters weigh the means.
ones = torch.ones(3)
compiled.combine(
    torch.ones(3, 1), torch.zeros(5, 1), torch.tensor(5), Law(3.0),
    inverse_shares=ones, mixture=ones, sigma_scales=ones,
)  # fmt: skip
for dtype in (torch.bfloat16, torch.float32, torch.float64):
    compiled.all_finite([torch.ones(1, dtype=dtype)])
