"""Clustered gradients of linear layers: ``nn.Linear`` and the ``Conv1D`` of Transformers' GPT-2.

Shapes: B samples, T rows per sample, I inputs, O outputs, K clusters.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gq_triton.cluster_grad.compiled_ops import exact, param_grads, traced_whole, unhooked
from gq_triton.cluster_grad.layers.rows import accumulation_type, launches_cost, samples
from gq_triton.cluster_grad.site import Block, Call, Family, Site
from gq_triton.cluster_grad.step import Step
from gq_triton.engines import engine
from gq_triton.grouping.groups import Groups
from gq_triton.ring import flat

__all__ = ["CONV1D", "LINEAR", "linear"]

# Bytes of sums formed at a time on the CPU; more would leave the cache before they are weighted.
ROOM = 1 << 24
# Operations and bytes of a GPU per second, estimated low; seconds that a launch costs the host.
OPERATIONS, BYTES, LAUNCH = 2e13, 1e12, 2e-5


def product_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Write ``left.T @ right``, summed in float32 at least, to ``out``.

    Args:
        out: ``(M, N)``, or ``(K, M, N)`` for K products.
        left: ``(R, M)``, or ``(K, R, M)``.
        right: ``(R, N)``, or ``(K, R, N)``.
    """
    multiply = torch.mm if out.dim() == 2 else torch.bmm
    if left.dtype == out.dtype:
        multiply(left.mT, right, out=out)
    elif left.device.type != "cpu":
        multiply(left.mT, right, out_dtype=out.dtype, out=out)
    else:
        multiply(left.to(out.dtype).mT, right.to(out.dtype), out=out)


def pays_padding(groups: Groups, left: Tensor, right: Tensor) -> bool:
    """Return whether one batched product, all clusters padded to the largest, is the cheaper way.

    It takes four launches and wastes the work on the padding. The other way, one product per
    cluster, takes two launches and one for each cluster.
    """
    clusters, (batch, positions, height), width = groups.n_clusters, left.shape, right.shape[2]
    added = (clusters * max(groups.sizes) - batch) * positions
    moved = added * (height + width) * 2 * left.element_size()
    work = 2 * added * height * width / OPERATIONS + moved / BYTES
    return work < (clusters - 2) * LAUNCH


def products_of_all(groups: Groups, left: Tensor, right: Tensor, products: Tensor) -> None:
    """Write ``left.T @ right`` of each cluster, ``(K, M, N)``, with few launches."""
    if pays_padding(groups, left, right):
        # Zeros in one factor suffice. Zero times a repeated sample that is not finite is NaN, but
        # then the sum over all samples is not finite either.
        a, b = groups.blank_(groups.padded(left)), groups.padded(right)
        product_into(products, a.flatten(1, 2), b.flatten(1, 2))
        return
    for out, a, b in zip(products, groups.sorted(left), groups.sorted(right), strict=True):
        product_into(out, a.flatten(0, 1), b.flatten(0, 1))  # zero for an empty cluster


def weight_blocks(
    groups: Groups,
    left: Tensor,
    right: Tensor,
    param: Tensor,
    scratch: Callable[[int, int, Tensor, torch.dtype], Tensor],
) -> Iterator[Block]:
    """Yield the sums of ``left.T @ right`` by cluster, some rows of the product at a time.

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
    few = launches_cost(left)
    if few or step >= height or not param.is_contiguous():
        sums = scratch(clusters, height * width, param, dtype)
        products = sums.view(clusters, height, width)
        if few:
            products_of_all(groups, left, right, products)
        else:
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
        ctx.save_for_backward(x.to(out.dtype), unhooked(weight))
        return out

    @staticmethod
    @exact
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        x, weight = ctx.saved_tensors
        kernel = weight.to(grad.dtype)
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
            blocks = weight_blocks(groups, left, right, param, site.scratch)
        else:
            ops = engine(rows.device, site.collector.backend)
            sums = ops.position_sums(rows, groups.order, groups.offsets)[0]
            blocks = iter([(0, param.numel(), sums)])
        result.append(site.give(step, position, blocks, dtype))
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
