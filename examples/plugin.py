# The second door: GradQueue on any optimizer.

import torch

from gq_triton import GradQueue

model = torch.nn.Linear(64, 10)
optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3)
queue = GradQueue(model, rho=3.0, queue_length=5)
queue.attach(optimizer)  # the loop does not change
for step in range(20):
    loss = model(torch.randn(256, 64)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(queue.metrics())  # mean weight, norm ratio, saturation, effective length
