"""GQSGD: SGD with momentum on gradients weighted by their scarcity."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from gq_triton.engines import Engine
from gq_triton.keywords import takes
from gq_triton.law import Law
from gq_triton.optim.base import GradQueueOptimizer
from gq_triton.optim.batches import Batch, State
from gq_triton.optim.checks import (
    number_problems,
    rate_problems,
    switch_problems,
    torch_problems,
)
from gq_triton.optim.saved import MOMENTUM_BUFFER
from gq_triton.options import LawKeywords, LawOptions, shown
from gq_triton.ring import local, refuse_capture

__all__ = ["GQSGD"]


@takes(LawOptions)
class GQSGD(GradQueueOptimizer):
    r"""SGD whose gradient is first weighted by how unusual it is against the last L.

    For every element, with mean ``mu`` and population standard deviation ``sigma`` of the last L
    raw gradients (Grad Queue, arXiv 2404.16917, equations 1 and 2):

        w = clip(|g - mu| / sigma, 1/rho, rho)        1 until L gradients are queued
        b = momentum * b + (1 - dampening) * (w * g + weight_decay * p)
        p = p - lr * b

    With ``rho=1``, and during the first L steps with any rho, it equals ``torch.optim.SGD``, in
    float32 on the CPU bit for bit. State beyond torch's: the queue, ``queue_length`` numbers per
    element.

    Every option may differ per parameter group.

    Args:
        params: parameters, named parameters, or groups of them, as for any torch optimizer.
        lr: learning rate, a number or a 0-d tensor. A captured step reads a tensor on the device
            anew in every replay; any number is that of the capture.
        momentum: decay of the momentum buffer; 0 keeps none.
        weight_decay: L2 penalty, added after the law.
        nesterov: look one momentum step ahead.
        dampening: share of the gradient that does not enter the momentum.
        maximize: ascend instead of descend.
        stochastic_rounding: round parameters of bfloat16 up or down at random, so that updates
            below half of a weight's last place arrive in the mean; other types as ever.
        foreach: taken as in torch, without effect: a step is one fused pass in any case.
        fused: likewise.
        differentiable: as in torch, but True is refused.
        **options: those of ``LawOptions``.

    Raises:
        ValueError: invalid options, all of which the message names; a complex parameter; in
            ``step`` a sparse gradient.

    Examples:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = GQSGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> model(torch.ones(8, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        dampening: float = 0.0,
        maximize: bool = False,
        stochastic_rounding: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[LawKeywords],
    ) -> None:
        own = {
            "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov,
            "dampening": dampening, "maximize": maximize, "foreach": foreach,
            "differentiable": differentiable, "fused": fused,
            "stochastic_rounding": stochastic_rounding,
        }  # fmt: skip
        super().__init__(params, own, options)

    def _problems(self, group: dict[str, Any]) -> Iterator[str]:
        yield from rate_problems(group, "lr", "weight_decay")
        yield from torch_problems(group)
        yield from switch_problems(group, "stochastic_rounding")
        numbers = [
            *number_problems(group, "momentum", least=0),
            *number_problems(group, "dampening"),
        ]
        yield from numbers
        if not isinstance(group["nesterov"], bool):
            yield (
                f"nesterov must be True or False, got {shown(group['nesterov'])}: the order of "
                "arguments is lr, momentum, weight_decay, nesterov; dampening goes by name"
            )
            return
        if numbers or not group["nesterov"]:
            return
        if group["momentum"] == 0 or group["dampening"] != 0:
            yield (
                "nesterov needs momentum > 0 and dampening 0, got momentum "
                f"{group['momentum']} and dampening {group['dampening']}"
            )

    def _new_state(self, param: Tensor, group: dict[str, Any], state: State) -> None:
        """Leave the momentum to the first step, which writes it; see ``_update``."""

    def _full_state(self, params: Iterable[Tensor], group: dict[str, Any]) -> None:
        members = list(params)
        super()._full_state(members, group)
        if group["momentum"] != 0:
            for param in members:
                self._new_momentum(param)

    def _new_momentum(self, param: Tensor) -> None:
        if MOMENTUM_BUFFER not in self.state[param]:
            refuse_capture("a momentum buffer", local(param).device)
            fresh = torch.zeros_like(param, memory_format=torch.preserve_format)
            self.state[param][MOMENTUM_BUFFER] = fresh

    def _keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        return (MOMENTUM_BUFFER,) if group["momentum"] != 0 else ()

    def _batch_key(self, group: dict[str, Any], state: State) -> bool:
        return group["momentum"] != 0 and MOMENTUM_BUFFER not in state

    def _update(
        self, ops: Engine, batch: Batch, accept: Tensor | None, group: dict[str, Any], law: Law
    ) -> None:
        missing = MOMENTUM_BUFFER not in batch.keys
        first = missing and self._batch_key(group, batch.states[0])
        if first:
            # On the CPU a step that a loss scaler skips must not leave a buffer of zeros.
            if law.found_inf is not None and not law.found_inf.is_cuda and bool(law.found_inf):
                return
            for member in batch.members:
                self._new_momentum(member)
        buffers = batch.state(MOMENTUM_BUFFER) if group["momentum"] != 0 else None
        names = "lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize"
        ops.gqsgd_(
            batch.params, batch.grads, batch.queues, batch.queued, buffers, accept, law,
            **{name: group[name] for name in names}, first=first,
            **batch.rounding(group),
        )  # fmt: skip
