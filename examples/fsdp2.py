# Clusters on a model that FSDP2 has divided.
#
#     torchrun --standalone --nproc-per-node=2 examples/fsdp2.py

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from gq_triton import GradQueue

dist.init_process_group("gloo")  # "nccl" on GPUs
mesh = init_device_mesh("cpu", (dist.get_world_size(),))  # (copies, shards) for HSDP
model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
for module in (model[0], model[2], model):
    fully_shard(module, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
queue = GradQueue(model, n_clusters=4, features="1")  # or without clusters
queue.attach(optimizer)
for step in range(20):
    optimizer.zero_grad()
    model(torch.randn(256, 64)).square().mean().backward()
    optimizer.step()
print(dist.get_rank(), queue.metrics()["mean_weight"])  # the same on every rank
dist.destroy_process_group()
