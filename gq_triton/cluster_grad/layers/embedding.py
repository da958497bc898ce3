"""Clustered gradients of ``nn.Embedding``: only the rows that were looked up are touched.

Shapes: B samples, T lookups per sample, V rows, d columns, U touched rows, K clusters.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gq_triton.cluster_grad.compiled_ops import exact, param_grads, traced_whole
from gq_triton.cluster_grad.layers.rows import (
    accumulation_type,
    add_rows_,
    launches_cost,
    samples,
)
from gq_triton.cluster_grad.site import Call, Family, Site, UnknownRows
from gq_triton.cluster_grad.step import Step
from gq_triton.grouping.groups import Groups
from gq_triton.ring import flat

__all__ = ["EMBEDDING", "embedded"]


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, indices: Tensor, weight: Tensor, padding_idx: int | None, call: Call
    ) -> Tensor:
        ctx.call, ctx.params = call, (weight,)
        ctx.save_for_backward(indices)
        return F.embedding(indices, weight, padding_idx)

    @staticmethod
    @exact
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return None, *param_grads(ctx, grad_outputs[0], ctx.saved_tensors[0]), None, None


def _gradients(
    site: Site, step: Step, tensors: list[Tensor], wanted: list[int]
) -> list[Tensor | None]:
    """Give the sums of a table to the collector; return what it returns."""
    grad, indices = tensors
    groups, param = step.groups, site.param(0)
    padding_idx: Any = getattr(site.module, "padding_idx", None)
    if indices.dim() == 0 or len(indices) % groups.labels.numel():
        raise UnknownRows(f"{site.name} looked up indices of shape {tuple(indices.shape)}")
    rows = samples(grad.reshape(len(indices), -1, grad.shape[-1]), groups, site.name)
    where = indices.reshape(len(rows), -1)
    once = site.used_once(step, 0)
    few = once and param.is_contiguous() and param.shape[0] > where.numel()
    if few and launches_cost(grad):
        place = where.flatten().long()
        if padding_idx is not None:
            place = place.masked_fill(place == padding_idx, param.shape[0])
        return [site.give_lookups(step, 0, place, rows.flatten(0, 1))]
    if few:
        touched, where = where.unique(return_inverse=True)
        sums = _row_sums(groups, rows, where, len(touched))
        if padding_idx is not None:
            sums.masked_fill_((touched == padding_idx)[:, None], 0)
        return [site.give_rows(step, 0, touched, sums.flatten(1))]
    # Sum for all rows: there are at least as many lookups, the table is tied, so that its other use
    # has a dense gradient, or it is not contiguous.
    sums = _row_sums(groups, rows, where, param.shape[0])
    if padding_idx is not None:
        sums[:, padding_idx] = 0
    dense = param.is_contiguous()
    total = sums.flatten(1) if dense else torch.stack([flat(s, like=param) for s in sums])
    return [site.give(step, 0, iter([(0, param.numel(), total)]), sums.dtype)]


def _row_sums(groups: Groups, rows: Tensor, where: Tensor, count: int) -> Tensor:
    """Return the sums ``(K, count, d)`` of ``rows`` (B, T, d) by cluster and row of the table."""
    shape = groups.n_clusters, count, rows.shape[2]
    sums = rows.new_zeros(shape, dtype=accumulation_type(rows.dtype))
    target = where + groups.labels[:, None] * count
    add_rows_(sums.view(-1, shape[2]), target.flatten(), rows.flatten(0, 1).to(sums.dtype))
    return sums


@traced_whole
def embedded(indices: Tensor, weight: Tensor, padding_idx: int | None, call: Call) -> Tensor:
    """Look rows of a table up, with clustered gradients."""
    return _Embedding.apply(indices, weight, padding_idx, call)  # pyright: ignore[reportReturnType]


def _forward(module: nn.Module, call: Call, x: Tensor) -> Tensor:
    """Run ``nn.Embedding.forward`` with clustered gradients."""
    m: Any = module
    return embedded(x, m.weight, m.padding_idx, call)


def _accepts(module: nn.Module) -> bool:
    """Return whether a layer has no option that changes its table or the form of its gradient."""
    m: Any = module
    return not m.sparse and not m.scale_grad_by_freq and m.max_norm is None


EMBEDDING = Family(_forward, _gradients, _accepts)
