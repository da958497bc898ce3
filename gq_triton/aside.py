"""Passes through a model that are no part of training, from which every plug-in stands aside."""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["aside", "stands_aside"]

# How many passes run, one within the other. A compiled graph reads it as a constant of its own.
_depth = 0


def stands_aside() -> bool:
    """Return whether the pass that runs is no part of training."""
    return _depth > 0


@contextmanager
def aside() -> Iterator[None]:
    """Run passes forward and backward that cluster, queue and weight nothing."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
