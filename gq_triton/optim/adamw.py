"""GQAdamW: AdamW on gradients weighted by their scarcity."""

from collections.abc import Iterator
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
    beta_problems,
    number_problems,
    rate_problems,
    switch_problems,
    torch_problems,
)
from gq_triton.optim.saved import EXP_AVG, EXP_AVG_SQ, STEP
from gq_triton.options import LawKeywords, LawOptions
from gq_triton.ring import local

__all__ = ["GQAdamW"]


@takes(LawOptions)
class GQAdamW(GradQueueOptimizer):
    r"""AdamW whose gradient is first weighted by how unusual it is against the last L.

    For every element, with mean ``mu`` and population standard deviation ``sigma`` of the last L
    raw gradients (Grad Queue, arXiv 2404.16917, equations 1 and 2):

        w = clip(|g - mu| / sigma, 1/rho, rho)        1 until L gradients are queued
        m = beta1 * m + (1 - beta1) * (w * g)
        v = beta2 * v + (1 - beta2) * (w * g)^2
        p = p * (1 - lr * weight_decay) - lr * m_hat / (sqrt(v_hat) + eps)

    With ``rho=1``, and during the first L steps with any rho, it equals ``torch.optim.AdamW``, in
    float32 on the CPU bit for bit. State beyond torch's: the queue, ``queue_length`` numbers per
    element.

    Every option may differ per parameter group.

    Args:
        params: parameters, named parameters, or groups of them, as for any torch optimizer.
        lr: learning rate, a number or a 0-d tensor. A captured step reads a tensor on the device
            anew in every replay; any number is that of the capture.
        betas: decay of the first and the second moment.
        eps: added to the denominator.
        weight_decay: decoupled decay.
        maximize: ascend instead of descend.
        stochastic_rounding: round parameters of bfloat16 up or down at random, so that updates
            below half of a weight's last place arrive in the mean; other types as ever.
        foreach: taken as in torch, without effect: a step is one fused pass in any case.
        fused: likewise.
        capturable: likewise; a CUDA graph may capture any step.
        amsgrad: as in torch, but True is refused.
        differentiable: likewise.
        **options: those of ``LawOptions``.

    Raises:
        ValueError: invalid options, all of which the message names; a complex parameter; in
            ``step`` a sparse gradient.

    Examples:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = GQAdamW(model.parameters(), lr=1e-3)
        >>> model(torch.ones(8, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        stochastic_rounding: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[LawKeywords],
    ) -> None:
        own = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "amsgrad": amsgrad, "maximize": maximize, "foreach": foreach, "capturable": capturable,
            "differentiable": differentiable, "fused": fused,
            "stochastic_rounding": stochastic_rounding,
        }  # fmt: skip
        super().__init__(params, own, options)

    def _problems(self, group: dict[str, Any]) -> Iterator[str]:
        yield from rate_problems(group, "lr", "weight_decay")
        yield from number_problems(group, "eps", least=0)
        yield from beta_problems(group["betas"])
        yield from torch_problems(group)
        yield from switch_problems(group, "stochastic_rounding")

    def _new_state(self, param: Tensor, group: dict[str, Any], state: State) -> None:
        if STEP not in state:
            state[STEP] = torch.zeros((), dtype=torch.float32, device=local(param).device)
            for name in (EXP_AVG, EXP_AVG_SQ):
                state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)

    def _keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        return STEP, EXP_AVG, EXP_AVG_SQ

    def _batch_key(self, group: dict[str, Any], state: State) -> None:
        return None

    def _update(
        self, ops: Engine, batch: Batch, accept: Tensor | None, group: dict[str, Any], law: Law
    ) -> None:
        names = "lr", "eps", "weight_decay", "maximize"
        beta1, beta2 = group["betas"]
        ops.gqadamw_(
            batch.params, batch.grads, batch.queues, batch.queued,
            batch.state(EXP_AVG), batch.state(EXP_AVG_SQ), batch.column(STEP), accept, law,
            **{name: group[name] for name in names}, beta1=beta1, beta2=beta2,
            **batch.rounding(group),
        )  # fmt: skip
