# pyright: basic, reportArgumentType=false
"""Device side of every launch: the search for a program's chunk, and the counters of steps.

Shape legend: N = tensors, L = queue slots, P = elements of one tensor, W = columns of a table.
"""

import triton
import triton.language as tl

from gq_triton.kernels.launch import THREADS

# Columns that every table has, in this order.
NUMEL = tl.constexpr(0)
INDEX = tl.constexpr(1)
GRAD = tl.constexpr(2)
# Columns of tables with a ring buffer; the operation's own follow.
QUEUED = tl.constexpr(3)
QUEUE = tl.constexpr(4)
STRIDE = tl.constexpr(5)
# Tensors whose counters one program advances at a time: one per thread.
_TURNS = tl.constexpr(THREADS)


@triton.jit
def find_tensor(starts, n_tensors, chunk):
    """Return the last row whose first chunk is at most ``chunk``: never that of an empty tensor.

    Example: ``starts = [0, 2, 2, 5]`` (tensor 1 is empty), chunk 2 gives row 2.
    """
    low = tl.full((), 0, tl.int32)
    high = tl.full((), n_tensors, tl.int32)
    while high - low > 1:
        middle = (low + high) // 2
        below = tl.load(starts + middle) <= chunk
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def chunk_bounds(starts, row, tensor, chunk, CHUNK: tl.constexpr):
    """Return the chunk's first element (int64) and its number of elements (int32)."""
    first = (chunk - tl.load(starts + tensor)) * CHUNK
    count = tl.minimum(tl.load(row + NUMEL) - first, CHUNK)
    return first, count.to(tl.int32)


@triton.jit
def typed(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return an int64 address as a pointer; vector loads need the hint that ALIGNED gives."""
    pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def ring_turn(row, finite_ptr, L: tl.constexpr):
    """Return the slot to overwrite, whether the law acts, and whether the gradient is queued."""
    queued = tl.load(typed(tl.load(row + QUEUED), tl.int64, False))
    finite = tl.full((), True, tl.int1)
    if finite_ptr is not None:
        finite = tl.load(finite_ptr + tl.load(row + INDEX)) != 0
    return queued % L, (queued >= L) & finite, finite


@triton.jit
def unless_found_inf(count, found_inf_ptr):
    """Return ``count``, or 0 where a loss scaler skips the step."""
    if found_inf_ptr is not None:
        count = tl.where(tl.load(found_inf_ptr) != 0, 0, count)
    return count


@triton.jit
def count_when_last(
    rows, n_tensors, ticket, finite_ptr, found_inf_ptr, W: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Advance the counters of all tensors of a launch, in the program that gets here last.

    Every program of the launch calls this function once, at its end. Each takes a number from
    ``ticket``. Whoever takes the last one knows that no other program will read a counter any more:
    it advances them all, and puts the ticket back to 0 for the next launch. No program waits for
    another.

    Args:
        rows: the table's rows.
        n_tensors: the number of rows.
        ticket: one int64, 0 when the launch begins.
        finite_ptr: as in `count`.
        found_inf_ptr: as in `count`.
        W: columns of a row.
        STEP: as in `count`.
    """
    tl.debug_barrier()  # every thread of this program has read its counters
    if tl.atomic_add(ticket, 1) == tl.num_programs(0) - 1:
        tl.store(ticket, 0)
        for at in range(0, n_tensors, _TURNS):
            tensor = at + tl.arange(0, _TURNS)
            row = rows + tensor.to(tl.int64) * W
            count(row, tensor < n_tensors, finite_ptr, found_inf_ptr, STEP)


@triton.jit
def count(row, mask, finite_ptr, found_inf_ptr, STEP: tl.constexpr):
    """Add ``finite`` to the queue counters of some tensors and 1 to their steps.

    Args:
        row: pointers to the tensors' rows, ``(BLOCK,)`` or one.
        mask: which of them to use.
        finite_ptr: uint8 over all tensors of the call, 1 where the gradient was queued, or None.
        found_inf_ptr: non-zero where no counter may advance, one float32, or None.
        STEP: the column that holds the address of a float32 step, or 0.

    Example: ``finite = [1, 0]`` turns queue counters 5, 5 into 6, 5 and steps 5, 5 into 6, 6.
    """
    one = unless_found_inf(tl.full((), 1, tl.int32), found_inf_ptr)
    amount = one.to(tl.int64)
    if finite_ptr is not None:
        index = tl.load(row + INDEX, mask=mask, other=0)
        amount = amount * tl.load(finite_ptr + index, mask=mask, other=0)
    queued = tl.load(row + QUEUED, mask=mask, other=0).to(tl.pointer_type(tl.int64))
    tl.store(queued, tl.load(queued, mask=mask, other=0) + amount, mask=mask)
    if STEP > 0:
        step = tl.load(row + STEP, mask=mask, other=0).to(tl.pointer_type(tl.float32))
        tl.store(step, tl.load(step, mask=mask, other=0.0) + one, mask=mask)
