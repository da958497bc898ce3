"""Data with hard samples, a model that is sure of itself, and loops for ``ImportanceLoader``."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from gq_triton.sampling import ImportanceLoader


def planted(samples=60, dtype=torch.float32):
    """Return data of which every tenth sample is hard: its class is the wrong one."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 4, generator=generator, dtype=dtype)
    y = (x[:, 0] > 0).long()
    y[::10] = 1 - y[::10]
    return x, y


def head(scale=20.0):
    """Return a model that answers the planted rule, and is sure of it."""
    model = nn.Linear(4, 2)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
        model.weight[:, 0] = torch.tensor([-scale, scale])
    return model


def loader_of(model=None, **options):
    options = {"batch_size": 4, "tau_th": 1.2, **options}
    data = TensorDataset(*planted())
    return ImportanceLoader(data, model or head(), F.cross_entropy, **options)


def run(loader, epochs=1, lr=0.0, stop=None):
    """Train; return of every step what identifies it: indices, weights and tau before it."""
    optimizer = torch.optim.SGD(loader.model.parameters(), lr=lr)
    seen = []
    for _ in range(epochs):
        for indices, inputs, targets, weights in loader:
            losses = F.cross_entropy(loader.model(inputs), targets, reduction="none")
            optimizer.zero_grad()
            (weights * losses).mean().backward()
            optimizer.step()
            seen.append((indices.tolist(), weights.tolist(), loader.tau))
            if stop is not None and len(seen) == stop:
                return seen
    return seen
