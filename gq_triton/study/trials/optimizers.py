"""The optimizers that the arms build on."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["OPTIMIZERS"]


def _sgd(params: Iterable[Tensor], lr: float, beta1: float) -> Optimizer:
    return torch.optim.SGD(params, lr=lr, momentum=beta1)


def _nesterov(params: Iterable[Tensor], lr: float, beta1: float) -> Optimizer:
    return torch.optim.SGD(params, lr=lr, momentum=beta1, nesterov=True)


def _adamw(params: Iterable[Tensor], lr: float, beta1: float) -> Optimizer:
    return torch.optim.AdamW(params, lr=lr, betas=(beta1, 0.999))


OPTIMIZERS: dict[str, Callable[[Iterable[Tensor], float, float], Optimizer]] = {
    "sgdm": _sgd,
    "nesterov": _nesterov,
    "adamw": _adamw,
}
"""Builders by name: ``(parameters, learning rate, beta1) -> optimizer``.

With SGD ``beta1`` is the momentum. All other settings have torch's defaults.
"""
