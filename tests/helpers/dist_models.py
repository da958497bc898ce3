"""The small models that the checks of the DDP hook train, and their data by step and rank."""

import torch
from torch import Tensor, nn


def mlp(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)
    return nn.Sequential(*layers).to(dtype)


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 2), nn.Flatten()
    model = nn.Sequential(*layers).double().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert not next(model.parameters()).is_contiguous()
    return model


class TwoHeads(nn.Module):
    """A body and two heads, each of which can be left out of a step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.left, self.right = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor, left: bool = True, right: bool = True) -> Tensor:
        h = torch.tanh(self.body(x))
        heads = [head(h) for head, used in ((self.left, left), (self.right, right)) if used]
        return torch.stack(heads).sum(dim=0)


class MixedTypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.narrow, self.wide = nn.Linear(6, 8), nn.Linear(8, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(torch.tanh(self.narrow(x)).double())


def batch(step: int, rank: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(4, 6, generator=generator, dtype=dtype)


def wide_mlp() -> nn.Module:
    return mlp(torch.float64)


def wide_batch(step: int, rank: int) -> Tensor:
    return batch(step, rank, torch.float64)


def images(step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(2, 3, 5, 5, generator=generator, dtype=torch.float64)
