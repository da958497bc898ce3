"""Katyusha, accelerated SVRG, for any optimizer: Allen-Zhu (2017)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gq_triton.sampling.checks import number, raise_all
from gq_triton.sampling.scores import Loss
from gq_triton.saved.rules import ListOf, Maybe, Record, check, must
from gq_triton.variance.anchored import SVRG

__all__ = ["Katyusha"]


@dataclass(frozen=True)
class _Values:
    """The rule of saved values of all parameters, in their order."""

    shapes: tuple[torch.Size, ...]

    def problems(self, value: Any, path: str) -> Iterator[str]:
        """Yield a problem unless the value is a list of tensors of these shapes."""
        found = value if isinstance(value, (list, tuple)) else [None]
        if [getattr(one, "shape", None) for one in found] != list(self.shapes):
            yield must(path, f"tensors of the model's {len(self.shapes)} parameters", value)


class Katyusha(SVRG):
    r"""SVRG with Katyusha momentum, which pulls the point of the gradient back to the anchor.

    With the anchor a, ``x = tau1 z + tau2 a + (1 - tau1 - tau2) y`` and v, SVRG's estimate at x,
    the paper takes ``y = x - lr v`` and ``z = z - (lr / tau1) v``. So ``y = x + tau1 (z' - z)``
    with z' the new z: the step of z may be any optimizer's. Give SGD ``lr / tau1`` as its rate.

    Between steps the model's parameters are z, which the optimizer moves. The model to use is y:
    evaluate it within ``with katyusha.iterate():``, and end a training with ``finish()``.

    Args:
        model: as in ``SVRG``.
        loss: as in ``SVRG``.
        dataset: as in ``SVRG``.
        every: steps between anchors; a new anchor is the present y.
        tau1: weight of z, above 0.
        tau2: weight of the anchor; both together at most 1.

    Raises:
        TypeError: as ``SVRG``.
        ValueError: as ``SVRG``.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        dataset: Any,
        every: int,
        tau1: float = 0.5,
        tau2: float = 0.5,
    ) -> None:
        raise_all(number("tau1", tau1, 0, 1), number("tau2", tau2, 0, 1))
        if not (tau1 > 0 and tau1 + tau2 <= 1):
            raise ValueError(
                f"tau1 must be above 0 and tau1 + tau2 at most 1, got tau1={tau1} and tau2={tau2}"
            )
        super().__init__(model, loss, dataset, every)
        self._tau1, self._tau2 = tau1, tau2
        # Of the last step: the point of the gradient, and z before the optimizer's step.
        self._x: list[Tensor] | None = None
        self._z: list[Tensor] | None = None

    def snapshot(self) -> None:
        """Make y the anchor, in one pass over the dataset."""
        with self.iterate():
            super().snapshot()

    def backward(self, inputs: Any, targets: Any) -> Tensor:
        """Add the estimate at x to ``p.grad``; arguments and result as in ``SVRG``."""
        if not self._left:
            self.snapshot()
        z, y = self._copies(), self._iterate()
        anchor = [*self.anchor.params.values()]
        rest = 1 - self._tau1 - self._tau2
        with torch.no_grad():
            x = [
                self._tau1 * one + self._tau2 * past + rest * last
                for one, past, last in zip(z, anchor, y, strict=True)
            ]
        self._put(x)
        try:
            loss = super().backward(inputs, targets)
        finally:
            self._put(z)
        self._x, self._z = x, z
        return loss

    @contextmanager
    def iterate(self) -> Iterator[None]:
        """Put y, the model to use, in the parameters; z comes back after."""
        z, y = self._copies(), self._iterate()
        self._put(y)
        try:
            yield
        finally:
            self._put(z)

    def finish(self) -> None:
        """Put y in the parameters for good; another step would begin a new training there."""
        self._put(self._iterate())
        self._x = self._z = None
        self._left = 0

    def state_dict(self) -> dict[str, Any]:
        """Return what ``SVRG`` does, and the last step's x and z."""
        pair = None if self._x is None or self._z is None else [[*self._x], [*self._z]]
        return {**super().state_dict(), "last": pair}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned; the model must hold the parameters saved with it.

        Raises:
            ValueError: as ``SVRG``.
        """
        shapes = tuple(param.shape for param in self._params)
        check(state, Record({"last": Maybe(ListOf(_Values(shapes), 2))}), "the saved Katyusha")
        super().load_state_dict(state)
        if state["last"] is None:
            self._x = self._z = None
        else:
            device = self.anchor.device
            self._x, self._z = ([t.to(device, copy=True) for t in of] for of in state["last"])

    def _copies(self) -> list[Tensor]:
        return [param.detach().clone() for param in self._params]

    def _iterate(self) -> list[Tensor]:
        """Return y."""
        now = self._copies()
        if self._x is None or self._z is None:
            return now
        triples = zip(self._x, now, self._z, strict=True)
        return [x + self._tau1 * (after - before) for x, after, before in triples]

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
        for param, value in zip(self._params, values, strict=True):
            param.copy_(value)
