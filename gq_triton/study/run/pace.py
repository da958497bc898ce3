"""How often a look at all trials of a study may be taken, whose time grows with their number."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Pace"]

_SHARE = 20.0  # the looks take at most one part in so many of the time


class Pace:
    """Tells when something that takes its time may be done again."""

    def __init__(self) -> None:
        self._next = 0.0

    @property
    def wait(self) -> float:
        """Seconds until it may be done again; 0: now."""
        return max(0.0, self._next - time.monotonic())

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Measure how long it takes."""
        started = time.monotonic()
        yield
        ended = time.monotonic()
        self._next = ended + _SHARE * (ended - started)
