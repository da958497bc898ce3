"""The trials of a study on dask: workers of this machine, or those of a scheduler elsewhere.

The records on disk are the truth. Dask is told which trials are missing, and nothing else: a worker
or a scheduler that is lost costs the trials under way.
"""

import logging
import os
import queue
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gq_triton.commands.refusal import Refusal
from gq_triton.study.design.protocol import Cell, missing
from gq_triton.study.design.trial import Record, Trial
from gq_triton.study.run.pace import Pace
from gq_triton.study.run.records import Store

__all__ = ["resources", "run_study"]

# Trials that the scheduler knows at a time; it gives them also to workers that join later.
_KNOWN = 1000
_PLENTY = 500
_CONNECT = 30.0  # seconds in which a scheduler elsewhere must answer
_LOOK = 2.0  # seconds after which the scheduler is looked at, although no trial has finished


def run_study(
    cells: list[Cell],
    store: Store,
    *,
    jobs: int,
    data: Path | None,
    done: Callable[[Record], None],
    scheduler: str | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> None:
    """Run every trial of a study that has no record yet, and write the records.

    The evaluation of a cell starts as soon as the cell is tuned. Results do not depend on the
    number of workers: each trial computes with one thread.

    Args:
        cells: cells of the study.
        store: records of the study; trials that have one are not run again.
        jobs: number of worker processes on this machine.
        data: folder with the files of tasks that need some.
        done: called with every new record.
        scheduler: address of a dask scheduler whose workers run the trials in place of ``jobs``
            processes of this machine, such as ``tcp://10.0.0.1:8786``.
        note: called with what a user should know meanwhile.

    Raises:
        Refusal: there is no scheduler at the address, it was lost, or a trial cannot be run.
    """
    if not any(missing(cell, store) for cell in cells):
        return  # nothing to start workers for
    with _client(jobs, scheduler) as client:
        _Run(client, cells, store, data, done).go(note if scheduler else lambda text: None)


def resources(trial: Trial) -> dict[str, float]:
    """Return the resources of a dask worker that a trial takes, on a scheduler elsewhere."""
    if trial.device == "cuda":
        return {"GPU": trial.processes}
    return {"CPU": trial.processes} if trial.processes > 1 else {}


class _Run:
    """The trials that dask knows of and those still to come."""

    def __init__(
        self,
        client: Any,
        cells: list[Cell],
        store: Store,
        data: Path | None,
        done: Callable[[Record], None],
    ) -> None:
        self.client, self.store, self.data, self.done = client, store, data, done
        self.open_cells = list(enumerate(cells))
        self.running: dict[str, Any] = {}
        self.ready: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.limited = client.cluster is None  # workers elsewhere say what they have
        self.pace, self.behind = Pace(), False  # of looks for trials that can start

    def go(self, note: Callable[[str], None]) -> None:
        """Run until no trial is missing."""
        self._submit()
        waiting = False
        while self.running:
            finished = self._finished()
            for future in finished:
                self._take(future)
            self.behind |= bool(finished)
            # While dask knows of plenty no worker waits for the look.
            if self.behind and (len(self.running) < _PLENTY or not self.pace.wait):
                with self.pace.taken():
                    self._submit()
                self.behind = False
            if finished:
                waiting = False
            elif not waiting and self._nobody():
                waiting = True
                note(f"waiting for workers{self._wanted()}")

    def _submit(self) -> None:
        """Give dask the trials that can start; forget the cells that are complete."""
        from gq_triton.study.run.worker import work

        for number, cell in list(self.open_cells):
            todo = missing(cell, self.store)
            if not todo:
                self.open_cells.remove((number, cell))
            for trial in todo:
                if len(self.running) >= _KNOWN:
                    return
                if trial.key in self.running:
                    continue
                future = self.client.submit(
                    work,
                    trial,
                    self.data,
                    key=f"trial-{trial.key}",
                    priority=-number,  # the first cells first
                    resources=(resources(trial) or None) if self.limited else None,
                )
                self.running[trial.key] = future
                future.add_done_callback(lambda one, key=trial.key: self.ready.put((key, one)))

    def _finished(self) -> list[tuple[str, Any]]:
        """Return the futures that finished, after a wait for the first; none after a long one."""
        try:
            wait = min(_LOOK, self.pace.wait) if self.behind else _LOOK
            found = [self.ready.get(timeout=wait)]
        except queue.Empty:
            if self.client.status == "closed":
                raise Refusal(_LOST) from None
            # A scheduler that has come back has forgotten them.
            return [(k, f) for k, f in self.running.items() if f.status in ("lost", "cancelled")]
        while not self.ready.empty():
            found.append(self.ready.get())
        return found

    def _take(self, finished: tuple[str, Any]) -> None:
        """Keep the record of a future; a future that dask has lost is asked for again."""
        from distributed.scheduler import KilledWorker

        key, future = finished
        if self.running.get(key) is not future:
            return
        del self.running[key]
        try:
            record = future.result()
        except CancelledError:
            if self.client.status == "closed":
                raise Refusal(_LOST) from None
            return
        except KilledWorker as error:
            raise Refusal(_KILLED) from error
        self.store.add(record)
        self.done(record)

    def _nobody(self) -> bool:
        """Return whether no worker has what one of the trials needs."""
        if not self.limited or self.client.status != "running":
            return False
        workers = self.client.scheduler_info()["workers"].values()
        needed = self._needed()
        return not any(
            all(worker["resources"].get(name, 0) >= least for name, least in needed.items())
            for worker in workers
        )

    def _needed(self) -> dict[str, float]:
        return resources(self.open_cells[0][1].tuning[0][0])

    def _wanted(self) -> str:
        needed = " ".join(f"{name}={least:g}" for name, least in self._needed().items())
        return f" that were started with --resources {needed}" if needed else ""


_LOST = (
    "the scheduler was lost: what is finished is kept; run the same command again when there is one"
)
_KILLED = (
    "a worker process was killed again and again, perhaps for want of memory: what is finished is "
    "kept; run the same command again, with fewer workers if it happens again"
)


@contextmanager
def _client(jobs: int, scheduler: str | None) -> Iterator[Any]:
    """Connect to a scheduler, or start one with workers on this machine and end it afterwards."""
    from distributed import Client, LocalCluster

    # What dask would log on the way is said by the command, in a line.
    for name in ("distributed", "distributed.client"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if scheduler is not None:
        try:
            client = Client(scheduler, timeout=_CONNECT, set_as_default=False)
        except (OSError, ValueError, TypeError) as error:
            raise Refusal(f"there is no dask scheduler at {scheduler}: {error}") from error
        with client:
            yield client
        return
    cluster = LocalCluster(
        n_workers=jobs,
        threads_per_worker=1,
        processes=True,
        memory_limit=None,  # dask would stop workers that take more than their share
        dashboard_address=":0",  # any free port
        silence_logs=logging.CRITICAL,
        preload=["gq_triton.study.run.worker"],
    )
    client = Client(cluster, set_as_default=False)
    try:
        yield client
    except BaseException:  # Ctrl-C or a failure: the trials under way are not waited for
        for nanny in cluster.workers.values():
            if nanny.pid is not None:
                os.kill(nanny.pid, signal.SIGTERM)
        raise
    finally:
        client.close()
        cluster.close()
