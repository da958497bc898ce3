# The fourth door: the communication hook of DDP.
#
#     torchrun --standalone --nproc-per-node=2 examples/ddp.py

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from gq_triton.dist import register

dist.init_process_group("gloo")  # "nccl" on GPUs
ddp = DistributedDataParallel(torch.nn.Linear(64, 10))
state = register(ddp, rho=3.0, queue_length=5)  # the one line; it registers grad_queue_hook
optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
for step in range(20):
    optimizer.zero_grad()
    ddp(torch.randn(256, 64)).square().mean().backward()
    optimizer.step()
print(dist.get_rank(), state.digest())  # the queue is the same on every rank
dist.barrier()
del ddp, state  # gloo may hang in a process that ends with a DDP module and its hook alive
dist.destroy_process_group()
