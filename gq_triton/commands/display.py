"""A bar on a terminal and lines elsewhere, for what a command does one after the other."""

from typing import Any

from rich.console import Console
from rich.progress import Progress, ProgressColumn

__all__ = ["Display"]


class Display:
    """A bar, shown while this is used as a context manager, and lines above it.

    Args:
        *columns: the bar's columns.
        quiet: whether nothing is shown, as on every rank but the first.
        **options: more of rich's options of the bar.

    Attributes:
        console: where all is shown.
        bar: the bar, which a console that is no terminal does not show.
    """

    def __init__(self, *columns: ProgressColumn, quiet: bool = False, **options: Any) -> None:
        self.quiet, self.console = quiet, Console(highlight=False)
        disable = quiet or not self.console.is_terminal
        self.bar = Progress(*columns, console=self.console, disable=disable, **options)

    def __enter__(self) -> "Display":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def note(self, text: str) -> None:
        """Print one line."""
        if not self.quiet:
            self.console.print(text, markup=False, soft_wrap=True)
