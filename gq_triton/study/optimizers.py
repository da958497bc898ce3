"""The optimizers under the arms."""

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
"""Builders by name: ``(parameters, learning rate, beta1) -> optimizer``, the rest at its default.

``beta1`` is the momentum of SGD.
"""
