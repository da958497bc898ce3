"""A small model, its batches and a backward pass for the tests of the plug-in."""

import torch
from torch import nn


def make_model(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def batch(step, dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 6, generator=generator, dtype=dtype)


def backward(model, step, scale=1.0):
    model.zero_grad()
    loss = model(batch(step)).square().mean()
    (loss * scale).backward()
    return loss
