"""Clustered gradients of convolutions in one, two and three dimensions, transposed ones too.

Shapes: B samples, C channels, K clusters.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gq_triton.cluster_grad.compiled_ops import exact, param_grads, traced_whole, unhooked
from gq_triton.cluster_grad.forming import Sums, engine_of
from gq_triton.cluster_grad.layers.rows import (
    accumulation_type,
    check_rows,
    launches_cost,
    memory_of_sums,
    rounds_to_tf32,
)
from gq_triton.cluster_grad.site import Block, Call, Family, Site
from gq_triton.cluster_grad.step import Step
from gq_triton.grouping.groups import Groups
from gq_triton.ring import flat

__all__ = ["CONV", "TRANSPOSED", "Geometry", "convolved"]

_OPS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class Geometry(NamedTuple):
    """How a kernel is moved over its input: the arguments of torch's convolutions.

    Attributes:
        stride: by spatial dimension, as ``padding``, ``dilation`` and ``output_padding``.
        padding: zeros added on both sides.
        dilation: distances within the kernel.
        groups: groups of channels.
        output_padding: what a transposed convolution adds to one side of its output; None for an
            ordinary convolution.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    output_padding: tuple[int, ...] | None = None


def _grads(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, mask: list[bool]
) -> tuple[Tensor | None, ...]:
    stride, padding, dilation, groups, added = geometry
    transposed = added is not None
    return torch.ops.aten.convolution_backward(
        grad, x, weight, [grad.shape[1]], stride, padding, dilation, transposed,
        added if added is not None else [0] * len(stride), groups, mask,
    )  # fmt: skip


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, call: Call
    ) -> Tensor:
        ctx.call, ctx.geometry, ctx.params = call, geometry, (weight, bias)
        stride, padding, dilation, groups, added = geometry
        spatial = weight.dim() - 2
        if added is None:
            out = _OPS[spatial](x, weight, bias, stride, padding, dilation, groups)
        else:
            turned = stride, padding, added, groups, dilation
            out = _TRANSPOSED[spatial](x, weight, bias, *turned)
        ctx.save_for_backward(x.to(out.dtype), unhooked(weight))
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
    geometry_of: Callable[[Any], Geometry],
    site: Site,
    step: Step,
    tensors: list[Tensor],
    wanted: list[int],
) -> list[Tensor | None]:
    """Give the sums of a convolution's weight and bias."""
    grad, x = tensors
    check_rows(x, step.groups, site.name)
    groups, result = step.groups.per_row(len(x)), []
    dtype = accumulation_type(grad.dtype)
    for position in wanted:
        param = site.param(position)
        if position == 0:
            geometry = site.options or geometry_of(site.module)
            if launches_cost(grad):
                whole = _sums_at_once(site, groups, grad, x, geometry, param)
                result.append(site.give_whole(step, position, whole))
                continue
            total = _sums_in_turn(site, groups, grad, x, geometry)
            blocks: Iterator[Block] = iter([(0, param.numel(), total)])
            result.append(site.give(step, position, blocks, dtype))
        else:
            images = grad if grad.is_contiguous() else grad.flatten(2)
            # In the memory format channels_last, positions come before channels.
            last = not images.is_contiguous() and images.mT.is_contiguous()
            sums = Sums(
                site.collector.backend, images.mT if last else images, groups.order,
                groups.offsets, images=not last,
            )  # fmt: skip
            result.append(site.give_sums(step, position, sums, False))
    return result


def _sums_in_turn(
    site: Site, groups: Groups, grad: Tensor, x: Tensor, geometry: Geometry
) -> Tensor:
    """Return the sums of a kernel by cluster, in its memory order, from one cluster at a time."""
    param, dtype = site.param(0), accumulation_type(grad.dtype)
    total = site.scratch(groups.n_clusters, param.numel(), grad, dtype)
    weight = param.detach().to(dtype)
    geometry = _with_added(geometry, x, grad, weight)
    for k, (dy, images) in enumerate(zip(groups.each(grad), groups.each(x), strict=True)):
        if len(dy):
            wide = (dy.to(dtype), images.to(dtype), weight)
            part = _grads(*wide, geometry, [False, True, False])[1]
            assert part is not None
            total[k] = flat(part, like=param)
        else:
            total[k] = 0
    return total


def _sums_at_once(
    site: Site, groups: Groups, grad: Tensor, x: Tensor, geometry: Geometry, param: Tensor
) -> Tensor:
    """Return the sums ``(K, *param.shape)``, formed where each launch costs time."""
    total = memory_of_sums(groups.n_clusters, param, accumulation_type(grad.dtype), grad.device)
    # A transposed convolution leads from the output of an ordinary one to its input.
    pair = (grad, x) if geometry.output_padding is None else (x, grad)
    ops = engine_of(grad.device, site.collector.backend)
    ops.convolution_sums(
        *pair, groups.order, groups.offsets, total, stride=geometry.stride,
        padding=geometry.padding, dilation=geometry.dilation, groups=geometry.groups,
        tf32=rounds_to_tf32("conv"),
    )  # fmt: skip
    return total


def _geometry(module: Any) -> Geometry:
    """Return stride, padding, dilation and groups; padding is 0 for an input padded before."""
    apart = _pads_apart(module)
    padding = (0,) * len(module.kernel_size) if apart else module.padding
    return Geometry(module.stride, padding, module.dilation, module.groups)


def _with_added(geometry: Geometry, x: Tensor, grad: Tensor, weight: Tensor) -> Geometry:
    """Return the geometry of a call whose output may have had a size of its own."""
    if geometry.output_padding is None:
        return geometry
    moved = geometry.stride, geometry.padding, geometry.dilation
    sizes = zip(x.shape[2:], grad.shape[2:], weight.shape[2:], *moved, strict=True)
    added = [
        out - ((size - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1)
        for size, out, kernel, stride, padding, dilation in sizes
    ]
    return geometry._replace(output_padding=tuple(added))


def _transposed_geometry(module: Any) -> Geometry:
    sides = module.stride, module.padding, module.dilation, module.groups, module.output_padding
    return Geometry(*sides)


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
    if x.dim() != spatial + 2:  # one image: it belongs to no sample
        return type(m).forward(m, x)
    if _pads_apart(m):
        mode = "constant" if m.padding_mode == "zeros" else m.padding_mode
        x = F.pad(x, m._reversed_padding_repeated_twice, mode=mode)
    return convolved(x, m.weight, m.bias, _geometry(m), call)


def _transposed_forward(
    module: nn.Module, call: Call, x: Tensor, output_size: list[int] | None = None
) -> Tensor:
    """Run the ``forward`` of ``nn.ConvTranspose1d``, 2d or 3d with clustered gradients."""
    m: Any = module
    if x.dim() != len(m.kernel_size) + 2:
        return type(m).forward(m, x, output_size)
    added = m._output_padding(
        x, output_size, m.stride, m.padding, m.kernel_size, len(m.kernel_size), m.dilation
    )
    geometry = _transposed_geometry(m)._replace(output_padding=tuple(added))
    return convolved(x, m.weight, m.bias, geometry, call)


CONV = Family(_forward, partial(_gradients, _geometry))
TRANSPOSED = Family(_transposed_forward, partial(_gradients, _transposed_geometry))
