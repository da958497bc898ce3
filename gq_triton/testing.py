"""Tools of the tests: distances in units in the last place, and processes that form a group.

An element-wise result is compared with the float64 oracle in units in the last place (ulps) of its
own type, so that one bound serves every magnitude.
"""

import faulthandler
import gc
import math
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, SpawnContext

__all__ = ["Ranks", "assert_ulps", "spawn", "ulp_distance", "weight_ulps"]


# Modules that the fork server imports once, when it starts; all ranks are forked from that server.
# One that is not installed is left out: the compiled engine needs Numba.
PRELOAD = ["torch", "torch._dynamo", "gq_triton.dist", "gq_triton.engines.compiled"]


def weight_ulps(rho: float, length: int) -> float:
    """Return the ulps allowed between a weight and the exact one: ``8 + 4 * rho * sqrt(length)``.

    The rounding of ``g - mu`` is relative to ``|mu - q|`` for the row ``q`` that deviations are
    taken from, at most ``sqrt(length - 1) * sigma``; a weight that is not clipped has
    ``|g - mu| >= sigma / rho``. The 8 are for the sums, the quotient and the square root.
    """
    return 8 + 4 * rho * math.sqrt(length)


def ulp_distance(actual: Tensor, expected: Tensor, scale: Tensor | None = None) -> Tensor:
    """Return how far ``actual`` is from ``expected`` in ulps of the type of ``actual``.

    Args:
        actual: values ``(*)`` of any floating type.
        expected: what they should be, ``(*)``, usually float64.
        scale: magnitudes ``(*)`` that set the size of an ulp; default ``expected``. A sum whose
            terms cancel is measured in ulps of its terms.

    Returns:
        ``(*)`` float64: 0 where both are the same number, infinity or NaN; infinite where only one
        of them is finite.
    """
    limits = torch.finfo(actual.dtype)
    measured, truth = actual.detach().double(), expected.detach().double()
    size = truth if scale is None else scale.detach().double()
    exponent = torch.frexp(size.abs().clamp(min=limits.smallest_normal)).exponent - 1
    ulp = torch.ldexp(torch.full_like(truth, limits.eps), exponent)
    same = (measured == truth) | (measured.isnan() & truth.isnan())
    distance = ((measured - truth).abs() / ulp).nan_to_num(nan=math.inf, posinf=math.inf)
    return torch.where(same, torch.zeros_like(distance), distance)


def assert_ulps(
    actual: Tensor, expected: Tensor, ulps: float, scale: Tensor | None = None
) -> float:
    """Assert ``ulp_distance(actual, expected, scale) <= ulps`` everywhere; return the largest.

    Raises:
        AssertionError: shapes differ, or an element is too far; the message names the worst one.
    """
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} != {tuple(expected.shape)}"
    if actual.numel() == 0:
        return 0.0
    distance = ulp_distance(actual, expected, scale).flatten()
    worst = int(distance.argmax())
    largest = float(distance[worst])
    assert largest <= ulps, (
        f"element {worst} is {largest:.1f} ulps away, allowed are {ulps:.1f}: got "
        f"{float(actual.flatten()[worst])!r}, expected {float(expected.flatten()[worst])!r}"
    )
    return largest


class Ranks:
    """Processes that form one gloo group on this machine and run one function after another.

    A start costs seconds, mostly for imports; all functions that one object runs share that cost.
    The processes are forked from a server that has imported torch. They see the environment
    variables that were set when this process started its first ranks.

    Attributes:
        alive: whether the processes run; False once a function has failed, or after ``close()``.

    Args:
        world_size: number of processes; each computes with one thread.

    Examples:
        >>> import math
        >>> ranks = Ranks(2)
        >>> ranks.run(math.sqrt)  # each process calls math.sqrt(rank)
        >>> ranks.close()
    """

    def __init__(self, world_size: int) -> None:
        context = server()
        self.alive = True
        self._folder = tempfile.TemporaryDirectory()
        self._processes = []
        self._pipes: list[Connection] = []
        for rank in range(world_size):
            here, there = context.Pipe()
            args = (there, rank, world_size, self._folder.name)
            process = context.Process(target=_be_rank, args=args, daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)

    def run(self, fn: Callable[..., None], *args: Any, timeout: float = 120.0) -> None:
        """Run ``fn(rank, *args)`` in every process, with torch's random numbers seeded by 0.

        Args:
            fn: a function at the top of a module that a new process can import.
            args: what can be pickled.
            timeout: seconds after which a rank that has not finished writes the stack of every
                thread and ends.

        Raises:
            AssertionError: a rank failed; the message holds the traceback of every rank that wrote
                one, the first to fail first. All processes have been ended.
            RuntimeError: the processes had already ended.
        """
        if not self.alive:
            raise RuntimeError("these ranks have ended: make new ones")
        for pipe in self._pipes:
            # A rank that could not start is reported below.
            with suppress(BrokenPipeError):
                pipe.send((fn, args, timeout))
        running, patience = list(self._pipes), None
        while running and (ready := wait(running, patience)):
            for pipe in ready:
                assert isinstance(pipe, Connection)
                running.remove(pipe)
                try:
                    pipe.recv()
                except (EOFError, ConnectionResetError):
                    patience = 5.0  # seconds for the other ranks to report the failure too
        if patience is not None:
            self._fail()

    def _fail(self) -> None:
        """End the ranks and raise an AssertionError with their reports."""
        for process in self._processes:
            process.join(timeout=1.0)  # for one that has closed its pipe and is about to end
            process.kill()
            process.join()
        codes = [process.exitcode for process in self._processes]
        files = Path(self._folder.name).glob("rank*.txt")
        reports = sorted(files, key=lambda path: path.stat().st_mtime_ns)
        texts = [f"{path.stem}:\n{path.read_text()}" for path in reports if path.stat().st_size]
        self.close()
        raise AssertionError("\n".join([f"the ranks ended with exit codes {codes}", *texts]))

    def close(self) -> None:
        """End the processes; a second call does nothing."""
        self.alive = False
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=10.0)
            process.kill()
            process.join()
        self._folder.cleanup()


def spawn(world_size: int, fn: Callable[..., None], *args: Any, timeout: float = 120.0) -> None:
    """Run ``fn(rank, *args)`` in ``world_size`` new processes that form a gloo group.

    The arguments and what is raised are those of ``Ranks.run``.
    """
    ranks = Ranks(world_size)
    try:
        ranks.run(fn, *args, timeout=timeout)
    finally:
        ranks.close()


def server() -> "ForkServerContext | SpawnContext":
    """Return the fastest context whose processes share no state with this one, CUDA included."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def _be_rank(pipe: Connection, rank: int, world_size: int, folder: str) -> None:
    """Be one process of ``Ranks``: run what comes through the pipe until its other end closes."""
    torch.set_num_threads(1)
    gc.freeze()  # what the server has imported stays; each collection would look through all of it
    code = 0
    with open(Path(folder, f"rank{rank}.txt"), "w") as report:
        try:
            while (task := _next_task(pipe)) is not None:
                fn, args, timeout = task
                faulthandler.dump_traceback_later(timeout, exit=True, file=report)
                if not dist.is_initialized():
                    dist.init_process_group(
                        "gloo",
                        init_method=Path(folder, "rendezvous").as_uri(),
                        rank=rank,
                        world_size=world_size,
                    )
                torch.manual_seed(0)
                fn(rank, *args)
                # A rank must not go on while another waits for it, nor with a DDP module alive.
                gc.collect()
                dist.barrier()
                faulthandler.cancel_dump_traceback_later()
                pipe.send(True)
            if dist.is_initialized():
                dist.destroy_process_group()
        except BaseException:  # noqa: BLE001  the process ends here: whatever it was is reported
            code = 1
            traceback.print_exc(file=report)
    sys.stdout.flush()
    sys.stderr.flush()
    # gloo's threads may abort an interpreter that shuts down (pytorch#190489).
    os._exit(code)


def _next_task(pipe: Connection) -> tuple[Callable[..., None], tuple[Any, ...], float] | None:
    """Return what ``Ranks.run`` sent, or None once the other end is closed."""
    try:
        return pipe.recv()
    except EOFError:
        return None
