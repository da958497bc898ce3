"""The law on blocks of a ring: which rows one step reads, and which slot it writes.

Shape legend: L = queue slots, E = effective length, P = elements of one parameter, N = tensors.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from gq_triton.float8 import BYTE, decode, replace_, slots
from gq_triton.law import VARIANCE_FLOOR, Law, Spread, compute_type, to_queue

__all__ = ["BLOCK", "Turn", "blocks", "flags", "put_"]

# Elements worked on at a time by each thread: few enough that what an operation leaves for the next
# is still in cache, many enough that it takes longer than its call.
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
        self._room: Tensor | None = None
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
        weights = grad.new_ones(())
        if self.rows:
            weights = self._weights(stored, queue, compute_type(grad, queue))
        if self.slot is not None:
            put_(queue, self.slot, stored)
        return weights

    def _weights(self, stored: Tensor, queue: Tensor, dtype: torch.dtype) -> Tensor:
        if len(self.rows) < 2 or queue.device.type != "cpu" or stored.numel() == 0:
            spread = self.spread(queue, dtype)
            assert spread is not None
            return spread.weight(stored.to(dtype), self.law.rho)
        queue = decode(queue) if queue.dtype == BYTE else queue
        rows = [queue[row].to(dtype) for row in self.rows]
        if self._room is None or self._room.dtype != dtype:
            self._room = rows[0].new_empty(len(rows) + 2, rows[0].numel())
        room = self._room[:, : rows[0].numel()]  # no later block is longer than the first one
        x = stored.to(dtype)
        weights = _weights_into(room, rows, x, self.law.rho, scaled=False)
        if weights is None:
            weights = _weights_into(room, rows, x, self.law.rho, scaled=True)
            assert weights is not None
        return weights


def _weights_into(
    room: Tensor, rows: list[Tensor], x: Tensor, rho: float, *, scaled: bool
) -> Tensor | None:
    """Return the weights of a block, computed in place; see ``law.Spread``.

    Scaled, deviations are divided by a power of two, so that no square underflows or overflows.
    That rounds nothing: where nothing would underflow or overflow the weights are the same bit for
    bit. So most blocks do without, and an element's weight does not depend on its neighbours.

    Args:
        room: ``(E + 2, n)``, overwritten; the weights are a row of it.
        rows: E rows ``(n,)`` of the ring, E at least 2, newest first.
        x: the gradients that are compared.
        rho: bound of the weights.
        scaled: whether deviations are scaled. If not, the result is None where they must be.
    """
    base, info = rows[0], torch.finfo(x.dtype)
    *deviations, total, squares, weights = room.unbind(0)
    for out, row in zip(deviations, rows[1:], strict=True):
        torch.sub(row, base, out=out)
    total.copy_(deviations[0])
    for deviation in deviations[1:]:
        total.add_(deviation)
    mean, inverse = total.div_(len(rows)), None
    if scaled:
        largest = torch.stack(deviations).abs_().amax(dim=0).clamp_(min=info.tiny)
        # Beyond half of the type's range the factor stays where it is, a normal number.
        exponents = torch.frexp(largest)[1].clamp_(max=1 - round(math.log2(info.tiny)))
        inverse = torch.ldexp(torch.ones_like(largest), 1 - exponents)
    first = mean if inverse is None else mean * inverse
    torch.mul(first, first, out=squares)
    for deviation in deviations:
        deviation.sub_(mean)
        if inverse is not None:
            deviation.mul_(inverse)
        squares.addcmul_(deviation, deviation)
    constant = False
    if inverse is None:
        least, most = map(float, torch.aminmax(squares))
        small = info.tiny / info.eps
        constant = least < small
        if not most <= info.max / 4 or (constant and _moves(room, small)):
            return None
    squares.div_(len(rows))
    torch.sub(x, base, out=weights).sub_(mean).abs_()
    if inverse is not None:
        squares.clamp_(min=VARIANCE_FLOOR)
        weights.mul_(inverse)
    weights.mul_(squares.rsqrt_())
    if constant:  # 0 times infinity where the gradient equals a constant queue, else infinity
        weights.nan_to_num_(nan=0.0)
    return weights.clamp_(1.0 / rho, rho)


def _moves(room: Tensor, small: float) -> bool:
    """Return whether any queue with squares below ``small`` is not constant.

    Deviations and weights are overwritten. Operations with flags of one byte take far longer.

    Args:
        room: that of `_weights_into`, with the deviations from the mean.
        small: a bound of the sum of squares.
    """
    *deviations, mean, squares, moved = room.unbind(0)
    torch.abs(mean, out=moved)
    for deviation in deviations:
        moved.add_(deviation.abs_())
    is_small = torch.lt(squares, small, out=deviations[0])
    return float(moved.mul_(is_small).amax()) > 0


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
    size = BLOCK * (torch.get_num_threads() if tensors[0].device.type == "cpu" else 1)
    return zip(*(tensor.split(size, dim=-1) for tensor in tensors), strict=True)
