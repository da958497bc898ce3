# A run under DDP that survives the death of a rank.
#
#     export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
#     torchrun --standalone --nproc-per-node=2 --max-restarts=3 examples/restart.py

import gc
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from gq_triton.dist import register

dist.init_process_group("gloo")  # "nccl" on GPUs
rank, path = dist.get_rank(), Path("checkpoint.pt")
torch.manual_seed(0)
model = torch.nn.Linear(64, 10)
ddp = DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
state = register(ddp, rho=3.0, queue_length=5)

first = 0
if path.exists():  # on every rank
    saved = torch.load(path, weights_only=True)
    first = saved["step"]
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    state.load_state_dict(saved["queue"])

for step in range(first, 100):
    torch.manual_seed(1000 * step + rank)  # data and dropout depend on the step, not on the past
    optimizer.zero_grad()
    ddp(torch.randn(256, 64)).square().mean().backward()
    optimizer.step()
    if rank == 0 and (step + 1) % 10 == 0:
        content = {"step": step + 1, "model": model.state_dict(), "queue": state.state_dict()}
        draft = path.with_suffix(".tmp")
        torch.save({**content, "optimizer": optimizer.state_dict()}, draft)
        os.replace(draft, path)  # readers see all of the old one or all of the new

print(rank, state.digest())
del ddp, state  # before the group: gloo may abort a process that ends with a DDP module alive
gc.collect()
dist.barrier()
dist.destroy_process_group()
