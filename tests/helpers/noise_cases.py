# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
# pyright: reportAttributeAccessIssue=false, reportFunctionMemberAccess=false
"""Models and samples of the noise meter's tests, and gradients of single samples."""

import torch
from cluster_cases import GPT, MLP, ResNet
from torch import nn

F64 = torch.float64


class Planted(nn.Module):
    """A model whose sample has the gradient z, its input; u describes the sample."""

    def __init__(self, size=30):
        super().__init__()
        self.describe, self.head = nn.Identity(), nn.Linear(size, 1, bias=False)

    def forward(self, z, u=None):
        if u is not None:
            self.describe(u)
        return self.head(z)


def draws(batch, seed, size=30, noise=2.0):
    """Return samples whose gradients have mean 1 and variance 4 in every element."""
    generator = torch.Generator().manual_seed(seed)
    return 1 + noise * torch.randn(batch, size, generator=generator, dtype=F64)


def by_sample(model, losses):
    """Return gradients of single samples, by parameter name, ``(B, P)``."""
    named = dict(model.named_parameters())
    rows = [torch.autograd.grad(loss, list(named.values()), retain_graph=True) for loss in losses]
    return {
        name: torch.stack([row[place].flatten() for row in rows])
        for place, name in enumerate(named)
    }


CASES = {
    "mlp": (MLP, lambda: torch.randn(9, 6, dtype=F64)),
    "convolutions": (lambda: ResNet(lambda c: nn.GroupNorm(2, c)),
                     lambda: torch.randn(9, 2, 8, 8, dtype=F64)),
    "gpt, tied head": (lambda: GPT(norm=nn.RMSNorm), lambda: torch.randint(0, 9, (9, 5))),
    "run again": (lambda: nn.Sequential(nn.LSTM(4, 3, batch_first=True)),
                  lambda: torch.randn(9, 5, 4, dtype=F64)),
}  # fmt: skip


def losses_of(model, batch):
    out = model(batch)
    out = out[0] if isinstance(out, tuple) else out
    return (out - 1).square().flatten(1).mean(dim=1)
