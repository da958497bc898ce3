"""The statistics of a ring, stored for operations that do not read the ring.

Shape legend: L = queue slots, P = elements of one parameter.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
from torch import Tensor

from gq_triton.engines import eager
from gq_triton.engines.compiled.law import DTYPES, exact, law_arguments, spread_of
from gq_triton.engines.compiled.threads import chunks, run
from gq_triton.engines.eager.law import Turn
from gq_triton.law import Law

__all__ = ["queue_statistics"]


@cache
def _statistics_kernel(used: int) -> Callable[..., Any]:
    """Return the compiled loop that writes the mean and 1 / sigma of a ring."""
    spread = spread_of(used)

    @exact()
    def kernel(start, stop, ring, stride, slots, slot, largest, center, rate, law):
        mu, per_sigma = center[start:stop], rate[start:stop]
        for i in range(stop - start):
            j = np.uint64(start + i)
            base, mean, shrink, sigma = spread(ring, stride, slots, slot, j, law[2], law)
            mu[i] = base + mean
            per_sigma[i] = min(shrink / sigma, largest)

    return kernel


def queue_statistics(
    queue: Tensor, queued: Tensor, out: Tensor, *, length: Tensor | None = None
) -> None:
    """Write a ring's mean and 1 / sigma; see ``protocol``."""
    turn = Turn(queue, queued, True, Law(math.inf, length))
    known = queue.dtype in DTYPES and queue.dtype == out.dtype and queue.is_contiguous()
    if not (known and turn.rows and queue.numel()):
        eager.queue_statistics(queue, queued, out, length=length)
        return
    kind, used = DTYPES[queue.dtype], len(turn.rows)
    kernel, bounds = _statistics_kernel(used), law_arguments(kind, 1.0, used)
    ring, stride, slots, slot = queue.view(-1).numpy(), queue.shape[1], len(queue), turn.slot
    settled = np.finfo(kind).max, out[0].numpy(), out[1].numpy(), bounds
    run(
        [
            partial(kernel, start, stop, ring, stride, slots, slot, *settled)
            for start, stop in chunks(queue.shape[1])
        ]
    )
