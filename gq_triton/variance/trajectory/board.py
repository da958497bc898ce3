"""The view of a running call: a bar on a terminal, plain lines elsewhere."""

import time

from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

from gq_triton.commands.display import Display

__all__ = ["Board"]

_LINE_EVERY = 10.0  # seconds between lines where there is no terminal


class Board(Display):
    """The live view; use it as a context manager.

    Args:
        runs: number of trajectories.
        steps: steps of one of them.
        finished: trajectories that have a record.
    """

    def __init__(self, runs: int, steps: int, finished: int) -> None:
        super().__init__(
            TextColumn("trajectory {task.fields[run]}/{task.fields[runs]}"),
            BarColumn(bar_width=24),
            TextColumn("step {task.fields[step]}/{task.fields[steps]},"),
            TimeRemainingColumn(compact=True),
            TextColumn("left, {task.fields[now]}"),
            speed_estimate_period=600,
        )
        self._runs, self._steps, self._done = runs, steps, finished
        self._task = self.bar.add_task(
            "", total=runs * steps, completed=finished * steps, run=finished, runs=runs,
            step=0, steps=steps, now="starting",
        )  # fmt: skip
        self._now, self._said = "", time.monotonic()

    def begin(self, name: str) -> None:
        """Show which trajectory runs."""
        self._now = name
        self.bar.update(self._task, run=self._done + 1, step=0, now=name)

    def advance(self, step: int) -> None:
        """Show the step of the trajectory that runs."""
        self.bar.update(self._task, completed=self._done * self._steps + step, step=step)
        if not self.console.is_terminal and time.monotonic() - self._said > _LINE_EVERY:
            self._said = time.monotonic()
            self.note(
                f"trajectory {self._done + 1} of {self._runs}, {self._now}: step {step} of "
                f"{self._steps}"
            )

    def end(self) -> None:
        """Show that the trajectory has its record."""
        self._done += 1
        self.bar.update(self._task, completed=self._done * self._steps)
