"""Running a study: parallel processes, a record per finished trial, nothing lost but what runs."""

import multiprocessing
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing.connection import wait as wait_for_sentinel
from pathlib import Path
from typing import Any

from gq_triton.study.protocol import Cell, missing
from gq_triton.study.records import EVALUATE, Record, Store, Trial
from gq_triton.training.options import Refusal

__all__ = ["estimate_seconds", "run_study"]

Progress = Callable[[Record], None]
_PROBE_STEPS = 20


def run_study(
    cells: list[Cell], store: Store, folder: Path, *, jobs: int, data: Path | None, done: Progress
) -> None:
    """Run every trial of a study that has no record yet.

    Each worker writes its own record, so that killing this process loses at most the trials under
    way. What tuning decides is started as soon as its cell is tuned.

    Args:
        cells: of the study.
        store: its records; those found are not run again.
        folder: of the study.
        jobs: processes; each computes with one thread, so that results do not depend on it.
        data: folder with the files of tasks that need some.
        done: told about every finished trial.

    Raises:
        Refusal: a worker was killed.
    """
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        jobs,
        mp_context=context,
        initializer=_start_worker,
        initargs=(cells[0].config.device, context.Value("i", 0)),
    )
    workers: dict[int, Any] = {}
    open_cells, running = list(cells), {}
    try:
        while open_cells or running:
            _submit(pool, open_cells, store, running, folder, data, limit=2 * jobs)
            if not running:
                continue
            workers.update(pool._processes or {})
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                del running[future]
                record = future.result()
                store.know(record)
                done(record)
    except BrokenProcessPool as error:
        raise Refusal(
            "a worker process was killed, perhaps for want of memory: what is finished is kept; "
            "run the same command again, with a smaller --jobs if it happens again"
        ) from error
    finally:
        if running:  # after Ctrl-C or a failure nobody waits for the trials under way
            for worker in workers.values():
                worker.terminate()
        pool.shutdown(wait=True, cancel_futures=True)


def _submit(
    pool: ProcessPoolExecutor,
    open_cells: list[Cell],
    store: Store,
    running: dict[Future[Record], Trial],
    folder: Path,
    data: Path | None,
    limit: int,
) -> None:
    """Start trials that can start, up to ``limit`` at once; forget the cells that are complete."""
    started = {trial.key for trial in running.values()}
    for cell in list(open_cells):
        todo = missing(cell, store)
        if not todo:
            open_cells.remove(cell)
        for trial in todo:
            if len(running) >= limit:
                return
            if trial.key not in started:
                started.add(trial.key)
                running[pool.submit(_work, trial, folder, data)] = trial


def _start_worker(device: str, started: Any) -> None:
    """Prepare a worker: one thread, deaf to Ctrl-C, and gone when its parent is."""
    from gq_triton.study.device import take_device

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and stops the workers
    with started.get_lock():
        number = started.value
        started.value += 1
    take_device(device, number)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait_for_sentinel([parent.sentinel])
        _stop_ranks()
        os._exit(1)

    def stop(number: int, frame: object) -> None:
        _stop_ranks()
        os._exit(1)

    signal.signal(signal.SIGTERM, stop)

    threading.Thread(target=watch, daemon=True).start()


_ranks: list[subprocess.Popen[str]] = []  # the torchrun that this worker waits for


def _stop_ranks() -> None:
    for process in _ranks:
        process.terminate()  # torchrun stops its ranks


def _work(trial: Trial, folder: Path, data: Path | None) -> Record:
    from gq_triton.study.trial import run_trial

    if trial.processes > 1:
        from gq_triton.study.ranks import launch

        try:
            return launch(trial, folder, data, _ranks.append)
        finally:
            _ranks.clear()
    record = run_trial(trial, data)
    Store(folder).add(record)
    return record


def estimate_seconds(
    cells: list[Cell], trials: int, jobs: int, data: Path | None
) -> tuple[float, int]:
    """Return the seconds that trials will take, and of how many short runs that was measured.

    One short run per task and arm at the middle batch size; the looks at the data are part of it.
    With several processes per trial one whole trial.

    Args:
        cells: of the study.
        trials: how many are still to run.
        jobs: processes.
        data: folder with the files of tasks that need some.
    """
    import torch

    from gq_triton.study.trial import run_trial

    if cells[0].config.nproc_per_trial > 1:
        return _ranked_seconds(cells[0].tuning[0][0], data) * trials / jobs, 1
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    per_trial = []
    sizes = sorted({cell.batch_size for cell in cells})
    middle = sizes[len(sizes) // 2]
    try:
        for cell in cells:
            if cell.batch_size != middle:
                continue
            first = cell.tuning[0][0]
            steps = min(first.steps, _PROBE_STEPS)
            short = replace(first, steps=steps, looks_every=min(first.looks_every, steps))
            # The first runs read the data and compile what is compiled.
            run_trial(replace(short, steps=min(steps, 8), looks_every=min(steps, 8)), data)
            started = time.perf_counter()
            run_trial(replace(short, purpose=EVALUATE), data)
            per_trial.append((time.perf_counter() - started) * first.steps / steps)
    finally:
        torch.set_num_threads(threads)
    return sum(per_trial) / len(per_trial) * trials / jobs, len(per_trial)


def _ranked_seconds(trial: Trial, data: Path | None) -> float:
    """Return the seconds of one whole trial under torchrun, most of which is starting it."""
    from gq_triton.study.ranks import launch

    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        launch(trial, Path(scratch), data, lambda process: None)
        return time.perf_counter() - started
