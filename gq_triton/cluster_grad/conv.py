# once_differentiable hides the names of backward's parameters.
# pyright: reportIncompatibleMethodOverride=false
"""Clustered gradients of ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``.

Shapes: B samples, C channels, K clusters.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gq_triton.cluster_grad.linear import accumulation_type
from gq_triton.cluster_grad.session import Block, Session
from gq_triton.cluster_grad.step import Step
from gq_triton.ring import flat

__all__ = ["conv_forward"]

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
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry,
        call: tuple[Session, Step, str],
    ) -> Tensor:  # fmt: skip
        ctx.call, ctx.geometry, ctx.params = call, geometry, (weight, bias)
        out = _OPS[weight.dim() - 2](x, weight, bias, *geometry)
        ctx.save_for_backward(x.to(out.dtype), weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        x, weight = ctx.saved_tensors
        param, bias = ctx.params
        session, step, layer = ctx.call
        groups = step.groups
        if len(x) != groups.labels.numel():
            raise RuntimeError(
                f"{layer} saw {len(x)} samples, {groups.labels.numel()} were clustered: its first "
                'dimension must be the batch; use GradQueue(mode="microbatch") for this model'
            )
        kernel = weight.to(grad.dtype)
        grad_x = grad_w = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = _grads(grad, x, kernel, ctx.geometry, [True, False, False])[0]
        dtype = accumulation_type(grad.dtype)
        if ctx.needs_input_grad[1]:
            total = torch.zeros(len(groups.sizes), param.numel(), dtype=dtype, device=grad.device)
            pairs = zip(groups.sorted(grad), groups.sorted(x), strict=True)
            for k, (dy, images) in enumerate(pairs):
                if len(dy):
                    wide = (dy.to(dtype), images.to(dtype), weight.to(dtype))
                    part = _grads(*wide, ctx.geometry, [False, True, False])[1]
                    assert part is not None
                    total[k] = flat(part, like=param)
            blocks: Iterator[Block] = iter([(0, param.numel(), total)])
            grad_w = session.give(step, param, blocks, dtype)
        if ctx.needs_input_grad[2]:
            per_sample = grad.flatten(2).sum(dim=2, dtype=dtype)
            blocks = iter([(0, bias.numel(), groups.sums(per_sample))])
            grad_b = session.give(step, bias, blocks, dtype)
        return grad_x, grad_w, grad_b, None, None


def conv_forward(module: nn.Module, call: tuple[Session, Step, str], x: Tensor) -> Tensor:
    """``nn.ConvNd.forward`` with clustered gradients."""
    m: Any = module
    spatial = len(m.kernel_size)
    if x.dim() != spatial + 2:
        raise RuntimeError(f"{call[2]} needs a batch dimension, got {tuple(x.shape)}")
    padding = m.padding
    if m.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if m.padding_mode == "zeros" else m.padding_mode
        x = F.pad(x, m._reversed_padding_repeated_twice, mode=mode)
        padding = (0,) * spatial
    geometry = (m.stride, padding, m.dilation, m.groups)
    return _Conv.apply(x, m.weight, m.bias, geometry, call)  # pyright: ignore[reportReturnType]
