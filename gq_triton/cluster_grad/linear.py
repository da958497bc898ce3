# once_differentiable hides the names of backward's parameters.
# pyright: reportIncompatibleMethodOverride=false
"""Clustered gradients of linear layers: ``nn.Linear`` and the ``Conv1D`` of Transformers' GPT-2.

Shapes: B samples, T rows per sample, I inputs, O outputs, K clusters.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gq_triton.cluster_grad.session import Block, Session
from gq_triton.cluster_grad.step import Groups, Step
from gq_triton.ring import flat

__all__ = ["conv1d_forward", "linear_forward"]

# Output rows worked on at a time on the CPU, so that K sums of them stay in cache.
ROWS = 512


def samples(tensor: Tensor, groups: Groups, layer: str) -> Tensor:
    """Return ``(B, T, N)`` from rows ``(..., N)`` that lie sample after sample."""
    batch, rows = groups.labels.numel(), tensor.numel() // max(tensor.shape[-1], 1)
    if rows % batch:
        raise RuntimeError(
            f"{layer} saw {rows} rows for {batch} clustered samples: its first dimension must be "
            'the batch; use GradQueue(mode="microbatch") for this model'
        )
    return tensor.reshape(batch, rows // batch, tensor.shape[-1])


def accumulation_type(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which sums of this type are formed."""
    return torch.promote_types(dtype, torch.float32)


def product_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Write ``left.T @ right``, summed in float32 at least: ``(R, M), (R, N) -> (M, N)``."""
    if left.dtype == out.dtype:
        torch.mm(left.t(), right, out=out)
    elif left.is_cuda:
        out.copy_(torch.mm(left.t(), right, out_dtype=out.dtype))
    else:
        torch.mm(left.to(out.dtype).t(), right.to(out.dtype), out=out)


def weight_blocks(left: list[Tensor], right: list[Tensor], param: Tensor) -> Iterator[Block]:
    """Yield the sums of ``left_k.T @ right_k`` by cluster, some rows of the product at a time."""
    height, width = left[0].shape[1], right[0].shape[1]
    dtype = accumulation_type(left[0].dtype)
    step = height if left[0].is_cuda or not param.is_contiguous() else ROWS
    for row in range(0, height, step):
        end = min(row + step, height)
        sums = torch.empty(len(left), end - row, width, dtype=dtype, device=param.device)
        for out, a, b in zip(sums, left, right, strict=True):
            product_into(out, a[:, row:end], b)  # an empty cluster's product is zero
        if param.is_contiguous():
            yield row * width, end * width, sums.view(len(left), -1)
        else:
            yield 0, param.numel(), torch.stack([flat(s, like=param) for s in sums])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool,
        call: tuple[Session, Step, str],
    ) -> Tensor:  # fmt: skip
        ctx.call, ctx.transposed, ctx.params = call, transposed, (weight, bias)
        kernel = weight.t() if transposed else weight
        out = torch.nn.functional.linear(x, kernel, bias)
        # Under autocast the product was formed in a narrower type; keep what it saw.
        ctx.save_for_backward(x.to(out.dtype), weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        x, weight = ctx.saved_tensors
        param, bias = ctx.params
        session, step, layer = ctx.call
        kernel = weight.to(grad.dtype)
        kernel = kernel.t() if ctx.transposed else kernel
        grad_x = grad @ kernel if ctx.needs_input_grad[0] else None
        grad_w = grad_b = None
        groups = step.groups
        rows = samples(grad, groups, layer)
        if ctx.needs_input_grad[1]:
            dy = [r.flatten(0, 1) for r in groups.sorted(rows)]
            inputs = [r.flatten(0, 1) for r in groups.sorted(samples(x, groups, layer))]
            left, right = (inputs, dy) if ctx.transposed else (dy, inputs)
            blocks = weight_blocks(left, right, param)
            grad_w = session.give(step, param, blocks, accumulation_type(grad.dtype))
        if ctx.needs_input_grad[2]:
            per_sample = rows.sum(dim=1, dtype=accumulation_type(grad.dtype))
            blocks = iter([(0, bias.numel(), groups.sums(per_sample))])
            grad_b = session.give(step, bias, blocks, per_sample.dtype)
        return grad_x, grad_w, grad_b, None, None


def linear_forward(module: nn.Module, call: tuple[Session, Step, str], x: Tensor) -> Tensor:
    """``nn.Linear.forward`` with clustered gradients."""
    return _Linear.apply(x, module.weight, module.bias, False, call)  # pyright: ignore[reportReturnType]


def conv1d_forward(module: nn.Module, call: tuple[Session, Step, str], x: Tensor) -> Tensor:
    """``transformers.pytorch_utils.Conv1D.forward``: a linear layer with a transposed weight."""
    return _Linear.apply(x, module.weight, module.bias, True, call)  # pyright: ignore[reportReturnType]
