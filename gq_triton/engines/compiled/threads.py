"""Independent pieces of work on as many threads as torch uses."""

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch

__all__ = ["CHUNK", "Job", "chunks", "run"]

# Elements of one piece of work: large against the cost of a call, small enough to balance threads.
CHUNK = 1 << 18

Job = Callable[[], Any]


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Return the worker threads; a forked child has another process id, hence other threads."""
    return ThreadPoolExecutor(threads, thread_name_prefix="gq_triton")


def run(jobs: list[Job]) -> None:
    """Run jobs that do not depend on each other on as many threads as torch uses."""
    threads = min(torch.get_num_threads(), len(jobs))
    if threads <= 1:
        for job in jobs:
            job()
        return
    left = deque(jobs)  # a thread that has to share its core takes fewer of them

    def work() -> None:
        while left:
            try:
                job = left.popleft()
            except IndexError:  # another thread was faster
                return
            job()

    helpers = [_pool(os.getpid(), threads - 1).submit(work) for _ in range(threads - 1)]
    work()
    for helper in helpers:
        helper.result()


def chunks(numel: int) -> list[tuple[int, int]]:
    """Return the pieces of a tensor: first element and end."""
    return [(start, min(start + CHUNK, numel)) for start in range(0, numel, CHUNK)]
