"""The view of a running study: a table and a bar on a terminal, plain lines elsewhere."""

import time

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from gq_triton.study.design.protocol import Cell
from gq_triton.study.design.trial import TUNE, Record, Records

__all__ = ["Board"]

_LINE_EVERY = 10.0  # seconds between lines where there is no terminal


class Board:
    """The live view; use it as a context manager.

    Args:
        cells: cells of the study.
        total: number of trials, as far as it is known.
        finished: number of trials that have a record.
    """

    def __init__(self, cells: list[Cell], total: int, finished: int) -> None:
        self.console = Console(highlight=False)
        self.bar = Progress(
            TextColumn("trials"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("left, {task.fields[now]}"),
            console=self.console,
            speed_estimate_period=600,  # trials of one arm take ten times as long as of another
        )
        self.task = self.bar.add_task("", total=total, completed=finished, now="starting")
        # Best validation score and number of trials so far, by (task, batch size) and by arm.
        self.best: dict[tuple[str, int], dict[str, tuple[float, int]]] = {}
        self.arms = list(dict.fromkeys(cell.arm.name for cell in cells))
        self.owners: dict[str, list[Cell]] = {}
        for cell in cells:
            for trials in cell.tuning:
                for trial in trials:
                    self.owners.setdefault(trial.key, []).append(cell)
        self.live = Live(console=self.console, refresh_per_second=4) if self._fancy else None
        self.said, self.total, self.finished = time.monotonic(), total, finished

    @property
    def _fancy(self) -> bool:
        return self.console.is_terminal

    def __enter__(self) -> "Board":
        if self.live is not None:
            self.live.start()
            self.live.update(self._view())
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def recall(self, records: Records) -> None:
        """Show the records that the study has already."""
        for cells in self.owners.values():
            for cell in cells:
                for trials in cell.tuning:
                    for trial in trials:
                        record = records.get(trial)
                        if record is not None:
                            self._note(record, cell)
            if self.live is None:
                break

    def done(self, record: Record, finished: int, total: int) -> None:
        """Show a finished trial.

        Args:
            record: record of the trial.
            finished: number of trials that have a record.
            total: number of trials, as far as it is known.
        """
        trial = record.trial
        for cell in self.owners.get(trial.key, []):
            self._note(record, cell)
        what = "tuning" if trial.purpose == TUNE else "evaluating"
        now = f"{what} {trial.task} at {trial.batch_size}"
        self.bar.update(self.task, total=total, completed=finished, now=now)
        self.total, self.finished = total, finished
        if self.live is not None:
            self.live.update(self._view())
        elif time.monotonic() - self.said > _LINE_EVERY or finished == total:
            self.said = time.monotonic()
            remaining = self.bar.tasks[0].time_remaining
            left = "" if remaining is None or finished == total else f", {clock(remaining)} left"
            self.note(f"{finished} of {total} trials{left}: {now}")

    def _note(self, record: Record, cell: Cell) -> None:
        arms = self.best.setdefault((cell.task, cell.batch_size), {})
        score = record.result["validation_score"]
        best, count = arms.get(cell.arm.name, (score, 0))
        better = cell.entry.gain(score, best) > 0
        arms[cell.arm.name] = (score if better else best), count + 1

    def _view(self) -> Group:
        table = Table(title="best validation score so far (tuning trials)", title_justify="left")
        table.add_column("task")
        table.add_column("batch", justify="right")
        for arm in self.arms:
            table.add_column(arm, justify="right")
        for (task, size), arms in self.best.items():
            found = [arms.get(arm) for arm in self.arms]
            cells = ["" if pair is None else f"{pair[0]:.4f} ({pair[1]})" for pair in found]
            table.add_row(task, str(size), *cells)
        return Group(table, self.bar)

    def note(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, markup=False, soft_wrap=True)


def clock(seconds: float) -> str:
    """Return a time in seconds, minutes or hours, whichever reads best."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
