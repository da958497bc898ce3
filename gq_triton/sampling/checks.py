"""What is wrong with the arguments of the samplers, in one sentence each."""

import math
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.utils.data import IterableDataset

from gq_triton.options import shown

__all__ = ["check_data", "check_model", "count", "number", "one_of", "raise_all", "used"]


def count(name: str, value: Any, low: int = 1) -> str | None:
    """Return the problem of what must be an integer of at least ``low``."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= low:
        return None
    return f"{name} must be an integer >= {low}, got {shown(value)}"


def number(name: str, value: Any, low: float, high: float = math.inf) -> str | None:
    """Return the problem of what must be a number from ``low`` to ``high``."""
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if real and low <= value <= high:
        return None
    bounds = f">= {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
    bounds = f"<= {high:g}" if low == -math.inf else bounds
    return f"{name} must be a number {bounds}, got {shown(value)}"


def one_of(name: str, value: Any, allowed: Iterable[str]) -> str | None:
    """Return the problem of what must be one of some words."""
    if isinstance(value, str) and value in allowed:
        return None
    return f"{name} must be one of {', '.join(allowed)}, got {shown(value)}"


def raise_all(*problems: str | None) -> None:
    """Raise one ValueError that names every problem, if there is one."""
    found = [problem for problem in problems if problem]
    if found:
        raise ValueError("; ".join(found))


def used(batches: int | None, given: int) -> int:
    """Return how many of the batches that were given out were used; None: all.

    Raises:
        ValueError: ``batches`` is not from 0 to ``given``.
    """
    if batches is None:
        return given
    if not 0 <= batches <= given:
        raise ValueError(f"batches must be from 0 to {given}, got {shown(batches)}")
    return batches


def check_model(model: Any) -> None:
    """Raise a TypeError unless the model is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model must be a torch.nn.Module, got {type(model).__name__}")


def check_data(dataset: Any) -> None:
    """Raise a TypeError unless a dataset has samples that an index finds."""
    indexed = hasattr(dataset, "__getitem__") or hasattr(dataset, "__getitems__")
    if isinstance(dataset, IterableDataset) or not indexed or not hasattr(dataset, "__len__"):
        raise TypeError(
            "the dataset must be map-style, with __len__ and __getitem__, got "
            f"{type(dataset).__name__}: samples of a stream cannot be drawn by index"
        )
