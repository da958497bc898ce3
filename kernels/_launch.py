# pyright: basic
"""Host side of every launch: the chunk tables, their cache, the checks, the device guard.

A launch covers many tensors. Each is cut into chunks of `CHUNK` elements and one program works on
one chunk. The table holds one row of addresses per tensor and the cumulative chunk counts, in which
a program finds its tensor by binary search (`chunks.py`): the host's work grows with the number of
tensors, not with their size.

Shape legend: N = tensors, L = queue slots, P = elements of one tensor, W = columns of a table.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

# Elements one program works on: enough to amortise the search, few enough to fill a large GPU.
CHUNK = 16384
# Threads of a program, whatever the width of a warp.
THREADS = 256
# Widest load of a thread in bytes, hence the alignment that the fast specialisation asks for.
VECTOR = 16
TRITON_DTYPE = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}

Row = tuple[int, ...]


@dataclass(frozen=True)
class Table:
    """Addresses of the tensors of one launch, on their device.

    Attributes:
        rows: ``(N, W)`` int64, one row per tensor.
        starts: ``(N,)`` int64, the number of chunks before each tensor.
        n_tensors: N.
        n_chunks: programs of the launch.
        aligned: whether every address and every row of a ring is a multiple of 16 bytes.
        host: the source of ``rows`` and ``starts``, kept while a copy may still read it.
    """

    rows: Tensor
    starts: Tensor
    n_tensors: int
    n_chunks: int
    aligned: bool
    host: Tensor


# Gradients often come back at a few recurring sets of addresses, so a few tables are kept.
_CACHE_SIZE = 64
_cache: OrderedDict[tuple[Any, ...], list[Table]] = OrderedDict()
# A captured CUDA graph copies from these again at every replay.
_captured: list[list[Table]] = []


def device_guard(device: torch.device) -> AbstractContextManager[Any]:
    """Make ``device`` current, since Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@cache
def num_warps(device: torch.device) -> int:
    """Return the warps that make up `THREADS` threads; they have 32 or 64 threads on AMD GPUs."""
    on_gpu = device.type == "cuda"
    return THREADS // (torch.cuda.get_device_properties(device).warp_size if on_gpu else 32)


def triton_dtype(tensors: Sequence[Tensor]) -> tl.dtype:
    """Return Triton's name for the dtype that ``tensors`` share."""
    return TRITON_DTYPE[tensors[0].dtype]


def block_size(*dtypes: torch.dtype, most: int = 4) -> int:
    """Return the elements of one block: at most 16 bytes of the widest type for each thread.

    No access is then wider than a thread's share, so the compiler gives every tensor the same
    layout: an element is read and overwritten by one and the same thread. With different layouts a
    ring slot could be overwritten before another thread has read it.

    Args:
        dtypes: of all tensors of the kernel.
        most: upper bound per thread; eight elements of a ring do not fit a thread's registers.
    """
    widest = max(dtype.itemsize for dtype in dtypes)
    return min(VECTOR // widest, most) * THREADS


def tables(
    device: torch.device,
    rows: list[Row],
    dtypes: tuple[torch.dtype, ...],
    check: Callable[[], None],
    is_aligned: Callable[[Row], bool],
) -> list[Table]:
    """Return one table per alignment class that occurs, from the cache where they are there.

    Args:
        device: where the tensors are.
        rows: columns of each tensor.
        dtypes: of the lists of tensors.
        check: raises ValueError if a tensor is not as promised; called for new tables only.
        is_aligned: whether the fast specialisation may run on a row's tensor.
    """
    on_gpu = device.type == "cuda"
    capturing = on_gpu and torch.cuda.is_current_stream_capturing()
    # The copy is ordered with one stream only, so another stream gets a copy of its own.
    stream = torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
    key = (device, stream, dtypes, tuple(rows))
    found = None if capturing else _cache.get(key)
    if found is not None:
        _cache.move_to_end(key)
        return found
    check()
    classes: dict[bool, list[Row]] = {True: [], False: []}
    for row in rows:
        classes[is_aligned(row)].append(row)
    pin = on_gpu and not capturing
    built = [_build(device, part, aligned, pin) for aligned, part in classes.items() if part]
    if capturing:
        _captured.append(built)
        return built
    _cache[key] = built
    if len(_cache) > _CACHE_SIZE:
        _cache.popitem(last=False)
    return built


def _build(device: torch.device, rows: list[Row], aligned: bool, pin: bool) -> Table:
    starts, n_chunks = [], 0
    for row in rows:
        starts.append(n_chunks)
        n_chunks += -(-row[0] // CHUNK)
    if n_chunks >= 2**31:
        raise ValueError(f"one call covers fewer than 2**31 chunks of {CHUNK}, got {n_chunks}")
    flat = [value for row in rows for value in row] + starts
    host = torch.tensor(flat, dtype=torch.int64, device="cpu")  # whatever the default device is
    host = host.pin_memory() if pin else host
    both = host.to(device, non_blocking=True)
    split = len(flat) - len(rows)
    table_rows = both[:split].view(len(rows), -1)
    return Table(table_rows, both[split:], len(rows), n_chunks, aligned, host)


class RingLaunch:
    """What the launchers with a ring buffer share.

    Attributes:
        finite: ``(N,)`` uint8 or None.
        constants: the keyword arguments that all their kernels take.
        tables: one table per alignment class; columns as in `chunks.py`.
    """

    def __init__(
        self,
        grads: Sequence[Tensor],
        queues: Sequence[Tensor],
        queued: Sequence[Tensor],
        finite: Tensor | None,
        vectors: dict[str, Sequence[Tensor]],
        scalars: dict[str, Sequence[Tensor]] | None = None,
    ) -> None:
        """Collect the addresses; at least one tensor.

        Args:
            grads: N gradients ``(P,)``.
            queues: N ring buffers ``(L, P)``.
            queued: N counters, 0-d int64.
            finite: ``(N,)`` bool or None.
            vectors: lists of N tensors ``(P,)`` by name, one per further column.
            scalars: lists of N 0-d tensors by name, one per further column.
        """
        scalars = scalars or {}
        flat = {"grads": grads, **vectors}
        dtypes = (queues[0].dtype, *(tensors[0].dtype for tensors in flat.values()))
        others = (*vectors.values(), *scalars.values())
        columns = [[t.data_ptr() for t in tensors] for tensors in others]
        rows = zip(
            [t.numel() for t in grads],
            range(len(grads)),
            [t.data_ptr() for t in grads],
            [t.data_ptr() for t in queued],
            [t.data_ptr() for t in queues],
            [t.stride(0) for t in queues],
            *columns,
            strict=True,
        )
        itemsize = queues[0].element_size()

        def check() -> None:
            for name, tensors in flat.items():
                check_flat(name, tensors, grads)
            check_queues(queues, grads)
            check_scalars("queued", queued, grads, torch.int64)
            for name, tensors in scalars.items():
                check_scalars(name, tensors, grads, torch.float32)

        def is_aligned(row: Row) -> bool:
            _, _, grad, _, queue, stride, *others = row
            vector_pointers = others[: len(vectors)]
            addresses = (grad, queue, stride * itemsize, *vector_pointers)
            return all(address % VECTOR == 0 for address in addresses)

        self.tables = tables(grads[0].device, list(rows), dtypes, check, is_aligned)
        self.finite = None if finite is None else finite.view(torch.uint8)
        self.constants = {
            "G_DTYPE": triton_dtype(grads),
            "Q_DTYPE": triton_dtype(queues),
            "C_DTYPE": tl.float64 if torch.float64 in dtypes else tl.float32,
            "L": queues[0].shape[0],
            "W": 6 + len(columns),
            "CHUNK": CHUNK,
            "BLOCK": block_size(*dtypes),
            "num_warps": num_warps(grads[0].device),
        }


def check_flat(name: str, tensors: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Raise ValueError unless ``tensors`` are flat, share a dtype and are as long as ``grads``."""
    for index, (tensor, grad) in enumerate(zip(tensors, grads, strict=True)):
        flat = tensor.dim() == 1 and tensor.is_contiguous()
        if not flat or tensor.numel() != grad.numel() or tensor.device != grads[0].device:
            raise ValueError(
                f"{name}[{index}] must be flat and contiguous, of shape ({grad.numel()},) on "
                f"{grads[0].device}, got {tuple(tensor.shape)} with strides {tensor.stride()} on "
                f"{tensor.device}"
            )
        _check_dtype(name, index, tensor, tensors[0])


def check_queues(queues: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Raise ValueError unless ``queues`` are rings ``(L, P)`` of one L and dtype."""
    slots = queues[0].shape[0]
    if slots < 1:
        raise ValueError("queues must have at least one row, got none")
    for index, (queue, grad) in enumerate(zip(queues, grads, strict=True)):
        shape = (slots, grad.numel())
        rows_contiguous = shape[1] < 2 or (queue.dim() == 2 and queue.stride(1) == 1)
        if queue.shape != shape or not rows_contiguous or queue.device != grads[0].device:
            raise ValueError(
                f"queues[{index}] must have shape {shape} with contiguous rows on "
                f"{grads[0].device}, got {tuple(queue.shape)} with strides {queue.stride()} on "
                f"{queue.device}"
            )
        _check_dtype("queues", index, queue, queues[0])


def check_scalars(
    name: str, tensors: Sequence[Tensor], grads: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """Raise ValueError unless ``tensors`` hold one number of ``dtype`` each on the device."""
    for index, tensor in enumerate(tensors):
        device = grads[0].device
        if tensor.numel() != 1 or tensor.dtype != dtype or tensor.device != device:
            raise ValueError(
                f"{name}[{index}] must be one {dtype} on {device}, got shape "
                f"{tuple(tensor.shape)}, {tensor.dtype}, {tensor.device}"
            )


def _check_dtype(name: str, index: int, tensor: Tensor, first: Tensor) -> None:
    if tensor.dtype != first.dtype or tensor.dtype not in TRITON_DTYPE:
        raise ValueError(
            f"{name} must share one of {', '.join(map(str, TRITON_DTYPE))}; "
            f"{name}[0] is {first.dtype}, {name}[{index}] is {tensor.dtype}"
        )
