"""The optimizers under the arms."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["OPTIMIZERS"]

_MOMENTUM = 0.9


def _sgd(params: Iterable[Tensor], lr: float) -> Optimizer:
    return torch.optim.SGD(params, lr=lr, momentum=_MOMENTUM)


def _nesterov(params: Iterable[Tensor], lr: float) -> Optimizer:
    return torch.optim.SGD(params, lr=lr, momentum=_MOMENTUM, nesterov=True)


def _adamw(params: Iterable[Tensor], lr: float) -> Optimizer:
    return torch.optim.AdamW(params, lr=lr)


OPTIMIZERS: dict[str, Callable[[Iterable[Tensor], float], Optimizer]] = {
    "sgdm": _sgd,
    "nesterov": _nesterov,
    "adamw": _adamw,
}
"""Builders by name: ``(parameters, learning rate) -> optimizer``, the rest at its default."""
