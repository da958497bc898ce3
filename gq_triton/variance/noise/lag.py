"""The momentum of an optimizer, against which the lag share compares the gradient."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Mean", "Momentum"]


class Mean(NamedTuple):
    """A mean of past gradients.

    Attributes:
        value: the mean, in the parameter's shape; times ``factor``.
        factor: makes a mean of a sum.
        noise: the variance of the mean in that of one gradient, if all are independent: 1 / L.
    """

    value: Tensor
    factor: float
    noise: float


class Momentum:
    """The means of past gradients that an optimizer keeps: those of Adam's kind, and SGD's.

    Args:
        optimizer: the optimizer.
        params: the model's parameters by name.

    Raises:
        TypeError: ``optimizer`` is no torch optimizer.
        ValueError: it has none of the parameters.
    """

    def __init__(self, optimizer: Optimizer, params: Mapping[str, Tensor]) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        names = {param: name for name, param in params.items()}
        self._optimizer, self._params = optimizer, params
        self._groups: dict[str, dict[str, Any]] = {
            names[param]: group
            for group in optimizer.param_groups
            for param in group["params"]
            if param in names
        }
        if not self._groups:
            raise ValueError("none of the optimizer's parameters belongs to the model")

    def compare(self, lag: Tensor, noise: Tensor) -> None:
        """Write what noise adds to the distance from momentum to gradient, and its square.

        Args:
            lag: ``(N, 2)``, one row per parameter; rows without a mean stay as they are.
            noise: ``tr S / B`` of every parameter, ``(N,)``.
        """
        for row, (name, param) in enumerate(self._params.items()):
            mean = self.mean(name)
            if mean is not None and param.grad is not None:
                distance = param.grad - mean.value * mean.factor
                lag[row, 0] = noise[row] * (1 + mean.noise)
                lag[row, 1] = distance.double().square().sum()

    def mean(self, name: str) -> Mean | None:
        """Return the mean of a parameter's past gradients; None before the first step."""
        group, param = self._groups.get(name), self._params[name]
        state = self._optimizer.state.get(param, {})
        if group is None:
            return None
        if state.get("exp_avg") is not None and "betas" in group:
            beta = float(group["betas"][0])
            faded = beta ** float(state["step"])
            noise = (1 - beta) * (1 + faded) / ((1 + beta) * (1 - faded))
            return Mean(state["exp_avg"], 1 / (1 - faded), noise)
        if state.get("momentum_buffer") is not None:
            beta = float(group["momentum"])
            factor = (1 - beta) / (1 - float(group.get("dampening", 0.0)))
            return Mean(state["momentum_buffer"], factor, (1 - beta) / (1 + beta))
        return None
