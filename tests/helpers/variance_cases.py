"""A small model with its dataset, its gradients by sample, and its exact variances."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from gq_triton.variance import measure_variance


def small(samples=6, seed=0):
    """Return a model in float64 and a dataset."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 3, dtype=torch.float64, generator=generator)
    data = TensorDataset(x, torch.randint(3, (samples,), generator=generator))
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return model, data


def gradients(model, data, loss=F.cross_entropy):
    """Return the oracle: a row of autograd's gradients for every sample."""
    params = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for x, y in data:
        grads = torch.autograd.grad(loss(model(x[None]), y[None]), params)
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


def exact(estimator, model, data, loss="cross_entropy"):
    return measure_variance(model, loss, data, {"it": estimator}, exact=True)["it"]
