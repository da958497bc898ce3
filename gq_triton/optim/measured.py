"""The figures of an optimizer's step, for steps that a user has asked to see.

The fused pass of a step does not count its weights. A step that is measured reads gradients and
queues once more before the update, which therefore stays the same bit for bit.

Shape legend: N = parameters of a batch.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gq_triton.engines import Engine
from gq_triton.law import Law
from gq_triton.optim.batches import Batch
from gq_triton.queues.measures import measures, measures_by_name
from gq_triton.ring import shard_groups

__all__ = ["Measured", "figures", "measure"]


class Measured(NamedTuple):
    """The statistics of one batch of a step.

    Attributes:
        members: its parameters.
        table: ``(N, 5)`` float64, the columns of ``Engine.weigh_``; of sharded parameters the part
            that this rank holds. All 0 where a loss scaler skipped the step.
        length: the effective length, 0-d or a number.
        matched: whether ``match_norm`` gives the weighted gradients the norm of the raw ones.
    """

    members: Sequence[Tensor]
    table: Tensor
    length: Tensor | int
    matched: bool


def measure(ops: Engine, batch: Batch, law: Law, group: dict[str, Any]) -> Measured:
    """Return the statistics of a batch before its update; nothing is changed."""
    one = torch.ones(1, dtype=torch.float64, device=batch.shards[0].device)
    rows = []
    for grad, queue, queued in zip(batch.grads, batch.queues, batch.queued, strict=True):
        if grad.numel() == 0:
            rows.append(one.new_zeros(5))
            continue
        # One cluster that holds every sample: the same law, read only.
        _, _, parts = ops.combine(
            grad[None], queue, queued, law, inverse_shares=one, mixture=one, sigma_scales=one
        )
        rows.append(parts.double().sum(dim=0))
    table = torch.stack(rows)
    if law.found_inf is not None:
        table = torch.where(law.found_inf == 0, table, 0.0)
    length = group["queue_length"] if law.length is None else law.length
    return Measured(batch.members, table, length, bool(group["match_norm"]))


def figures(
    batches: Sequence[Measured], name_of: Callable[[Tensor], str], per_layer: bool
) -> dict[str, Any]:
    """Return the figures of a step in one transfer to the host; empty where nothing was weighted.

    Args:
        batches: the statistics of its batches.
        name_of: returns the name of a parameter.
        per_layer: return the figures of each parameter by its name.
    """
    tables = [_whole(batch) for batch in batches]
    if not tables:
        return {}
    device = tables[0].device
    table = torch.cat([part.to(device) for part in tables])
    members = [member for batch in batches for member in batch.members]
    elements = {name_of(member): member.numel() for member in members}
    if per_layer:
        named = measures_by_name(table, elements)
        return {name: own for name, own in named.items() if own["mean_weight"] > 0}
    whole = measures(table.sum(dim=0), max(sum(elements.values()), 1), batches[0].length)
    return dict(whole) if whole["mean_weight"] > 0 else {}


def _whole(batch: Measured) -> Tensor:
    """Return the statistics over all shards of the batch's parameters."""
    table = batch.table
    groups = shard_groups(batch.members[0])
    if groups:
        table = table.clone()
        for group in groups:
            dist.all_reduce(table, group=group)
    if batch.matched:
        table = torch.cat([table[:, :1], table[:, :1], table[:, 2:]], dim=1)
    return table
