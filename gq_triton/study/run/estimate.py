"""The time that a study's trials will take, from short runs."""

import time
from dataclasses import replace
from pathlib import Path

import torch

from gq_triton.study.design.protocol import Cell
from gq_triton.study.design.trial import EVALUATE, Trial
from gq_triton.study.run.ranks import launch
from gq_triton.study.run.worker import run_command
from gq_triton.study.trials.training import run_trial

__all__ = ["estimate_seconds"]

_PROBE_STEPS = 20


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
    if cells[0].config.command:
        started = time.perf_counter()
        run_command(cells[0].tuning[0][0])
        return (time.perf_counter() - started) * trials / jobs, 1
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
    started = time.perf_counter()
    launch(trial, data)
    return time.perf_counter() - started
