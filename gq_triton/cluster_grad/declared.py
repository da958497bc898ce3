"""The number of backward passes that make one step, as declared and as it happens."""

import warnings

__all__ = ["DeclaredPasses"]


class DeclaredPasses:
    """A warning, once, where ``accumulation_steps`` is not what the loop does.

    A step may take fewer passes than declared, as the last one of an epoch does, but not the very
    first step.

    Args:
        declared: ``accumulation_steps``.
        cure: the clause that says what to do.
    """

    def __init__(self, declared: int, cure: str) -> None:
        self._declared, self._cure = declared, cure
        self._first, self._warned = True, False

    def check(self, happened: int) -> None:
        """Compare the number of backward passes that made a step's gradient.

        Args:
            happened: that number; 0 where no gradient came from clusters.
        """
        if self._warned or not happened:
            return
        first, self._first = self._first, False
        if happened == self._declared or (happened < self._declared and not first):
            return
        self._warned = True
        passes = "1 backward pass has" if happened == 1 else f"{happened} backward passes have"
        warnings.warn(
            f"{passes} made this step's gradient, and accumulation_steps is {self._declared}: the "
            f"centroids are compared with the queue in another unit; {self._cure}",
            stacklevel=2,
        )
