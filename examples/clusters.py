# The third door: the samples of a large batch in clusters, in one backward pass.

import torch

from gq_triton import GradQueue

model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
queue = GradQueue(model, n_clusters=8, features="1")  # k-means on the output of layer "1"
queue.attach(optimizer)
for step in range(20):
    loss = model(torch.randn(2048, 64)).square().mean()
    optimizer.zero_grad()
    loss.backward()  # leaves the weighted gradient in p.grad
    optimizer.step()
print(queue.cluster_sizes_, queue.report())
