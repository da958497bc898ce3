"""The features of a batch's samples: a tensor in the output of a layer or model, pooled."""

import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from einops import reduce
from torch import Tensor, nn

__all__ = [
    "first_dimensions",
    "first_tensor",
    "is_spatial",
    "pooled",
    "tensors_in",
    "with_first_tensor",
]


def pooled(features: Tensor, channels_first: bool) -> Tensor:
    """Return one vector per sample, ``(B, F)``: the mean over positions, in new memory.

    Args:
        features: ``(B,)``, ``(B, F)``, or ``(B, ..., F)`` with positions in between.
        channels_first: whether more than two dimensions mean ``(B, F, ...)``.

    Raises:
        ValueError: there is no sample.
    """
    if features.dim() == 0 or len(features) == 0:
        raise ValueError(
            f"the features must have a first dimension of at least one sample, got shape "
            f"{tuple(features.shape)}"
        )
    if features.dim() <= 2:
        # Copied: an in-place activation, or a compiled graph, may overwrite the layer's output.
        return features.reshape(len(features), -1).clone()
    return reduce(features, "b f ... -> b f" if channels_first else "b ... f -> b f", "mean")


def is_spatial(module: nn.Module) -> bool:
    """Return whether a layer's output has its channels before its positions, ``(B, C, ...)``."""
    spatial = "Conv", "BatchNorm", "GroupNorm", "InstanceNorm", "Pool"
    return any(word in type(module).__name__ for word in spatial) and (
        type(module).__name__ != "Conv1D"
    )


def _values(output: Any) -> list[Any]:
    """Return the values in the output of a model or layer."""
    if isinstance(output, Tensor):
        return [output]
    if dataclasses.is_dataclass(output) and not isinstance(output, Mapping):
        return [getattr(output, entry.name) for entry in dataclasses.fields(output)]
    values = output.values() if isinstance(output, Mapping) else output
    # An iterator, which has no length, must be left for the caller to consume.
    listed = hasattr(values, "__iter__") and hasattr(values, "__len__")
    return list(values) if listed and not isinstance(values, str) else []


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors with a dimension in a model's arguments, in their order."""
    if isinstance(value, Tensor):
        return [value] if value.dim() else []
    # The compiler of torch 2.8 does not know what _values() asks of a dictionary's values.
    entries = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(entries, (list, tuple)):
        entries = _values(value)
    return [tensor for entry in entries for tensor in tensors_in(entry)]


def first_tensor(output: Any) -> Tensor | None:
    """Return the first tensor of an output that has a dimension, as no loss has; None if none."""
    # No next(..., None), here and below: the compiler of torch 2.8 does not know its default.
    for value in _values(output):
        if isinstance(value, Tensor) and value.dim() > 0:
            return value
    return None


def first_dimensions(output: Any) -> list[int]:
    """Return the first dimensions of the tensors in an output, without 0-d ones."""
    values = _values(output)
    return [v.shape[0] for v in values if isinstance(v, Tensor) and v.dim() > 0]


def with_first_tensor(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a model's output after ``change`` of the first tensor with samples and a gradient."""

    def meant(value: Any) -> bool:
        return isinstance(value, Tensor) and value.dim() > 0 and value.requires_grad

    if isinstance(output, Tensor):
        return change(output) if meant(output) else output
    values = _values(output)
    places = [place for place, value in enumerate(values) if meant(value)]
    if not places:
        return output
    place = places[0]
    changed = change(values[place])
    if type(output) in (tuple, list):
        return type(output)([*output[:place], changed, *output[place + 1 :]])
    if isinstance(output, MutableMapping):
        output[list(output)[place]] = changed
    return output  # any other output: outside a compiled graph change() hooks the tensor itself
