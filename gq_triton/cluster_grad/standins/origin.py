"""The origin of a stand-in: the parameters it is computed from, and its forward pass."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["OTHER", "REPEATED", "SAME", "Origin", "Root", "linked", "merged", "saving_hooks"]

# How the elements of a stand-in follow from those of its parameter: the same in the same order, the
# same repeated along dimension 0, or in any other way.
SAME, REPEATED, OTHER = "same", "repeated", "other"


@dataclass(frozen=True, eq=False)
class Root:
    """A parameter from which a stand-in is computed, or rows of a table looked up for all samples.

    Attributes:
        sites: the key of the parameter's site, by the kind of operation that meets the samples.
        param: the parameter.
        indices: the rows that were looked up; None for a whole parameter.
        bias: the module's bias that goes with this weight of a linear layer, or None.
    """

    sites: dict[str, Tensor]
    param: Tensor
    indices: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Origin:
    """Where a stand-in comes from.

    Attributes:
        token: the token of the forward pass.
        clock: the tensor to which operations without a result write in a compiled graph.
        batch: the number of samples of the forward pass; 0 if they are not the first dimension.
        trusted: outputs of operations that have the samples' rows along dimension 0.
        inputs: by the address of an input of the model, the distance from sample to sample.
        roots: what the stand-in is computed from.
        starts: by root, the tensor that all its uses begin with.
        link: how the elements follow from those of the only root: ``SAME``, ``REPEATED`` or
            ``OTHER``.
        hooks: the hooks of saved tensors in the forward pass of the module that holds the roots.
            Inside a checkpointed segment they are others.
    """

    token: Tensor
    clock: Tensor
    batch: int
    trusted: set[tuple[Any, int]]
    inputs: Mapping[int, int]
    roots: tuple[Root, ...]
    starts: tuple[Tensor, ...]
    link: str
    hooks: Any = None


def merged(stand_ins: list[Any], link: str) -> Origin:
    """Return the origin of what is computed from some stand-ins."""
    origin: Origin = stand_ins[0]._gq_origin
    if len(stand_ins) == 1:
        return origin if origin.link == link else linked(origin, link)
    roots, starts = list(origin.roots), list(origin.starts)
    for other in stand_ins[1:]:
        for root, start in zip(other._gq_origin.roots, other._gq_origin.starts, strict=True):
            if all(start is not known for known in starts):
                roots.append(root)
                starts.append(start)
    return _with(origin, tuple(roots), tuple(starts), link if len(roots) == 1 else OTHER)


def linked(origin: Origin, link: str) -> Origin:
    """Return an origin with another link to its parameters."""
    return _with(origin, origin.roots, origin.starts, link)


def _with(origin: Origin, roots: tuple[Root, ...], starts: tuple[Tensor, ...], link: str) -> Origin:
    """Return an origin of the same forward pass with other roots and another link."""
    return Origin(
        origin.token,
        origin.clock,
        origin.batch,
        origin.trusted,
        origin.inputs,
        roots,
        starts,
        link,
        origin.hooks,
    )


def saving_hooks() -> Any:
    """Return the hooks of saved tensors that are in force, as in a checkpointed segment; or None.

    A segment runs again in the backward pass, outside the module's ``forward``, without stand-ins.
    It must save then what it saved before.
    """
    if torch.compiler.is_compiling():
        return None
    autograd: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
    return autograd._top_saved_tensors_default_hooks(False)
