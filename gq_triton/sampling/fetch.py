"""Batches from the dataset, also in worker processes, of which some samples are picked later."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gq_triton.options import shown

__all__ = ["Fetch", "Fetched", "moved", "pick", "split_batch"]

# What `layout` says of a value: its entries are the samples.
ROWS = "rows"


class Fetched(NamedTuple):
    """A batch of n samples.

    Attributes:
        batch: what ``collate_fn`` made of the samples.
        layout: where the samples are in it, or None where no samples will be picked, or where it
            cannot be known.
        samples: the samples themselves where the layout is not known, else None.
    """

    batch: Any
    layout: Any = None
    samples: list[Any] | None = None


@dataclasses.dataclass
class Fetch:
    """A dataset whose items are whole batches: indices, and whether samples will be picked.

    Attributes:
        dataset: the user's dataset.
        collate_fn: makes a batch of a list of samples.
    """

    dataset: Any
    collate_fn: Callable[[list[Any]], Any]

    def __getitem__(self, request: tuple[list[int], bool]) -> Fetched:
        """Return the batch of ``(indices, picks)``."""
        indices, picks = request
        if hasattr(self.dataset, "__getitems__"):
            samples = list(self.dataset.__getitems__(indices))
        else:
            samples = [self.dataset[index] for index in indices]
        batch = self.collate_fn(samples)
        if not picks:
            return Fetched(batch)
        found = self._layout(samples, batch)
        return Fetched(batch, found, None if found is not None else samples)

    def _layout(self, samples: list[Any], batch: Any) -> Any:
        """Return the layout of a batch. A second one, shorter by a sample, shows what has rows.

        One batch alone would not: a time-major tensor may have as many steps as samples.
        """
        if not hasattr(self, "_known"):
            fewer = self.collate_fn(samples[:-1]) if len(samples) > 1 else None
            self._known = layout(batch, fewer, len(samples))
        return self._known


def layout(batch: Any, fewer: Any, count: int) -> Any:
    """Return where the samples are in a batch; None if some value is neither rows nor made of them.

    Args:
        batch: a batch of ``count`` samples.
        fewer: the batch of all but the last of them.
        count: the number of samples.
    """
    if isinstance(batch, Tensor):
        rows = isinstance(fewer, Tensor) and batch.dim() > 0 and fewer.dim() == batch.dim()
        return ROWS if rows and (len(batch), len(fewer)) == (count, count - 1) else None
    if type(batch) is not type(fewer):
        return None
    if isinstance(batch, dict):
        if type(batch) is not dict or batch.keys() != fewer.keys():
            return None
        found = {key: layout(value, fewer[key], count) for key, value in batch.items()}
        return None if None in found.values() else found
    if isinstance(batch, (list, tuple)):
        if (len(batch), len(fewer)) == (count, count - 1):
            return ROWS
        if len(batch) != len(fewer):
            return None
        parts = [layout(one, other, count) for one, other in zip(batch, fewer, strict=True)]
        return None if any(part is None for part in parts) else parts
    return None


def pick(fetched: Fetched, places: Tensor, collate_fn: Callable[[list[Any]], Any]) -> Any:
    """Return the batch of the samples at some places ``(b,)``."""
    if fetched.layout is None:
        samples = fetched.samples
        assert samples is not None
        return collate_fn([samples[place] for place in places.tolist()])
    return _picked(fetched.batch, fetched.layout, places)


def _picked(batch: Any, found: Any, places: Tensor) -> Any:
    if found == ROWS:
        if isinstance(batch, Tensor):
            return batch.index_select(0, places.to(batch.device))
        return _like(batch, [batch[place] for place in places.tolist()])
    if isinstance(found, dict):
        return {key: _picked(batch[key], part, places) for key, part in found.items()}
    parts = [_picked(value, part, places) for value, part in zip(batch, found, strict=True)]
    return _like(batch, parts)


def _like(batch: Any, entries: list[Any]) -> Any:
    """Return entries in a list or tuple of the kind that a batch has."""
    return type(batch)(*entries) if hasattr(batch, "_fields") else type(batch)(entries)


def moved(batch: Any, device: torch.device) -> Any:
    """Return a batch with its tensors on a device; values that have a ``to`` move themselves."""
    if isinstance(batch, Tensor) or hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return _like(batch, [moved(value, device) for value in batch])
    return batch


def split_batch(batch: Any) -> tuple[Any, Any]:
    """Return inputs and targets of a batch.

    Raises:
        ValueError: the batch is neither ``(inputs, ..., targets)`` nor a dict with ``"labels"``.
    """
    if isinstance(batch, Mapping) and "labels" in batch:
        return {key: value for key, value in batch.items() if key != "labels"}, batch["labels"]
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        return batch[0] if len(batch) == 2 else list(batch[:-1]), batch[-1]
    raise ValueError(
        'a batch must be (inputs, ..., targets), or a dict with "labels", got '
        f"{shown(batch)}: say with split= what its inputs and targets are"
    )
