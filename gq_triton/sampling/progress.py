"""A bar for what takes long, where somebody watches."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from gq_triton.sampling.ranks import place

__all__ = ["progress"]

DELAY = 2.0  # seconds after which the bar appears


@contextmanager
def progress(words: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Yield a function that is told how many samples were read since its last call.

    The bar goes to the first rank's stderr and vanishes at the end. It appears only where that is a
    terminal, rich is installed, and the work takes longer than two seconds.

    Args:
        words: what is under way.
        total: samples to be read; None if unknown. Should there be more, the bar stays full.
    """
    if place(None, None)[1] or not sys.stderr.isatty() or find_spec("rich") is None:
        yield lambda samples: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn(words), BarColumn(), MofNCompleteColumn(), TextColumn("samples"),
        TimeRemainingColumn(),
    )  # fmt: skip
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task: Any = bar.add_task("", total=total)
    due, seen, shown = time.monotonic() + DELAY, 0, False

    def read(samples: int) -> None:
        nonlocal seen, shown
        seen += samples
        if not shown and time.monotonic() >= due:
            bar.start()
            shown = True
        if shown:
            bar.update(task, completed=seen)

    try:
        yield read
    finally:
        if shown:
            bar.stop()
