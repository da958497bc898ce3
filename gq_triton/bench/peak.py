"""The peak memory of a step above what is held between steps.

On the CPU it is measured in a process of its own, in which a freed tensor returns its pages at
once: resident memory is then held memory. Linux alone tells a process its peak.
"""

import contextlib
import ctypes
import gc
import sys
from collections.abc import Callable
from typing import Any

import torch

from gq_triton.bench.harness import Step
from gq_triton.testing import server

__all__ = ["in_process", "of_step", "peak"]

_PATIENCE = 120.0  # seconds


def peak(step: Step, device: torch.device) -> int:
    """Return the bytes that a step takes above what is held before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")  # from here on VmHWM is the peak
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(entry: str) -> int:
    with open("/proc/self/status") as lines:
        line = next(line for line in lines if line.startswith(entry))
    return 1024 * int(line.split()[1])


def in_process(context: Any, function: Callable[..., Any], *args: Any) -> Any:
    """Return what a function returns in a new process, or None if that died or took too long.

    Args:
        context: of ``multiprocessing``.
        function: what runs there.
        args: its arguments.
    """
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sending, function, args))
    process.start()
    sending.close()
    found = None
    with contextlib.suppress(EOFError):
        if receiving.poll(_PATIENCE):
            found = receiving.recv()
    process.join(timeout=1.0)
    process.kill()
    process.join()
    return found


def _send(sending: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD
    sending.send(function(*args))


def of_step(maker: Callable[..., Step], job: tuple[Any, ...], threads: int) -> int | None:
    """Return the peak of the step that ``maker(*job)`` returns, on the CPU.

    Args:
        maker: a function of a module.
        job: its arguments.
        threads: of the process.

    Returns:
        Bytes; None where the process failed or the system does not tell.
    """
    if sys.platform != "linux":
        return None
    return in_process(server(), _measure, maker, job, threads)


def _measure(maker: Callable[..., Step], job: tuple[Any, ...], threads: int) -> int:
    torch.set_num_threads(threads)
    return peak(maker(*job), torch.device("cpu"))
