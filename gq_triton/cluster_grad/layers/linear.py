"""Clustered gradients of linear layers: ``nn.Linear`` and the ``Conv1D`` of Transformers' GPT-2.

Shapes: B samples, T rows per sample, I inputs, O outputs, K clusters.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gq_triton.cluster_grad.compiled_ops import exact, param_grads, traced_whole, unhooked
from gq_triton.cluster_grad.forming import Sums, engine_of
from gq_triton.cluster_grad.layers.rows import (
    accumulation_type,
    launches_cost,
    memory_of_sums,
    rounds_to_tf32,
    samples,
)
from gq_triton.cluster_grad.site import Block, Call, Family, Site
from gq_triton.cluster_grad.step import Step
from gq_triton.engines.eager.weight_grad import product_into
from gq_triton.grouping.groups import Groups
from gq_triton.ring import flat

__all__ = ["CONV1D", "LINEAR", "linear"]

# Bytes of sums formed at a time on the CPU; more would leave the cache before they are weighted.
ROOM = 1 << 24


def weight_blocks(
    groups: Groups,
    left: Tensor,
    right: Tensor,
    param: Tensor,
    scratch: Callable[[int, int, Tensor, torch.dtype], Tensor],
) -> Iterator[Block]:
    """Yield the sums of ``left.T @ right`` by cluster, some rows of the product at a time: the CPU.

    Args:
        groups: the clusters.
        left: ``(B, T, M)``.
        right: ``(B, T, N)``.
        param: the parameter ``(M, N)``; the blocks are in its memory order.
        scratch: returns memory for K sums, as ``Collector.scratch`` does.
    """
    height, width, clusters = left.shape[2], right.shape[2], groups.n_clusters
    dtype = accumulation_type(left.dtype)
    step = max(1, ROOM // max(1, clusters * width * dtype.itemsize))
    if step >= height or not param.is_contiguous():
        sums = scratch(clusters, height * width, param, dtype)
        products = sums.view(clusters, height, width)
        for out, a, b in zip(products, groups.each(left), groups.each(right), strict=True):
            product_into(out, a.flatten(0, 1), b.flatten(0, 1))
        if not param.is_contiguous():
            sums = torch.stack([flat(s, like=param) for s in products])
        yield 0, param.numel(), sums
        return
    inputs = [rows.flatten(0, 1) for rows in groups.sorted(right)]
    for row in range(0, height, step):
        end = min(row + step, height)
        sums = scratch(clusters, (end - row) * width, param, dtype)
        products = sums.view(clusters, end - row, width)
        outputs = groups.sorted(left[:, :, row:end])
        for out, a, b in zip(products, outputs, inputs, strict=True):
            product_into(out, a.flatten(0, 1), b)
        yield row * width, end * width, sums


def _weight_sums(site: Site, groups: Groups, left: Tensor, right: Tensor, param: Tensor) -> Tensor:
    """Return the sums of ``left.T @ right`` by cluster, formed where each launch costs time."""
    out = memory_of_sums(groups.n_clusters, param, accumulation_type(left.dtype), left.device)
    ops, tf32 = engine_of(left.device, site.collector.backend), rounds_to_tf32("matmul")
    ops.product_sums(left, right, groups.order, groups.offsets, out, tf32=tf32)
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, call: Call
    ) -> Tensor:
        ctx.call, ctx.transposed, ctx.params = call, transposed, (weight, bias)
        kernel = weight.t() if transposed else weight
        out = torch.nn.functional.linear(x, kernel, bias)
        if out._is_view():
            # F.linear returns a view for (B, T, N) with a bias. A view that an autograd function
            # returns cannot be changed in place.
            out = torch.ops.aten._unsafe_view(out, out.shape)
        # Under autocast the product is formed in a narrower type: keep the input in that type.
        ctx.save_for_backward(x if x.dtype == out.dtype else x.to(out.dtype), unhooked(weight))
        return out

    @staticmethod
    @exact
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        x, weight = ctx.saved_tensors
        kernel = weight if weight.dtype == grad.dtype else weight.to(grad.dtype)
        kernel = kernel.t() if ctx.transposed else kernel
        grad_x = grad @ kernel if ctx.needs_input_grad[0] else None
        return grad_x, *param_grads(ctx, grad, x), None, None


def _gradients(
    transposed: bool, site: Site, step: Step, tensors: list[Tensor], wanted: list[int]
) -> list[Tensor | None]:
    grad, x = tensors
    groups, result = step.groups, []
    rows = samples(grad, groups, site.name)
    dtype = accumulation_type(grad.dtype)
    for position in wanted:
        param = site.param(position)
        if position == 0:
            inputs = samples(x, groups, site.name)
            left, right = (inputs, rows) if transposed else (rows, inputs)
            if launches_cost(left):
                whole = _weight_sums(site, groups, left, right, param)
                result.append(site.give_whole(step, position, whole))
            else:
                blocks = weight_blocks(groups, left, right, param, site.scratch)
                result.append(site.give(step, position, blocks, dtype))
        else:
            sums = Sums(site.collector.backend, rows, groups.order, groups.offsets)
            result.append(site.give_sums(step, position, sums, False))
    return result


@traced_whole
def linear(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, call: Call) -> Tensor:
    """Run a linear layer with clustered gradients of its weight and bias."""
    return _Linear.apply(x, weight, bias, transposed, call)  # pyright: ignore[reportReturnType]


def _linear_forward(module: nn.Module, call: Call, x: Tensor) -> Tensor:
    """Run ``nn.Linear.forward`` with clustered gradients."""
    m: Any = module
    return linear(x, m.weight, m.bias, False, call)


def _conv1d_forward(module: nn.Module, call: Call, x: Tensor) -> Tensor:
    """Run the forward pass of Transformers' ``Conv1D``, a linear layer with a transposed weight."""
    m: Any = module
    return linear(x, m.weight, m.bias, True, call)


LINEAR = Family(_linear_forward, partial(_gradients, False))
CONV1D = Family(_conv1d_forward, partial(_gradients, True))
