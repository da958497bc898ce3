# Figure 1 of "A Study of Gradient Variance in Deep Learning": clusters of gradients of two classes
# of points, and where the decision boundary goes after a step along each cluster's mean gradient.

import sys

import torch
from matplotlib.figure import Figure

from gq_triton.sampling import GradientClustering

torch.manual_seed(0)
centres = torch.tensor([[-1.2, -0.8], [1.2, 0.8]])
labels = torch.arange(200) % 2
points = centres[labels] + torch.randn(200, 2)
model = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
for _ in range(10):  # a boundary that still has something to learn
    batch = torch.randint(200, (10,))
    loss = torch.nn.functional.cross_entropy(model(points[batch]), labels[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

data = torch.utils.data.TensorDataset(points, labels)
clustering = GradientClustering(model, n_clusters=4)
clustering.fit(torch.utils.data.DataLoader(data, batch_size=10))
print("samples of each cluster:", clustering.cluster_sizes_.tolist())
print(f"variance over that of uniform batches: {clustering.objective_ / clustering.uniform_:.2f}")


def boundary(weight, bias):
    """Return x and y of the points where both classes are as likely."""
    (a, b), c = weight[0] - weight[1], bias[0] - bias[1]
    x = torch.linspace(-4, 4, 2)
    return x, -(a * x + c) / b


panel = (figure := Figure(figsize=(6, 5), dpi=100, layout="constrained")).subplots()
colours = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
weight, bias = model.weight.detach(), model.bias.detach()
panel.plot(*boundary(weight, bias), color="black", label="now")
for k, colour in enumerate(colours):
    own = clustering.labels_ == k
    for label, marker in enumerate("o^"):
        some = points[own & (labels == label)]
        panel.scatter(*some.T, color=colour, marker=marker, s=16, alpha=0.6)
    loss = torch.nn.functional.cross_entropy(model(points[own]), labels[own])
    steps = torch.autograd.grad(loss, [model.weight, model.bias])
    moved = (value - step for value, step in zip((weight, bias), steps, strict=True))
    panel.plot(*boundary(*moved), color=colour, linestyle="--", label=f"{int(own.sum())} samples")
panel.set(xlim=(-4, 4), ylim=(-4, 4), title="Boundary after a step (rate 1) along each mean")
panel.legend(loc="lower left", fontsize=8)
out = sys.argv[1] if len(sys.argv) > 1 else "gradient_clusters.png"
figure.savefig(out)
print("written to", out)
