"""How steps are timed: in turns, so that drift affects all of them alike, with quantiles."""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

__all__ = ["Spread", "Step", "copy_rate", "host_seconds", "in_turns", "launches", "matmul_rate",
           "rounds", "seconds", "spread", "wait"]  # fmt: skip

Step = Callable[[], Any]
CPU = torch.device("cpu")
ENOUGH = 5.0  # seconds, after which slow steps take no further turns
_COPIED = {"cpu": 2**28, "cuda": 2**30}  # bytes, far above what caches hold


class Spread(NamedTuple):
    """The median of some values and their 20 % and 80 % quantiles."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Return median and quantiles of one value or more."""
    middle = statistics.median(values)
    if len(values) == 1:
        return Spread(middle, middle, middle)
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    return Spread(middle, cuts[0], cuts[-1])


def wait(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(
    step: Step,
    device: torch.device = CPU,
    calls: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return the seconds of one of some calls, between which nothing waits for the device.

    Args:
        step: what is timed.
        device: where it works.
        calls: how often it is called.
        clock: ``time.process_time`` counts the processor's time of this process alone.
    """
    wait(device)
    start = clock()
    for _ in range(calls):
        step()
    wait(device)
    return (clock() - start) / calls


def rounds(
    measures: Sequence[Callable[[], float]], turns: int, least: int | None = None
) -> list[list[float]]:
    """Return ``turns`` values of each measure, taken in turns.

    With ``least`` the slow ones end after so many turns or more: when five seconds have gone.
    """
    taken: list[list[float]] = [[] for _ in measures]
    end = time.monotonic() + ENOUGH
    for turn in range(turns):
        if least is not None and turn >= least and time.monotonic() > end:
            break
        for measure, values in zip(measures, taken, strict=True):
            values.append(measure())
    return taken


def in_turns(
    steps: Sequence[Step],
    turns: int,
    device: torch.device = CPU,
    calls: int = 1,
    least: int | None = None,
) -> list[list[float]]:
    """Return the seconds of each step in each turn.

    Args:
        steps: what is timed.
        turns: how often each is timed.
        device: where they work.
        calls: calls of a step in each turn, between which nothing waits.
        least: turns of slow steps, see ``rounds``.
    """
    return rounds([partial(seconds, step, device, calls) for step in steps], turns, least)


def host_seconds(step: Step, device: torch.device) -> float:
    """Return the seconds until a step returns, from an idle device on."""
    wait(device)
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def launches(step: Step) -> int:
    """Return how many kernels and copies a step gives to the GPU."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    return sum("CUDA" in str(event.device_type) for event in found.events() or ())


def copy_rate(device: torch.device, turns: int = 7) -> float:
    """Return the bytes per second that a large copy reads and writes."""
    source = torch.ones(_COPIED[device.type] // 4, device=device)
    target = torch.empty_like(source)
    (taken,) = in_turns([lambda: target.copy_(source)], turns + 1, device)
    return 2 * source.nbytes / statistics.median(taken[1:])


def matmul_rate(device: torch.device, turns: int = 5) -> float:
    """Return the operations per second of a large product of matrices in float32."""
    size = 8192 if device.type == "cuda" else 1536
    left, right = (torch.ones(size, size, device=device) for _ in range(2))
    (taken,) = in_turns([lambda: left @ right], turns + 1, device)
    return 2 * size**3 / statistics.median(taken[1:])
