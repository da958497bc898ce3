"""Compile, when imported, what Numba would compile in each run of launch/train.py: 1.5 s.

The server that the runs are forked from imports this module; see ``train_runs``.
"""

import torch

from gq_triton import GradQueue

for length in (4, 5):  # a run with a window of losses has both lengths
    param = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([param], lr=0.0)
    GradQueue(torch.nn.ParameterList([param]), queue_length=length).attach(optimizer)
    for _ in range(length + 1):
        # Not from a backward pass: its threads must not exist in a process that is forked.
        param.grad = torch.ones(1)
        optimizer.step()
