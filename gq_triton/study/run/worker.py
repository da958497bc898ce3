"""A trial in a worker process of dask, on this machine or on another."""

import shlex
import signal
import threading
import time
from pathlib import Path
from typing import Any

from gq_triton.commands.refusal import Refusal
from gq_triton.study.design.trial import Record, Trial
from gq_triton.study.run.device import take_device
from gq_triton.study.run.guard import guarded
from gq_triton.study.trials.told import record_of, scores_in, words_of
from gq_triton.study.trials.training import run_trial

_SHOWN = 1000  # characters of a failed command's output
__all__ = ["dask_setup", "run_command", "work"]

# A trial seeds torch's global generator, so a process runs one at a time, however many threads the
# worker was started with.
_alone = threading.Lock()


def dask_setup(worker: Any) -> None:
    """Prepare a worker of this machine; dask calls it in every worker's main thread.

    Args:
        worker: dask's worker.
    """
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # the command gets Ctrl-C too, and ends the workers


def work(trial: Trial, data: Path | None) -> Record:
    """Run a trial and return its record.

    Args:
        trial: the trial.
        data: folder with the files of tasks that need some, on the machine of this worker.
    """
    from distributed import get_worker

    with _alone:
        if trial.command:
            return run_command(trial)
        if trial.processes > 1:
            from gq_triton.study.run.ranks import launch

            return launch(trial, data)
        # Workers of this machine are named by number. One that was started elsewhere sees the GPUs
        # that it may use.
        name = get_worker().name
        take_device(trial.device, name if isinstance(name, int) else 0)
        return run_trial(trial, data)


def run_command(trial: Trial) -> Record:
    """Run the user's command of a trial and return the record of the scores that it prints.

    Raises:
        Refusal: the command failed, or printed no scores.
    """
    words = words_of(trial)
    started = time.perf_counter()
    try:
        code, output = guarded(words)
    except FileNotFoundError as error:
        raise Refusal(f"--command cannot be run: {error}") from error
    if code:
        raise Refusal(f"{shlex.join(words)} ended with {code}: {output[-_SHOWN:]}")
    try:
        return record_of(trial, scores_in(output), time.perf_counter() - started)
    except Refusal as reason:
        raise Refusal(f"{shlex.join(words)}: {reason}") from reason
