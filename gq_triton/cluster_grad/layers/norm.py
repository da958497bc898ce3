"""Clustered gradients of the scales and shifts of normalisation layers.

The gradient with respect to the input is torch's own. The gradient with respect to the scale is the
output's gradient times the normalised input, summed per sample and then per cluster. The samples of
a BatchNorm depend on each other through the batch's statistics. There a cluster's gradient is the
sum over its own rows only (the row-masked reading), so the clusters' sums still add up to the
batch's gradient.

Shapes: B samples, N scales, K clusters.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from gq_triton.cluster_grad.compiled_ops import exact, param_grads, traced_whole, unhooked
from gq_triton.cluster_grad.forming import Sums
from gq_triton.cluster_grad.layers.rows import accumulation_type, check_rows
from gq_triton.cluster_grad.site import Call, Family, Site
from gq_triton.cluster_grad.step import Step

__all__ = ["BATCH_NORM", "GROUP_NORM", "LAYER_NORM", "RMS_NORM"]


# Running mean and variance, whether the batch's own statistics are used, momentum, epsilon.
Running = tuple[Tensor | None, Tensor | None, bool, float, float]


def _given(site: Site, step: Step, wanted: list[int], sums: Sums) -> list[Tensor | None]:
    """Give the sums of scale (0) and shift (1)."""
    return [site.give_sums(step, position, sums, position == 0) for position in wanted]


def _by_position(
    site: Site, step: Step, wanted: list[int], grad: Tensor, x: Tensor, **statistics: Tensor
) -> list[Tensor | None]:
    """Give the sums of scale (0) and shift (1).

    Args:
        site: the layer.
        step: the forward pass.
        wanted: which of the two.
        grad: ``(B, ..., *normalised)``, or rows ``(B T, *normalised)`` in order of samples.
        x: the layer's input, in the same shape.
        statistics: ``rstd`` of each row of x and, except for RMSNorm, its ``mean``.
    """
    groups = step.groups
    check_rows(grad, groups, site.name)
    batch, columns = groups.labels.numel(), site.param(0).numel()
    if grad.dim() != 3 or grad.shape[::2] != (batch, columns):
        grad, x = (t.reshape(batch, -1, columns) for t in (grad, x))
    known = {name: _wide(value) for name, value in statistics.items()}
    sums = Sums(
        site.collector.backend, grad, groups.order, groups.offsets, x=x, mean=known.get("mean"),
        rstd=known["rstd"],
    )  # fmt: skip
    return _given(site, step, wanted, sums)


def _by_channel(
    site: Site, step: Step, wanted: list[int], grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor
) -> list[Tensor | None]:
    """Give the sums of scale (0) and shift (1).

    Args:
        site: the layer.
        step: the forward pass.
        wanted: which of the two.
        grad: ``(B, N, *)``.
        x: the layer's input, in the same shape.
        mean: ``(B, G)``, or ``(G,)`` for all samples.
        rstd: likewise.
    """
    groups = step.groups
    check_rows(grad, groups, site.name)
    # In two dimensions a sample may have several rows, each with its own statistics.
    order = groups.rows(len(grad) // groups.labels.numel())
    known = {"x": x, "mean": _wide(mean), "rstd": _wide(rstd)}
    sums = Sums(site.collector.backend, grad, *order, images=True, **known)
    return _given(site, step, wanted, sums)


def _wide(statistic: Tensor) -> Tensor:
    wide = accumulation_type(statistic.dtype)
    # Those of an input whose dimensions lie in another order have that order.
    return (statistic if statistic.dtype == wide else statistic.to(wide)).contiguous()


def _as_autocast(tensor: Tensor) -> Tensor:
    """Return a tensor in the type that autocast gives ``group_norm``: float32, except on the CPU.

    Autocast converts the inputs of ``layer_norm`` and ``rms_norm`` itself. It does not know
    ``native_group_norm``, the function that also returns mean and deviation.
    """
    device = tensor.device.type
    on = device != "cpu" and torch.is_autocast_enabled(device)
    return tensor.to(accumulation_type(tensor.dtype)) if on else tensor


def _widened(tensor: Tensor, grad: Tensor) -> Tensor:
    """Return a saved tensor in the type that autocast gave it, which is that of ``grad``.

    Tensors are saved in the type they came in, which takes less memory.
    """
    if tensor.dtype == grad.dtype:
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, grad.dtype))


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, call: Call
    ) -> Tensor:
        ctx.call, ctx.params = call, (weight, bias)
        out, mean, rstd = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
        ctx.save_for_backward(x, unhooked(weight), unhooked(bias), mean, rstd)
        return out

    @staticmethod
    @exact
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        x, weight, bias, mean, rstd = ctx.saved_tensors
        x, weight, grad_x = _widened(x, grad), _widened(weight, grad), None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.aten.native_layer_norm_backward(
                grad, x, weight.shape, mean, rstd, weight,
                None if bias is None else _widened(bias, grad), [True, False, False],
            )[0]  # fmt: skip
        return grad_x, *param_grads(ctx, grad, x, mean, rstd), None, None


def _layer_norm_gradients(
    site: Site, step: Step, tensors: list[Tensor], wanted: list[int]
) -> list[Tensor | None]:
    """Give the sums of scale and shift."""
    grad, x, mean, rstd = tensors
    return _by_position(site, step, wanted, grad, x, mean=mean, rstd=rstd)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float | None, call: Call) -> Tensor:
        ctx.call, ctx.params, given = call, (weight,), eps
        dims = tuple(range(-weight.dim(), 0))
        wide = x.to(accumulation_type(x.dtype))
        eps = torch.finfo(wide.dtype).eps if eps is None else eps  # as torch's own
        rstd = (wide.square().mean(dims, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, unhooked(weight), rstd)
        return torch.nn.functional.rms_norm(x, weight.shape, weight, given)

    @staticmethod
    @exact
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        x, weight, rstd = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            dims = tuple(range(-weight.dim(), 0))
            normalised = x.to(rstd.dtype) * rstd
            inner = grad.to(rstd.dtype) * weight.to(rstd.dtype)
            mean = (inner * normalised).mean(dims, keepdim=True)
            grad_x = (rstd * (inner - normalised * mean)).to(x.dtype)
        return grad_x, *param_grads(ctx, grad, x, rstd), None, None


def _rms_norm_gradients(
    site: Site, step: Step, tensors: list[Tensor], wanted: list[int]
) -> list[Tensor | None]:
    """Give the sums of the scale."""
    grad, x, rstd = tensors
    return _by_position(site, step, wanted, grad, x, rstd=rstd)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, eps: float,
        call: Call,
    ) -> Tensor:  # fmt: skip
        ctx.call, ctx.params, ctx.groups = call, (weight, bias), groups
        size = len(x), x.shape[1], math.prod(x.shape[2:])
        x = x.contiguous()
        shift = None if bias is None else _as_autocast(bias)
        out, mean, rstd = torch.native_group_norm(
            _as_autocast(x), _as_autocast(weight), shift, *size, groups, eps
        )
        ctx.save_for_backward(x, unhooked(weight), mean, rstd)
        return out

    @staticmethod
    @exact
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        x, weight, mean, rstd = ctx.saved_tensors
        x, weight = _widened(x, grad), _widened(weight, grad)
        size = len(x), x.shape[1], math.prod(x.shape[2:])
        grad, grad_x = grad.contiguous(), None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.aten.native_group_norm_backward(
                grad, x, mean, rstd, weight, *size, ctx.groups, [True, False, False]
            )[0]
        return grad_x, *param_grads(ctx, grad, x, mean, rstd), None, None, None


def _group_norm_gradients(
    site: Site, step: Step, tensors: list[Tensor], wanted: list[int]
) -> list[Tensor | None]:
    """Give the sums of scale and shift."""
    grad, x, mean, rstd = tensors
    return _by_channel(site, step, wanted, grad, x, mean, rstd)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor,
        running: Running, call: Call,
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
            # The running statistics may change before the backward pass.
            mean, var = mean.clone(), var.clone()
        ctx.save_for_backward(x, unhooked(weight), mean, var, saved_mean, saved_rstd)
        return out

    @staticmethod
    @exact
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
        return grad_x, *param_grads(ctx, grad, x, saved_mean, saved_rstd), None, None


def _batch_norm_gradients(
    site: Site, step: Step, tensors: list[Tensor], wanted: list[int]
) -> list[Tensor | None]:
    """Give the sums of scale and shift."""
    grad, x, mean, rstd = tensors
    return _by_channel(site, step, wanted, grad, x, mean, rstd)


@traced_whole
def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, call: Call) -> Tensor:
    return _LayerNorm.apply(x, weight, bias, eps, call)  # pyright: ignore[reportReturnType]


@traced_whole
def _rms_norm(x: Tensor, weight: Tensor, eps: float | None, call: Call) -> Tensor:
    return _RMSNorm.apply(x, weight, eps, call)  # pyright: ignore[reportReturnType]


@traced_whole
def _group_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, eps: float, call: Call
) -> Tensor:
    return _GroupNorm.apply(x, weight, bias, groups, eps, call)  # pyright: ignore[reportReturnType]


@traced_whole
def _batch_norm(x: Tensor, weight: Tensor, bias: Tensor, running: Running, call: Call) -> Tensor:
    return _BatchNorm.apply(x, weight, bias, running, call)  # pyright: ignore[reportReturnType]


def _layer_norm_forward(module: nn.Module, call: Call, x: Tensor) -> Tensor:
    """Run ``nn.LayerNorm.forward`` with clustered gradients."""
    m: Any = module
    return _layer_norm(x, m.weight, m.bias, m.eps, call)


def _rms_norm_forward(module: nn.Module, call: Call, x: Tensor) -> Tensor:
    """Run ``nn.RMSNorm.forward`` with clustered gradients."""
    m: Any = module
    return _rms_norm(x, m.weight, m.eps, call)


def _group_norm_forward(module: nn.Module, call: Call, x: Tensor) -> Tensor:
    """Run ``nn.GroupNorm.forward`` with clustered gradients."""
    m: Any = module
    return _group_norm(x, m.weight, m.bias, m.num_groups, m.eps, call)


def _batch_norm_forward(module: nn.Module, call: Call, x: Tensor) -> Tensor:
    """Run the ``forward`` of ``nn.BatchNorm1d``, 2d or 3d with clustered gradients."""
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
    return _batch_norm(x, m.weight, m.bias, (mean, var, training, momentum, m.eps), call)


LAYER_NORM = Family(_layer_norm_forward, _layer_norm_gradients)
RMS_NORM = Family(_rms_norm_forward, _rms_norm_gradients)
GROUP_NORM = Family(_group_norm_forward, _group_norm_gradients)
BATCH_NORM = Family(_batch_norm_forward, _batch_norm_gradients)
