"""What the tests measure with, distances in units in the last place, and what spawns their ranks.

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
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["assert_ulps", "spawn", "ulp_distance", "weight_ulps"]


def weight_ulps(rho: float, length: int) -> float:
    """Return how many ulps a weight may be from the exact one: ``8 + 4 * rho * sqrt(length)``.

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
        scale: the ulp is that of this magnitude ``(*)``; default ``expected``. A sum whose terms
            cancel is measured at the size of its terms.

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


def spawn(world_size: int, fn: Callable[..., None], *args: Any, timeout: float = 120.0) -> None:
    """Run ``fn(rank, *args)`` in ``world_size`` processes that form a gloo group on this machine.

    Args:
        world_size: processes, and threads to share: each rank computes with one.
        fn: a function at the top of a module that a new process can import.
        args: what can be pickled.
        timeout: seconds until a rank that hangs writes where every thread stands, and ends.

    Raises:
        AssertionError: a rank failed; the message holds the traceback of every rank that wrote one,
            the first to fail first.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(
                target=_run_rank, args=(rank, world_size, fn, args, folder, timeout), daemon=True
            )
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        running = list(ranks)
        # After a failure the others get a moment to say what they saw of it.
        patience = None
        while running and wait([process.sentinel for process in running], patience):
            running = [process for process in running if process.is_alive()]
            if any(process.exitcode for process in ranks):
                patience = 5.0
        for process in running:
            process.kill()
        for process in ranks:
            process.join()
        codes = [process.exitcode for process in ranks]
        reports = sorted(Path(folder).glob("rank*.txt"), key=lambda path: path.stat().st_mtime_ns)
        texts = [f"{path.stem}:\n{path.read_text()}" for path in reports if path.stat().st_size]
    if any(codes):
        raise AssertionError("\n".join([f"the ranks ended with exit codes {codes}", *texts]))


def _run_rank(
    rank: int,
    world_size: int,
    fn: Callable[..., None],
    args: tuple[Any, ...],
    folder: str,
    timeout: float,
) -> None:
    """Be one rank of ``spawn``."""
    torch.set_num_threads(1)
    code = 0
    with open(Path(folder, f"rank{rank}.txt"), "w") as report:
        faulthandler.dump_traceback_later(timeout, exit=True, file=report)
        try:
            dist.init_process_group(
                "gloo",
                init_method=Path(folder, "rendezvous").as_uri(),
                rank=rank,
                world_size=world_size,
            )
            fn(rank, *args)
            # A rank must not leave while another still waits for it, nor with a DDP module alive.
            gc.collect()
            dist.barrier()
            dist.destroy_process_group()
        except BaseException:  # noqa: BLE001  the process ends here: whatever it was is reported
            code = 1
            traceback.print_exc(file=report)
    sys.stdout.flush()
    sys.stderr.flush()
    # gloo's threads may abort an interpreter that shuts down (pytorch#190489).
    os._exit(code)
