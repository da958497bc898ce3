"""The number of samples of a forward pass: what the model's arguments show, and what features have.

The first tensor among the arguments is believed to have one row per sample, until a step shows
that the features have another number of rows. Then another argument that has as many is believed:
another tensor, or a list with an entry per sample.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gq_triton.cluster_grad.layers.order import JOINED, Output, in_order, other_order
from gq_triton.grouping.features import pooled, tensors_in

__all__ = ["Arguments", "BatchSize", "rows_per_sample_pooled"]

# How deep objects in the arguments are searched for tensors.
_DEPTH = 4
_EITHER = (
    "the model was given a list of {0} tensors of {0} rows, and nothing tells whether a sample is "
    "a tensor or a row"
)


@dataclass(eq=False)
class Arguments:
    """What the arguments of a forward pass show.

    Attributes:
        tensors: the tensors with a dimension of samples.
        numbers: each number that may be that of the samples, by its place among the arguments.
        samples: the number that is believed; 0 if there is none.
        either: whether a list has as many tensors as each of them has rows, so that nothing tells
            whether a sample is a tensor or a row of each.
    """

    tensors: list[Tensor]
    numbers: dict[tuple[str, int], int]
    samples: int
    either: bool


class BatchSize:
    """The place among a model's arguments that shows the number of samples.

    Args:
        dim: the dimension of the samples in the model's inputs.

    Attributes:
        place: the place among the arguments that is believed.
    """

    def __init__(self, dim: int) -> None:
        self._dim, self.place = dim, ("tensor", 0)
        self._learned = False

    def shown(self, args: Any, kwargs: Any) -> Arguments:
        """Return what the arguments of a forward pass show."""
        given = [*args, *kwargs.values()]
        tensors = tensors_in(given) or list(_tensors_of(given, _DEPTH))
        tensors = [tensor for tensor in tensors if tensor.dim() > self._dim]
        sizes = [tensor.shape[self._dim] for tensor in tensors]
        lists = list(_lists_in(given))
        numbers = {("tensor", place): size for place, size in enumerate(sizes)}
        numbers |= {("list", place): len(entries) for place, entries in enumerate(lists)}
        samples = numbers.get(self.place, next(iter(numbers.values()), 0))
        either = any(len(entries) == samples and _alike(entries) == samples for entries in lists)
        return Arguments(tensors, numbers, samples, either)

    def learns(self) -> bool:
        """Return whether the last step has shown that another argument is to be believed."""
        learned, self._learned = self._learned, False
        return learned

    def differs(self, shown: Arguments, rows: int) -> str:
        """Return how the features contradict the arguments; an empty string if they agree.

        From the next step on another argument is believed, if one has as many rows.

        Args:
            shown: what the arguments show.
            rows: the number of rows of the features.
        """
        if rows == shown.samples:
            return _EITHER.format(rows) if shown.either else ""
        others = [place for place, number in shown.numbers.items() if number == rows]
        if others:
            self.place, self._learned = others[0], True
        given = f"{shown.samples} rows" if shown.numbers else "no tensor"
        return f"the features have {rows} rows, and the model was given {given}"


def _lists_in(values: list[Any]) -> Iterator[Any]:
    """Yield the lists and tuples among arguments, and those in dictionaries among them."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield value
        elif isinstance(value, Mapping):
            yield from _lists_in(list(value.values()))


def _alike(entries: Any) -> int:
    """Return the number of rows that all entries of a list have; 0 unless they are alike."""
    if not all(isinstance(entry, Tensor) and entry.dim() for entry in entries):
        return 0
    shapes = {entry.shape for entry in entries}
    return entries[0].shape[0] if len(shapes) == 1 else 0


def _tensors_of(value: Any, depth: int) -> Iterator[Tensor]:
    """Yield the tensors in objects of any class, such as a batch of graphs."""
    if isinstance(value, Tensor):
        if value.dim():
            yield value
        return
    if depth == 0 or isinstance(value, (str, bytes, type, nn.Module)):
        return
    if isinstance(value, (list, tuple)):
        inside = list(value)
    else:
        inside = tensors_in(value) or list(getattr(value, "__dict__", {}).values())
    for one in inside:
        yield from _tensors_of(one, depth - 1)


def rows_per_sample_pooled(
    features: Tensor, batch: int, trusted: set[Output], channels_first: bool
) -> Tensor:
    """Return features ``(B, F)`` where a layer's output has several rows of each sample.

    They are the mean over the rows. Where the graph does not show which rows are whose, the output
    is returned as it is.

    Args:
        features: the layer's output ``(n, ...)``.
        batch: the number of samples B.
        trusted: outputs of operations that have the samples' rows along dimension 0.
        channels_first: as for ``pooled``.
    """
    rows = features.shape[0] if features.dim() else 0
    if rows in (0, batch) or rows % batch or not features.requires_grad:
        return features
    together = in_order(features, batch, trusted)
    if not together and other_order(features, batch, trusted) != JOINED:
        return features
    with torch.no_grad():
        vectors = pooled(features, channels_first)
        sizes = (batch, -1) if together else (-1, batch)
        return vectors.unflatten(0, sizes).mean(dim=1 if together else 0)
