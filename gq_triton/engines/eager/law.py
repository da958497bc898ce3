"""The law on blocks of a ring: which rows one step reads, and which slot it writes.

Shape legend: L = queue slots, E = effective length, P = elements of one parameter, N = tensors.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from gq_triton.float8 import BYTE, decode, replace_, slots
from gq_triton.law import Law, Spread, compute_type, to_queue

__all__ = ["BLOCK", "Turn", "blocks", "flags", "put_"]

# Elements worked on at a time: 256 KiB of float32, so that a block's intermediates stay in L2.
BLOCK = 65536


class Turn:
    """The use of one parameter's ring in one step: rows to read and the row to write.

    Attributes:
        rows: the rows the statistics use, newest first; empty where every weight is 1.
        slot: the row the raw gradient goes to, or None where it is not queued.
        law: the law of the step.
    """

    def __init__(self, queue: Tensor, queued: Tensor, accepted: bool, law: Law) -> None:
        length, count = slots(queue), int(queued)
        oldest = count % length
        self.law = law
        self.slot = oldest if accepted else None
        self.rows: list[int] = []
        if accepted and count >= length and law.rho != 1.0:
            used = length if law.length is None else int(law.length)
            self.rows = [(oldest - 1 - age) % length for age in range(used)]

    def spread(self, queue: Tensor, dtype: torch.dtype) -> Spread | None:
        """Return the statistics of a block of the ring ``(L, n)``; None where every weight is 1."""
        if not self.rows:
            return None
        queue = decode(queue) if queue.dtype == BYTE else queue
        return Spread.of([queue[row].to(dtype) for row in self.rows])

    def block(self, grad: Tensor, queue: Tensor, unscale: float) -> Tensor:
        """Queue one block and return its weights; 1 as a 0-d tensor where every weight is 1.

        Args:
            grad: raw gradients ``(n,)``, multiplied by the loss scale where there is one.
            queue: the ring's columns ``(L, n)``.
            unscale: the factor that removes the loss scale.
        """
        raw = grad if unscale == 1.0 else grad * unscale
        stored = to_queue(raw, queue.dtype)
        dtype = compute_type(grad, queue)
        spread = self.spread(queue, dtype)
        weights = grad.new_ones(())
        if spread is not None:
            weights = spread.weight(stored.to(dtype), self.law.rho)
        if self.slot is not None:
            put_(queue, self.slot, stored)
        return weights


def put_(queue: Tensor, slot: int, stored: Tensor) -> None:
    """Write a block of gradients, rounded by ``law.to_queue``, over one row of a ring's block."""
    if queue.dtype == BYTE:
        replace_(queue, slot, stored)
    else:
        queue[slot].copy_(stored)


def flags(accepted: Tensor | None, count: int) -> list[bool]:
    """Return on the host which of ``count`` gradients are accepted."""
    return [True] * count if accepted is None else accepted.tolist()


def blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the tensors' blocks along their last dimension, which all of them share."""
    return zip(*(tensor.split(BLOCK, dim=-1) for tensor in tensors), strict=True)
