# once_differentiable hides the names of backward's parameters.
# pyright: reportIncompatibleMethodOverride=false
"""Clustered gradients of ``nn.Embedding``: only the rows that were looked up are touched.

Shapes: B samples, T lookups per sample, V rows, d columns, U touched rows, K clusters.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gq_triton.cluster_grad.linear import accumulation_type, samples
from gq_triton.cluster_grad.session import Session
from gq_triton.cluster_grad.step import Step
from gq_triton.ring import flat

__all__ = ["embedding_forward"]


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, indices: Tensor, weight: Tensor, padding_idx: int | None,
        call: tuple[Session, Step, str],
    ) -> Tensor:  # fmt: skip
        ctx.call, ctx.padding_idx, ctx.param = call, padding_idx, weight
        ctx.save_for_backward(indices)
        return F.embedding(indices, weight, padding_idx)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        (indices,) = ctx.saved_tensors
        session, step, layer = ctx.call
        param, groups = ctx.param, step.groups
        rows = samples(grad, groups, layer)
        looked = indices.reshape(len(rows), -1)
        touched, where = looked.unique(return_inverse=True)
        dtype = accumulation_type(grad.dtype)
        sums = torch.zeros(len(groups.sizes), len(touched), rows.shape[2], dtype=dtype).to(grad)
        sums = sums.to(dtype)
        pairs = zip(groups.sorted(rows), groups.sorted(where), strict=True)
        for k, (dy, row) in enumerate(pairs):
            sums[k].index_add_(0, row.flatten(), dy.flatten(0, 1).to(dtype))
        if ctx.padding_idx is not None:
            sums[:, touched == ctx.padding_idx] = 0
        flattened = sums.flatten(1)
        if step.uses.get(session.names[param], 1) == 1 and param.is_contiguous():
            return None, session.combine_rows(step, param, touched, flattened), None, None
        # A tied table: the other use's gradient is dense, so this one's becomes dense too.
        dense = torch.zeros(len(groups.sizes), *param.shape, dtype=dtype, device=grad.device)
        dense[:, touched] = sums
        blocks = iter([(0, param.numel(), torch.stack([flat(s, like=param) for s in dense]))])
        return None, session.give(step, param, blocks, dtype), None, None


def embedding_forward(module: nn.Module, call: tuple[Session, Step, str], x: Tensor) -> Tensor:
    """``nn.Embedding.forward`` with clustered gradients."""
    m: Any = module
    return _Embedding.apply(x, m.weight, m.padding_idx, call)  # pyright: ignore[reportReturnType]
