"""Clustered gradients of ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``.

Shapes: B samples, C channels, K clusters.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gq_triton.cluster_grad.compiled_ops import exact, param_grads, traced_whole
from gq_triton.cluster_grad.layers.rows import accumulation_type, check_rows, launches_cost
from gq_triton.cluster_grad.site import Block, Call, Family, Site
from gq_triton.cluster_grad.step import Step
from gq_triton.engines import engine
from gq_triton.ring import flat

__all__ = ["CONV", "convolved"]

_OPS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]


def _grads(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, mask: list[bool]
) -> tuple[Tensor | None, ...]:
    stride, padding, dilation, groups = geometry
    return torch.ops.aten.convolution_backward(
        grad, x, weight, [weight.shape[0]], stride, padding, dilation, False,
        [0] * len(stride), groups, mask,
    )  # fmt: skip


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, call: Call
    ) -> Tensor:
        ctx.call, ctx.geometry, ctx.params = call, geometry, (weight, bias)
        out = _OPS[weight.dim() - 2](x, weight, bias, *geometry)
        ctx.save_for_backward(x.to(out.dtype), weight)
        return out

    @staticmethod
    @exact
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        x, weight = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            kernel = weight.to(grad.dtype)
            grad_x = _grads(grad, x, kernel, ctx.geometry, [True, False, False])[0]
        return grad_x, *param_grads(ctx, grad, x), None, None


def _gradients(
    site: Site, step: Step, tensors: list[Tensor], wanted: list[int]
) -> list[Tensor | None]:
    """Give the sums of a convolution's weight and bias."""
    grad, x = tensors
    check_rows(x, step.groups, site.name)
    groups, result = step.groups.per_row(len(x)), []
    dtype = accumulation_type(grad.dtype)
    for position in wanted:
        param = site.param(position)
        if position == 0:
            total = site.scratch(len(groups.sizes), param.numel(), grad, dtype)
            # Where launches cost time, sorting once is worth a copy of all samples.
            parts = groups.sorted if launches_cost(grad) else groups.each
            pairs = zip(parts(grad), parts(x), strict=True)
            weight, geometry = param.detach().to(dtype), site.options or _geometry(site.module)
            for k, (dy, images) in enumerate(pairs):
                if len(dy):
                    wide = (dy.to(dtype), images.to(dtype), weight)
                    part = _grads(*wide, geometry, [False, True, False])[1]
                    assert part is not None
                    total[k] = flat(part, like=param)
                else:
                    total[k] = 0
        else:
            ops = engine(grad.device, site.collector.backend)
            images = grad.flatten(2)
            # In the memory format channels_last, positions come before channels.
            last = not images.is_contiguous() and images.mT.is_contiguous()
            sums = ops.position_sums if last else ops.channel_sums
            total = sums(images.mT if last else images, groups.order, groups.offsets)[0]
        blocks: Iterator[Block] = iter([(0, param.numel(), total)])
        result.append(site.give(step, position, blocks, dtype))
    return result


def _geometry(module: Any) -> Geometry:
    """Return stride, padding, dilation and groups; padding is 0 for an input padded before."""
    apart = _pads_apart(module)
    padding = (0,) * len(module.kernel_size) if apart else module.padding
    return module.stride, padding, module.dilation, module.groups


def _pads_apart(module: Any) -> bool:
    return module.padding_mode != "zeros" or isinstance(module.padding, str)


@traced_whole
def convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, call: Call
) -> Tensor:
    """Run a convolution with clustered gradients of its kernel and bias."""
    return _Conv.apply(x, weight, bias, geometry, call)  # pyright: ignore[reportReturnType]


def _forward(module: nn.Module, call: Call, x: Tensor) -> Tensor:
    """Run the ``forward`` of ``nn.Conv1d``, 2d or 3d with clustered gradients."""
    m: Any = module
    spatial = len(m.kernel_size)
    if x.dim() != spatial + 2:
        raise RuntimeError(
            f"{type(m).__name__} needs an input with a batch dimension to cluster its samples, got "
            f"shape {tuple(x.shape)}"
        )
    if _pads_apart(m):
        mode = "constant" if m.padding_mode == "zeros" else m.padding_mode
        x = F.pad(x, m._reversed_padding_repeated_twice, mode=mode)
    return convolved(x, m.weight, m.bias, _geometry(m), call)


CONV = Family(_forward, _gradients)
