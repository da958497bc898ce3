# once_differentiable hides the names of backward's parameters.
# pyright: reportIncompatibleMethodOverride=false
"""Clustered gradients of the scales and shifts of normalisation layers.

The gradient with respect to the input is torch's own. That with respect to the scale is the
output's gradient times the normalised input, summed per sample and then per cluster. Under
BatchNorm, whose samples depend on each other through the batch's statistics, a cluster's gradient
is that of its rows alone (the row-masked reading): the clusters still add up to the batch's
gradient.

Shapes: B samples, N scales, K clusters.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gq_triton.cluster_grad.linear import accumulation_type
from gq_triton.cluster_grad.session import Session
from gq_triton.cluster_grad.step import Step

__all__ = ["batch_norm_forward", "group_norm_forward", "layer_norm_forward", "rms_norm_forward"]

Call = tuple[Session, Step, str]


def _by_position(values: Tensor, batch: int, size: int) -> Tensor:
    """Sum ``(B, ..., *normalised)`` over what lies between: ``(B, N)``."""
    return values.reshape(batch, -1, size).sum(dim=1)


def _by_channel(values: Tensor, batch: int, size: int) -> Tensor:
    """Sum ``(B, C, ...)`` over positions: ``(B, C)``."""
    return values.reshape(batch, size, -1).sum(dim=2)


def _give(ctx: Any, grad: Tensor, normalised: Tensor, reduce: Any) -> list[Tensor | None]:
    """Return the weighted gradients of scale and shift."""
    session, step, layer = ctx.call
    groups, result = step.groups, []
    batch = groups.labels.numel()
    if len(grad) % batch:
        raise RuntimeError(
            f"{layer} saw a first dimension of {len(grad)} for {batch} clustered samples: it must "
            'be the batch; use GradQueue(mode="microbatch") for this model'
        )
    dtype = accumulation_type(grad.dtype)
    wide = grad.to(dtype)
    for position, param in enumerate(ctx.params):
        if param is None or not ctx.needs_input_grad[1 + position]:
            result.append(None)
            continue
        values = wide * normalised.to(dtype) if position == 0 else wide
        sums = groups.sums(reduce(values, batch, param.numel()))
        result.append(session.give(step, param, iter([(0, param.numel(), sums)]), dtype))
    return result


def _spread(values: Tensor, like: Tensor) -> Tensor:
    """Give per-channel values ``(C,)`` the dimensions of ``(B, C, ...)``."""
    return values.view(1, -1, *[1] * (like.dim() - 2))


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, call: Call
    ) -> Tensor:
        ctx.call, ctx.params = call, (weight, bias)
        out, mean, rstd = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        x, weight, bias, mean, rstd = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.aten.native_layer_norm_backward(
                grad, x, weight.shape, mean, rstd, weight, bias, [True, False, False]
            )[0]
        return grad_x, *_give(ctx, grad, (x - mean) * rstd, _by_position), None, None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, call: Call) -> Tensor:
        ctx.call, ctx.params = call, (weight,)
        dims = tuple(range(-weight.dim(), 0))
        wide = x.to(accumulation_type(x.dtype))
        rstd = (wide.square().mean(dims, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, rstd)
        return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        x, weight, rstd = ctx.saved_tensors
        dims = tuple(range(-weight.dim(), 0))
        normalised = x.to(rstd.dtype) * rstd
        grad_x = None
        if ctx.needs_input_grad[0]:
            inner = grad.to(rstd.dtype) * weight.to(rstd.dtype)
            mean = (inner * normalised).mean(dims, keepdim=True)
            grad_x = (rstd * (inner - normalised * mean)).to(x.dtype)
        return grad_x, *_give(ctx, grad, normalised, _by_position), None, None


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, call: Call
    ) -> Tensor:
        ctx.call, ctx.params, ctx.groups = call, (weight, bias), groups
        size = len(x), x.shape[1], x[0, 0].numel()
        x = x.contiguous()
        out, mean, rstd = torch.native_group_norm(x, weight, bias, *size, groups, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        x, weight, mean, rstd = ctx.saved_tensors
        size = len(x), x.shape[1], x[0, 0].numel()
        grad, grad_x = grad.contiguous(), None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.aten.native_group_norm_backward(
                grad, x, mean, rstd, weight, *size, ctx.groups, [True, False, False]
            )[0]
        grouped = x.reshape(len(x), ctx.groups, -1)
        normalised = ((grouped - mean[..., None]) * rstd[..., None]).reshape(x.shape)
        return grad_x, *_give(ctx, grad, normalised, _by_channel), None, None, None


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor,
        running: tuple[Tensor | None, Tensor | None, bool, float, float], call: Call,
    ) -> Tensor:  # fmt: skip
        mean, var, training, momentum, eps = running
        ctx.call, ctx.params = call, (weight, bias)
        ctx.training, ctx.eps = training, eps
        out, saved_mean, saved_rstd = torch.native_batch_norm(
            x, weight, bias, mean, var, training, momentum, eps
        )
        if not training:
            assert mean is not None
            assert var is not None
            # Buffers may move on before the backward pass.
            mean, var = mean.clone(), var.clone()
        ctx.save_for_backward(x, weight, mean, var, saved_mean, saved_rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        x, weight, mean, var, saved_mean, saved_rstd = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.aten.native_batch_norm_backward(
                grad, x, weight, mean, var, saved_mean, saved_rstd, ctx.training, ctx.eps,
                [True, False, False],
            )[0]  # fmt: skip
        if not ctx.training:
            saved_mean, saved_rstd = mean, (var + ctx.eps).rsqrt()
        normalised = (x - _spread(saved_mean, x)) * _spread(saved_rstd, x)
        return grad_x, *_give(ctx, grad, normalised, _by_channel), None, None


def layer_norm_forward(module: nn.Module, call: Call, x: Tensor) -> Tensor:
    """``nn.LayerNorm.forward`` with clustered gradients."""
    m: Any = module
    return _LayerNorm.apply(x, m.weight, m.bias, m.eps, call)  # pyright: ignore[reportReturnType]


def rms_norm_forward(module: nn.Module, call: Call, x: Tensor) -> Tensor:
    """``nn.RMSNorm.forward`` with clustered gradients."""
    m: Any = module
    eps = torch.finfo(x.dtype).eps if m.eps is None else m.eps
    return _RMSNorm.apply(x, m.weight, eps, call)  # pyright: ignore[reportReturnType]


def group_norm_forward(module: nn.Module, call: Call, x: Tensor) -> Tensor:
    """``nn.GroupNorm.forward`` with clustered gradients."""
    m: Any = module
    return _GroupNorm.apply(x, m.weight, m.bias, m.num_groups, m.eps, call)  # pyright: ignore[reportReturnType]


def batch_norm_forward(module: nn.Module, call: Call, x: Tensor) -> Tensor:
    """``nn.BatchNorm.forward`` with clustered gradients."""
    m: Any = module
    m._check_input_dim(x)
    momentum = 0.0 if m.momentum is None else m.momentum
    if m.training and m.track_running_stats and m.num_batches_tracked is not None:
        m.num_batches_tracked.add_(1)
        if m.momentum is None:
            momentum = 1.0 / float(m.num_batches_tracked)
    training = m.training or (m.running_mean is None and m.running_var is None)
    tracked = not m.training or m.track_running_stats
    mean, var = (m.running_mean, m.running_var) if tracked else (None, None)
    running = (mean, var, training, momentum, m.eps)
    return _BatchNorm.apply(x, m.weight, m.bias, running, call)  # pyright: ignore[reportReturnType]
