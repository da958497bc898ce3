# The first door: GQAdamW in the place of AdamW.

import torch

from gq_triton import GQAdamW

model = torch.nn.Linear(64, 10)
optimizer = GQAdamW(model.parameters(), lr=1e-3, rho=3.0, queue_length=5)  # or GQSGD
for step in range(20):
    loss = model(torch.randn(256, 64)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
