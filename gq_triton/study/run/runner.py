"""Worker processes that run a study's trials; a kill loses only the trials under way."""

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

from gq_triton.commands.refusal import Refusal
from gq_triton.study.design.protocol import Cell, missing
from gq_triton.study.design.trial import EVALUATE, Record, Trial
from gq_triton.study.run.records import Store

__all__ = ["estimate_seconds", "run_study"]

Progress = Callable[[Record], None]
_PROBE_STEPS = 20


def run_study(
    cells: list[Cell], store: Store, folder: Path, *, jobs: int, data: Path | None, done: Progress
) -> None:
    """Run every trial of a study that has no record yet.

    Each worker writes its own records, so that a kill of this process loses at most the trials
    under way. The evaluation of a cell starts as soon as the cell is tuned.

    Args:
        cells: cells of the study.
        store: records of the study; trials that have one are not run again.
        folder: folder of the study.
        jobs: number of worker processes. Each computes with one thread, so that results do not
            depend on it.
        data: folder with the files of tasks that need some.
        done: called with every new record.

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
        if running:  # Ctrl-C or a failure: the trials under way are not waited for
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
    """Start the trials that can start, until ``limit`` run; drop the cells that are complete."""
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
    """Prepare a worker: one thread; it ignores Ctrl-C and ends when its parent ends."""
    from gq_triton.study.run.device import take_device

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets Ctrl-C too and stops workers
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


_ranks: list[subprocess.Popen[str]] = []  # the torchrun process that this worker waits for


def _stop_ranks() -> None:
    for process in _ranks:
        process.terminate()  # torchrun stops its ranks


def _work(trial: Trial, folder: Path, data: Path | None) -> Record:
    from gq_triton.study.trials.training import run_trial

    if trial.processes > 1:
        from gq_triton.study.run.ranks import launch

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
    """Return an estimate of the seconds that trials take, and the number of runs it is from.

    There is one short run per task and arm at the middle batch size, with its looks at the data.
    With several processes per trial there is one whole trial.

    Args:
        cells: cells of the study.
        trials: number of trials still to run.
        jobs: number of worker processes.
        data: folder with the files of tasks that need some.
    """
    import torch

    from gq_triton.study.trials.training import run_trial

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
            # The first run reads the data and compiles; it is not timed.
            run_trial(replace(short, steps=min(steps, 8), looks_every=min(steps, 8)), data)
            started = time.perf_counter()
            run_trial(replace(short, purpose=EVALUATE), data)
            per_trial.append((time.perf_counter() - started) * first.steps / steps)
    finally:
        torch.set_num_threads(threads)
    return sum(per_trial) / len(per_trial) * trials / jobs, len(per_trial)


def _ranked_seconds(trial: Trial, data: Path | None) -> float:
    """Return the seconds of one whole trial under torchrun, most of which its start takes."""
    from gq_triton.study.run.ranks import launch

    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        launch(trial, Path(scratch), data, lambda process: None)
        return time.perf_counter() - started
