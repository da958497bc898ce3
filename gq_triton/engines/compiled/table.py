"""Tables of addresses: one call of a loop covers many tensors.

What a step's tensors have in common is found once and kept with the optimizer's plan. From step to
step only the addresses of the gradients change, so a step costs the host little more than to read
them, however many tensors there are.

Shape legend: L = queue slots, P = elements of one tensor, N = tensors, M = pieces of work.
"""

from collections.abc import Sequence
from functools import partial
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gq_triton.engines.compiled.jit import exact, vector
from gq_triton.engines.compiled.law import DTYPES, exact_scale
from gq_triton.engines.compiled.threads import CHUNK, run
from gq_triton.float8 import BYTE, slots
from gq_triton.law import Law

__all__ = [
    "GRAD", "QUEUE", "STRIDE", "VECTORS", "Table", "Turns", "addresses", "chosen", "count_",
    "pieces_of", "run_pieces", "table_of",
]  # fmt: skip

# Columns of a table: addresses of the gradient, the ring and its counter, the distance of the
# ring's rows in elements, then addresses of up to four further tensors.
GRAD, QUEUE, QUEUED, STRIDE, VECTORS = range(5)
_WIDTH = VECTORS + 4
# What a tensor costs beside its elements, in elements.
_OVERHEAD = 512


class Table:
    """The tensors of one call.

    Attributes:
        rows: ``(N, 8)`` int64, one row per tensor.
        pieces: ``(M, 3)`` int64: of each piece its tensor, first element and end.
        kind: numpy's type of the tensors' numbers, or None where the loops do not know it.
        in_bytes: whether the rings are in bytes.
        code: a number of the type of the rings.
        slots: L.
        fits: ``(N,)`` bool, which tensors lie in memory as the loops take them.
    """

    def __init__(
        self,
        grads: Sequence[Tensor],
        queues: Sequence[Tensor],
        queued: Sequence[Tensor],
        others: Sequence[Sequence[Tensor]],
        counters: Sequence[Sequence[Tensor]],
    ) -> None:
        dtype, ring = grads[0].dtype, queues[0].dtype
        self.in_bytes, self.slots = ring == BYTE, slots(queues[0])
        known = dtype in DTYPES and all(column[0].dtype == dtype for column in others)
        known &= ring == dtype or (self.in_bytes and dtype == torch.float32)
        self.kind: Any = DTYPES[dtype] if known else None
        self.code = np.uint8(0) if self.in_bytes else DTYPES.get(dtype, float)(0)
        self.fits = np.array(
            [
                all(map(_is_plain, vectors, repeat(dtype)))
                and (queue.dtype, len(queue)) == (ring, len(queues[0]))
                and (queue.stride(1) == 1 or queue.shape[1] < 2)
                for queue, *vectors in zip(queues, grads, *others, strict=True)
            ]
        )
        self.rows = np.zeros((len(grads), _WIDTH), np.int64)
        self.rows[:, STRIDE] = [queue.stride(0) for queue in queues]
        columns = {QUEUE: queues, QUEUED: queued}
        columns |= {VECTORS + place: tensors for place, tensors in enumerate((*others, *counters))}
        for place, tensors in columns.items():
            self.rows[:, place] = list(map(Tensor.data_ptr, tensors))
        self.pieces = pieces_of(grads)

    def at(self, grads: Sequence[Tensor]) -> "Table":
        """Enter the addresses of the gradients; return the table."""
        self.rows[:, GRAD] = addresses(grads)
        return self


class Turns:
    """The use of N rings in one step; see `gq_triton.engines.eager.law.Turn`.

    Attributes:
        used: E.
        act: ``(N,)`` bool, for which tensors the loops compute weights.
        slots: ``(N,)`` int64, the rows the raw gradients go to.
    """

    def __init__(self, table: Table, accepted: Tensor | None, law: Law, unscale: float) -> None:
        counts = _counts(table.rows)
        self.slots = counts % table.slots
        self.used = table.slots if law.length is None else int(law.length)
        self.act = table.fits & (counts >= table.slots)
        if accepted is not None:
            self.act &= accepted.numpy()
        self.act &= law.rho != 1.0 and table.kind is not None and exact_scale(unscale)

    def pieces(self, table: Table) -> Any:
        """Return the pieces of the tensors that act."""
        return table.pieces if self.act.all() else table.pieces[self.act[table.pieces[:, 0]]]

    @property
    def others(self) -> list[int]:
        """The places of the tensors for which the loops do not compute weights."""
        return np.flatnonzero(~self.act).tolist()


def _is_plain(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Return whether the memory holds the numbers one after the other, with their signs."""
    return tensor.dtype == dtype and tensor.is_contiguous() and not tensor.is_neg()


def chosen(tensors: Sequence[Tensor], places: list[int]) -> Sequence[Tensor]:
    """Return the tensors at some places, in order."""
    return tensors if len(places) == len(tensors) else [tensors[place] for place in places]


def table_of(
    grads: Sequence[Tensor],
    queues: Sequence[Tensor],
    queued: Sequence[Tensor],
    others: Sequence[Sequence[Tensor]] = (),
    counters: Sequence[Sequence[Tensor]] = (),
) -> Table:
    """Return the table of a call of at least one tensor, from the memo that the lists share.

    Args:
        grads: N gradients ``(P,)``. See `gq_triton.optim.batches.Flats` for their memo.
        queues: N rings.
        queued: N counters, 0-d int64.
        others: lists of N tensors ``(P,)``.
        counters: lists of N 0-d tensors.
    """
    memo = getattr(grads, "memo", None)
    if memo is None or getattr(queues, "memo", None) is not memo:
        return Table(grads, queues, queued, others, counters).at(grads)
    key = "numba", len(others), len(counters)
    if key not in memo:
        memo[key] = Table(grads, queues, queued, others, counters)
    return memo[key].at(grads)


def run_pieces(kernel: Any, pieces: Any, numbers: Any, *arguments: Any) -> None:
    """Run a loop over pieces of work on as many threads as torch uses.

    Args:
        kernel: takes pieces, their numbers, and the arguments.
        pieces: ``(M, 3)``; see `Table`.
        numbers: M or more rows of numbers; a piece's row goes to the kernel with it.
        *arguments: further arguments of the kernel.
    """
    work = np.cumsum(pieces[:, 2] - pieces[:, 1] + _OVERHEAD) // CHUNK
    ends = [*(np.flatnonzero(np.diff(work)) + 1).tolist(), len(pieces)]
    starts = [0, *ends[:-1]]
    # The last first: their gradients may still be in cache from the search for NaNs.
    run(
        [
            partial(kernel, pieces[a:b], numbers[a:b], *arguments)
            for a, b in zip(reversed(starts), reversed(ends), strict=True)
            if a < b
        ]
    )


def addresses(tensors: Sequence[Tensor]) -> Sequence[int]:
    """Return the addresses of tensors; a sequence may hold them in ``addresses``."""
    known = getattr(tensors, "addresses", None)
    return list(map(Tensor.data_ptr, tensors)) if known is None else known


def pieces_of(tensors: Sequence[Tensor]) -> Any:
    """Return the pieces of tensors of any length: tensor, first element, end."""
    numels = np.array(list(map(Tensor.numel, tensors)), np.int64)
    counts = -(-numels // CHUNK)
    owner = np.repeat(np.arange(len(numels)), counts)
    before = np.repeat(np.cumsum(counts) - counts, counts)
    start = (np.arange(len(owner)) - before) * CHUNK
    return np.stack([owner, start, np.minimum(start + CHUNK, numels[owner])], axis=1)


@exact()
def _counts(rows):
    counts = np.empty(len(rows), np.int64)
    for n in range(len(rows)):
        counts[n] = vector(rows[n, QUEUED], 1, np.int64(0))[0]
    return counts


@exact()
def count_(rows, act):
    """Count one more queued gradient in the rings that act."""
    for n in range(len(rows)):
        if act[n]:
            vector(rows[n, QUEUED], 1, np.int64(0))[0] += 1
