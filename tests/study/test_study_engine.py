"""Studies on dask: workers that come late or are killed, a scheduler that is lost."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from study_trials import OPTIONS, run_here, trial

from gq_triton.commands.refusal import Refusal
from gq_triton.study.design.config import StudyConfig
from gq_triton.study.design.protocol import cells
from gq_triton.study.report.results import collect, results_csv
from gq_triton.study.run import guard, runner
from gq_triton.study.run.records import Store
from gq_triton.testing import server

STEPS = OPTIONS | {"steps": 40, "batch_sizes": [16], "arms": ["sgdm", "gq-sgdm"]}


class Study(threading.Thread):
    """A study that runs on a scheduler, in a thread."""

    def __init__(self, folder, address):
        super().__init__(daemon=True)
        self.store = Store(folder)
        self.store.load()
        self.address, self.notes, self.finished, self.error = address, [], 0, None
        self.start()

    def run(self):
        try:
            runner.run_study(
                cells(StudyConfig.of(STEPS)), self.store, jobs=1, data=None, done=self.done,
                scheduler=self.address, note=self.notes.append,
            )  # fmt: skip
        except Refusal as reason:
            self.error = str(reason)

    def done(self, record):
        self.finished += 1


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def cluster(monkeypatch):
    """Yield a cluster whose workers need not import torch anew; test_study_command.py's must."""
    import dask.config
    from distributed import LocalCluster, utils

    monkeypatch.setattr(utils, "_forkserver_preload_set", True)  # dask would set its own modules
    server()
    with (
        dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}),
        LocalCluster(
            n_workers=0, threads_per_worker=1, memory_limit=None, dashboard_address=":0",
            silence_logs=logging.CRITICAL, preload=["gq_triton.study.run.worker"],
        ) as found,
    ):  # fmt: skip
        yield found


def rows(folder):
    store = Store(folder)
    assert store.load() == 0
    return results_csv(collect(cells(StudyConfig.of(STEPS)), store))


@pytest.mark.slow
def test_lost_workers_and_schedulers_cost_only_the_trials_under_way(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_LOOK", 0.1)
    monkeypatch.setattr(runner, "_CONNECT", 3.0)
    study = Study(tmp_path / "study", cluster.scheduler_address)
    wait_until(lambda: study.notes)
    assert study.notes == ["waiting for workers"]
    cluster.scale(1)  # a machine that joins late
    wait_until(lambda: study.finished >= 2)
    (worker,) = cluster.workers.values()
    os.kill(worker.pid, signal.SIGKILL)
    before = study.finished
    wait_until(lambda: study.finished > before + 1)  # dask has started another
    cluster.close()
    study.join(60)
    assert not study.is_alive()
    assert study.error is not None
    assert "the scheduler was lost: what is finished is kept" in study.error
    kept = sorted(path.name for path in (tmp_path / "study" / "trials").glob("*.json"))
    assert study.finished == len(kept)
    every = cells(StudyConfig.of(STEPS))
    rerun = []
    again = Store(tmp_path / "study")
    again.load()
    run_here(every, again, data=None, done=rerun.append)
    assert rerun
    assert not {f"{record.trial.key}.json" for record in rerun} & set(kept)
    run_here(every, Store(tmp_path / "alone"), data=None, done=lambda record: None)
    assert rows(tmp_path / "study") == rows(tmp_path / "alone")


def test_no_scheduler_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_CONNECT", 0.2)
    with pytest.raises(Refusal, match=r"there is no dask scheduler at tcp://127\.0\.0\.1:9"):
        runner.run_study(
            cells(StudyConfig.of(STEPS)), Store(tmp_path), jobs=1, data=None,
            done=lambda record: None, scheduler="tcp://127.0.0.1:9",
        )  # fmt: skip


def test_a_trial_takes_a_gpu_or_a_core_for_each_of_its_processes():
    assert runner.resources(trial()) == {}
    assert runner.resources(trial(processes=2)) == {"CPU": 2}
    assert runner.resources(trial(device="cuda")) == {"GPU": 1}
    assert runner.resources(trial(device="cuda", processes=4)) == {"GPU": 4}


def test_a_guarded_command_ends_with_the_process_that_waits_for_it(tmp_path):
    code, said = guard.guarded([sys.executable, "-c", "print('said'); raise SystemExit(3)"])
    assert (code, said) == (3, "said\n")
    with pytest.raises(FileNotFoundError, match="no-such-program: No such file"):
        guard.guarded(["no-such-program"])
    # The command is a shell that starts another process, which would outlive it.
    path = tmp_path / "pid"
    words = ["sh", "-c", f"sleep 60 & echo $! > {path}; wait"]
    outer = f"import guard; guard.guarded({words!r})"
    process = subprocess.Popen([sys.executable, "-c", outer], cwd=Path(guard.__file__).parent)
    wait_until(lambda: path.exists() and path.read_text().endswith("\n"))
    process.kill()
    process.wait()
    sleeper = int(path.read_text())
    wait_until(lambda: not alive(sleeper))


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
