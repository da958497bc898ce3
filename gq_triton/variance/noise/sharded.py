"""A meter's groups in a model that ``fully_shard`` (FSDP2, HSDP) has divided."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gq_triton.dist.sharded.gathered import GatheredClusters
from gq_triton.dist.sharded.layout import Layout, layout_of, sharded_parameters
from gq_triton.ring import local
from gq_triton.variance.noise.groups import MeterClusters

__all__ = ["ShardedMeterClusters", "shards_of", "squares_of_shards"]


def shards_of(model: nn.Module) -> tuple[Mapping[str, nn.Parameter], Layout]:
    """Return the shards of a divided model by name, and their layout.

    Raises:
        ValueError: something else than ``fully_shard`` has divided a parameter, or nothing has.
    """
    params = sharded_parameters(model)
    try:
        return params, layout_of(model, params)
    except ValueError as problem:
        reason = str(problem).partition(", and ")[0]
        raise ValueError(
            f"NoiseScale needs a model that fully_shard alone has divided, on one mesh: {reason}"
        ) from problem


def squares_of_shards(
    params: Mapping[str, Tensor], layout: Layout, known: set[str], like: Tensor
) -> Tensor | None:
    """Return this rank's part of the squared norms of the reduced gradients, ``(N,)``.

    The parts of all ranks add up to the squared norm of the mean over ranks. None where a measured
    parameter has no reduced gradient yet.
    """
    parts = []
    for name, param in params.items():
        if param.grad is None:
            if name in known:
                return None
            parts.append(torch.full_like(like[0], torch.nan))
            continue
        unit = layout.divisor(name) / layout.place.world
        norm = torch.linalg.vector_norm(local(param.grad)).to(like) * unit
        parts.append(norm.square() / layout.place.copies)
    return torch.stack(parts)


class ShardedMeterClusters(GatheredClusters, MeterClusters):
    """``MeterClusters`` of a sharded model.

    Args:
        layout: the layout of the model.
        leaves: by parameter name, the gathered parameters, which are met in forward passes.
        **rest: as for ``MeterClusters``.
    """

    def __init__(self, *args: Any, layout: Layout, leaves: dict[str, Tensor], **rest: Any) -> None:
        super().__init__(*args, leaves=leaves, **rest)
        self._layout = layout
