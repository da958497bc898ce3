"""One call of ``gq-triton study run``: alone in its folder, shown on a board, ended cleanly."""

from collections.abc import Callable
from pathlib import Path

from gq_triton.commands.files import alone, whole_file
from gq_triton.commands.refusal import Refusal
from gq_triton.study.design.protocol import Cell, progress
from gq_triton.study.design.study_file import CONFIG, write_toml
from gq_triton.study.design.trial import Record
from gq_triton.study.run.board import Board
from gq_triton.study.run.pace import Pace
from gq_triton.study.run.records import Store
from gq_triton.study.run.runner import run_study

__all__ = ["watch"]

INTERRUPTED, FAILED = 130, 1  # exit status after Ctrl-C, and after a worker or rank was lost
_NEAR = 100  # trials left from which on their number is counted after each


def watch(
    cells: list[Cell],
    store: Store,
    folder: Path,
    *,
    jobs: int,
    data: Path | None,
    damaged: int,
    scheduler: str | None = None,
    track: Callable[[Record], None] = lambda record: None,
) -> int:
    """Run the missing trials of a study and show them; return the exit status.

    Args:
        cells: cells of the study.
        store: its records.
        folder: its folder.
        jobs: number of worker processes.
        data: folder with the files of tasks that need some.
        damaged: number of files among the records that could not be read.
        scheduler: address of a dask scheduler elsewhere, or None for workers on this machine.
        track: called with every new record, beside the view.

    Raises:
        Refusal: another process runs the study.
    """
    with alone(folder, "study"):
        with whole_file(folder / CONFIG) as file:
            file.write(write_toml(cells[0].config).encode())
        finished, total = progress(cells, store)
        board = Board(cells, total, finished)
        if finished:
            board.note(f"{finished} of {total} trials were finished before")
        if damaged:
            board.note(f"{damaged} files in {store.folder} hold no whole record: their trials run")
        pace = Pace()

        def done(record: Record) -> None:
            nonlocal finished, total
            finished += 1
            if not pace.wait or total - finished < _NEAR:
                with pace.taken():
                    finished, total = progress(cells, store)
            board.done(record, finished, total)
            track(record)

        try:
            with board:
                board.recall(store)
                run_study(
                    cells, store, jobs=jobs, data=data, done=done, scheduler=scheduler,
                    note=board.note,
                )  # fmt: skip
        except KeyboardInterrupt:
            board.note("stopped; what is finished is kept, and the same command continues")
            return INTERRUPTED
        except Refusal as reason:
            board.note(f"stopped: {reason}")
            return FAILED
        board.note(f"finished; now: gq-triton study report {folder}")
        return 0
