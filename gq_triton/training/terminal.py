"""The display of a run: a bar and a table on a terminal, plain lines elsewhere."""

import sys
from typing import Any

from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from gq_triton.commands.display import Display

__all__ = ["Terminal"]


class Terminal(Display):
    """The display of a run; use it as a context manager.

    Args:
        epochs: number of epochs of the run.
        steps: number of steps of the run.
        quiet: whether nothing is shown, as on every rank but the first.
    """

    def __init__(self, epochs: int, steps: int, *, quiet: bool = False) -> None:
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            TextColumn("loss {task.fields[loss]}, test accuracy {task.fields[accuracy]},"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            quiet=quiet,
        )
        self.epochs = epochs
        self.task = self.bar.add_task(f"epoch 0/{epochs}", total=steps, loss="-", accuracy="-")

    def step(self, row: dict[str, Any]) -> None:
        """Show a row of kind ``step``."""
        self.bar.update(
            self.task,
            completed=row["step"],
            description=f"epoch {row['epoch']}/{self.epochs}",
            loss=f"{row['loss']:.4f}",
        )

    def epoch(self, row: dict[str, Any]) -> None:
        """Show a row of kind ``epoch``."""
        self.bar.update(self.task, accuracy=f"{row['test_accuracy']:.2%}")
        if not self.console.is_terminal:
            skipped = f", {row['skipped']} steps skipped" if row["skipped"] else ""
            self.note(
                f"epoch {row['epoch']}/{self.epochs}: training loss {row['train_loss']:.4f}, "
                f"test accuracy {row['test_accuracy']:.2%}{skipped}"
            )

    def finish(self, lines: dict[str, str]) -> None:
        """Show the result: a table on a terminal, one line elsewhere.

        Args:
            lines: texts by the name of their row.
        """
        self.bar.stop()
        if not self.console.is_terminal:
            self.note("; ".join(f"{name}: {value}" for name, value in lines.items()))
        elif not self.quiet:
            table = Table(show_header=False)
            for name, value in lines.items():
                table.add_row(name, value)
            self.console.print(table)
        sys.stdout.flush()
