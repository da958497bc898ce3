"""What the engine of studies costs: a study against its bare trials, and a scheduler's 256 workers.

First a study of 400 trials of a second each on 2 workers, from the command's start to its end,
against as many trials one after another in 2 processes, without the start of those. Then a
scheduler elsewhere with 256 workers whose trials compute nothing and last 5 to 15 seconds: what the
scheduler and the command take of a core. An idle machine with 2 cores takes 10 minutes for both.

    python benchmarks/study_engine.py [--only trials | workers]
"""

import argparse
import asyncio
import os
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

HERE = Path(__file__).parent
SECONDS = 1.0  # of a trial
TRIALS, JOBS = 400, 2
WORKERS, PROCESSES = 256, 16  # workers, and processes that share them
WATCHED = 60.0  # seconds in which the scheduler is watched
MARK = "GQ_FIRST_TRIAL"  # names the file that tells when the first trial began


class Second:
    """A task whose trial takes ``SECONDS`` of a core."""

    features, score_name, higher, chance, target = "0", "loss", False, 9.0, 0.0

    def data(self, seed: int) -> tuple[Any, ...]:
        mark = os.environ.get(MARK)
        if mark and not os.path.exists(mark):
            Path(mark).write_text(str(time.time()))
        end = time.process_time() + SECONDS
        while time.process_time() < end:
            pass
        pair = torch.zeros(64, 1), torch.zeros(64)
        return pair, pair, pair

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(1, 1))

    def loss(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (outputs[:, 0] - labels).square()

    def score(self, outputs: torch.Tensor, labels: torch.Tensor) -> float:
        return self.loss(outputs, labels).mean().item()


def make_task() -> Second:
    """Return the task; the studies name this function."""
    return Second()


def study(folder: str, *words: str) -> "subprocess.Popen[bytes]":
    """Start ``gq-triton study run`` with ten batch sizes; ``words`` are more options."""
    program = "import sys; from gq_triton.commands.cli import main; sys.exit(main())"
    sizes = [str(size) for size in range(1, 11)]
    command = [sys.executable, "-c", program, "study", "run", "--out", folder,
               "--tasks", "study_engine:make_task", "--arms", "sgdm", "--steps", "1",
               "--batch-sizes", *sizes, *words]  # fmt: skip
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(HERE)}, cwd=HERE)


def bare(count: int) -> float:
    """Run trials one after another in this process, and return their seconds."""
    from gq_triton.study.design.config import StudyConfig
    from gq_triton.study.design.protocol import cells
    from gq_triton.study.trials.training import run_trial

    torch.set_num_threads(1)
    options = {"tasks": ["study_engine:make_task"], "arms": ["sgdm"], "steps": 1,
               "batch_sizes": [8], "trials": count, "tuning_seeds": 1}  # fmt: skip
    trials = [trial for group in cells(StudyConfig.of(options))[0].tuning for trial in group]
    run_trial(trials[0])
    started = time.perf_counter()
    for trial in trials:
        run_trial(trial)
    return time.perf_counter() - started


def measure_trials() -> None:
    """Print the seconds of a study and those of its bare trials."""
    with ProcessPoolExecutor(JOBS) as pool:
        alone = max(pool.map(bare, [TRIALS // JOBS] * JOBS))
    with tempfile.TemporaryDirectory() as folder:
        os.environ[MARK] = f"{folder}/first"
        started = time.time()
        # A batch size has 30 tuning trials with one seed each, and 10 evaluation seeds.
        words = "--jobs", str(JOBS), "--trials", "30", "--tuning-seeds", "1", "--seeds", "10"
        status = study(f"{folder}/study", *words).wait()
        took = time.time() - started
        begun = float(Path(os.environ.pop(MARK)).read_text()) - started
        kept = len(list(Path(f"{folder}/study/trials").glob("*.json")))
    if status or kept != TRIALS:
        raise SystemExit(f"the study ended with {status} and {kept} of {TRIALS} trials")
    more = 1e3 * (took - alone) * JOBS / TRIALS
    print(
        f"{TRIALS} trials of {SECONDS:g} s, {JOBS} workers: study {took:.1f} s, bare {alone:.1f} s"
    )
    print(f"ratio {took / alone:.3f}; {more:.0f} ms of a worker more per trial, start and end too;")
    print(f"the first trial began after {begun:.1f} s")


async def pretend(address: str, count: int) -> None:
    """Be ``count`` workers of a scheduler, whose trials compute nothing."""
    from distributed import Worker

    from gq_triton.study.design.trial import Record
    from gq_triton.study.run import worker
    from gq_triton.study.trials.environment import environment

    known = environment(torch.device("cpu"))

    def work(trial: Any, data: Any) -> Record:
        time.sleep(random.uniform(5, 15))
        score = random.random()
        result = {"diverged_at": None, "validation_score": score, "validation_loss": score,
                  "test": {"loss": score}, "score": score, "steps_to_target": None,
                  "train_loss": score, "curve": [], "losses": [], "series": {}}  # fmt: skip
        return Record(trial, result, {"seconds": 0.0, "seconds_to_target": None}, known)

    worker.work = work  # the command sends the function's name alone
    workers = [await Worker(address, nthreads=1, memory_limit=0) for _ in range(count)]
    await asyncio.gather(*(one.finished() for one in workers))


def measure_workers() -> None:
    """Print what the scheduler and the command of a study take with 256 workers."""
    import psutil
    from distributed import Client

    address, quiet = "tcp://127.0.0.1:8799", subprocess.DEVNULL
    dask = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--port", "8799"]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running:

        def start(process: "subprocess.Popen[bytes]") -> psutil.Process:
            running.callback(process.wait)
            running.callback(process.kill)
            return psutil.Process(process.pid)

        scheduler = start(subprocess.Popen([*dask, "--no-dashboard"], stderr=quiet))
        for _ in range(PROCESSES):
            start(subprocess.Popen([sys.executable, __file__, "--pretend", address]))
        with Client(address, timeout=60) as client:
            client.wait_for_workers(WORKERS, timeout=600)
        words = "--scheduler", address, "--trials", "1024", "--tuning-seeds", "3"
        command = start(study(f"{folder}/study", *words))
        trials = Path(f"{folder}/study/trials")
        while len(list(trials.glob("*.json"))) < WORKERS:
            time.sleep(1)

        def used() -> list[float]:
            return [sum(one.cpu_times()[:2]) for one in (scheduler, command)]

        before, kept, started = used(), len(list(trials.glob("*.json"))), time.monotonic()
        time.sleep(WATCHED)
        took = time.monotonic() - started
        shares = [100 * (new - old) / took for new, old in zip(used(), before, strict=True)]
        rate = (len(list(trials.glob("*.json"))) - kept) / took
    print(f"{WORKERS} workers, empty trials of 5 to 15 s: {rate:.1f} trials a second")
    print(f"of a core the scheduler takes {shares[0]:.1f} %, the command {shares[1]:.1f} %")


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description="What the engine of studies costs.")
    parser.add_argument("--only", choices=["trials", "workers"])
    parser.add_argument("--pretend", metavar="ADDRESS", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.pretend:
        asyncio.run(pretend(given.pretend, WORKERS // PROCESSES))
        return
    if given.only != "workers":
        measure_trials()
    if given.only != "trials":
        measure_workers()


if __name__ == "__main__":
    main()
