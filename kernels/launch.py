# pyright: basic
"""Host side of every launch: chunk tables and their cache, checks, device guard.

A launch covers many tensors. Each is cut into chunks of `CHUNK` elements, and one program works on
one chunk. A table holds one row of addresses per tensor and the cumulative chunk counts. A program
finds its tensor by binary search in those counts (`chunks.py`). The host's work therefore grows
with the number of tensors, not with their size.

Shape legend: N = tensors, L = queue slots, P = elements of one tensor, W = columns of a table.
"""

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gq_triton.float8 import slots

# Elements of one program: enough to amortise the search, few enough that a large GPU is filled.
CHUNK = 16384
# Threads of a program, whatever the width of a warp.
THREADS = 256
# Widest load of a thread in bytes, hence the alignment that the fast specialisation needs.
VECTOR = 16
TRITON_DTYPE = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.uint8: tl.uint8,  # a ring in bytes
}

Row = tuple[int, ...]


@dataclass(frozen=True)
class Table:
    """Addresses of the tensors of one launch, on their device.

    Attributes:
        rows: ``(N, W)`` int64, one row per tensor.
        starts: ``(N,)`` int64, the number of chunks before each tensor.
        n_tensors: N.
        n_chunks: the number of chunks of all tensors.
        ticket: one int64, 0 between launches; see `chunks.count_when_last`.
        aligned: whether every address and every row of a ring is a multiple of 16 bytes.
        host: the source of the three tensors, kept while a copy may still read it.
    """

    rows: Tensor
    starts: Tensor
    n_tensors: int
    n_chunks: int
    ticket: Tensor
    aligned: bool
    host: Tensor

    @property
    def grid(self) -> tuple[int]:
        """The programs of a launch that counts: one works on no chunk where all are empty."""
        return (max(self.n_chunks, 1),)


# Gradients often recur at a few sets of addresses, so a few tables are kept.
_CACHE_SIZE = 64
Cache = dict[Hashable, list[Table]]  # the last used one is the last
shared: Cache = {}
# Tables of captured CUDA graphs, kept because every replay copies from them again.
_captured: list[list[Table]] = []


def device_guard(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context that makes ``device`` current: Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@cache
def num_warps(device: torch.device) -> int:
    """Return the warps that make up `THREADS` threads; a warp of an AMD GPU may have 64."""
    on_gpu = device.type == "cuda"
    return THREADS // (torch.cuda.get_device_properties(device).warp_size if on_gpu else 32)


def block_size(*dtypes: torch.dtype, most: int = 4) -> int:
    """Return the elements of one block: at most 16 bytes of the widest type for each thread.

    No access is then wider than a thread's share, so the compiler gives every tensor the same
    layout: an element is read and overwritten by one and the same thread. With different layouts a
    ring slot could be overwritten before another thread has read it.

    Args:
        dtypes: the types of all tensors of the kernel.
        most: upper bound of a thread's elements; eight per ring row do not fit its registers.
    """
    widest = max(dtype.itemsize for dtype in dtypes)
    return min(VECTOR // widest, most) * THREADS


def addresses(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Return the addresses of the tensors; a sequence may hold them in ``addresses``."""
    known = getattr(tensors, "addresses", None)
    return tuple(map(Tensor.data_ptr, tensors)) if known is None else known


def device_of(tensors: Sequence[Tensor]) -> torch.device:
    """Return the device of at least one tensor; a sequence may know it as its ``device``."""
    known = getattr(tensors, "device", None)
    return tensors[0].device if known is None else known


def tables(
    device: torch.device,
    key: Hashable,
    cache: Cache,
    rows: Callable[[], list[Row]],
    is_aligned: Callable[[Row], bool],
    chunk: int = CHUNK,
) -> list[Table]:
    """Return one table per alignment class that occurs, from the cache where it holds them.

    Args:
        device: where the tensors are.
        key: everything that the rows depend on and that varies within this cache.
        cache: the tables of earlier launches.
        rows: returns the columns of each tensor; called for new tables only.
        is_aligned: returns whether the fast specialisation may run on a row's tensor.
        chunk: the elements that one program works on; fixed for a cache's kind of key.
    """
    on_gpu = device.type == "cuda"
    capturing = on_gpu and torch.cuda.is_current_stream_capturing()
    # The copy to the device is ordered with one stream only: each stream gets its own copy.
    stream = torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
    key = (stream, key)
    if cache and not capturing:
        # To hash the addresses of many tensors takes longer than to compare them.
        last, found = next(reversed(cache.items()))
        if last == key:
            return found
    found = None if capturing else cache.pop(key, None)
    if found is not None:
        cache[key] = found
        return found
    classes: dict[bool, list[Row]] = {True: [], False: []}
    for row in rows():
        classes[is_aligned(row)].append(row)
    # Also in a capture: torch takes a copy from pinned memory alone there (an error from 2.11 on).
    built = [
        _build(device, part, aligned, on_gpu, chunk) for aligned, part in classes.items() if part
    ]
    if capturing:
        _captured.append(built)
        return built
    cache[key] = built
    if len(cache) > _CACHE_SIZE:
        del cache[next(iter(cache))]
    return built


def _build(device: torch.device, rows: list[Row], aligned: bool, pin: bool, chunk: int) -> Table:
    starts, n_chunks = [], 0
    for row in rows:
        starts.append(n_chunks)
        n_chunks += -(-row[0] // chunk)
    if n_chunks >= 2**31:
        raise ValueError(f"one call covers fewer than 2**31 chunks of {chunk}, got {n_chunks}")
    # Rows, starts and ticket begin at multiples of 16 bytes: for an argument that does not, Triton
    # compiles the kernel anew.
    parts = [value for row in rows for value in row], starts, [0]
    flat = [value for part in parts for value in (*part, *[0] * (len(part) % 2))]
    host = torch.tensor(flat, dtype=torch.int64, device="cpu")  # whatever the default device is
    host = host.pin_memory() if pin else host
    whole = host.to(device, non_blocking=True)
    begin = len(flat) - 2 - len(starts) - len(starts) % 2
    return Table(
        whole[: len(parts[0])].view(len(rows), -1), whole[begin:][: len(starts)], len(rows),
        n_chunks, whole[-2:-1], aligned, host,
    )  # fmt: skip


class RingLaunch:
    """The common part of all launches with a ring: all that is independent of gradients' addresses.

    Attributes:
        constants: the keyword arguments that all kernels with a ring take.
        dtypes: Triton's type of each list of tensors, by the list's name.
    """

    def __init__(
        self,
        grads: Sequence[Tensor],
        queues: Sequence[Tensor],
        queued: Sequence[Tensor],
        vectors: dict[str, Sequence[Tensor]],
        scalars: dict[str, Sequence[Tensor]],
        cache: Cache,
    ) -> None:
        """Collect the addresses; see `ring_launch`."""
        flat = {"grads": grads, **vectors}
        dtypes = {"queues": queues[0].dtype}
        dtypes |= {name: tensors[0].dtype for name, tensors in flat.items()}
        self.device = grads[0].device
        self.dtypes = {name: TRITON_DTYPE.get(dtype) for name, dtype in dtypes.items()}
        self.constants = {
            "G_DTYPE": self.dtypes["grads"],
            "Q_DTYPE": self.dtypes["queues"],
            "C_DTYPE": tl.float64 if torch.float64 in dtypes.values() else tl.float32,
            "L": slots(queues[0]),
            "W": 6 + len(vectors) + len(scalars),
            "CHUNK": CHUNK,
            "BLOCK": block_size(*dtypes.values()),
            "num_warps": num_warps(self.device),
        }
        self._row_unit = queues[0].element_size()
        self._n_vectors, self._cache = len(vectors), cache
        self._numels = tuple(map(Tensor.numel, grads))
        self._columns = (
            addresses(queued), addresses(queues), tuple([queue.stride(0) for queue in queues]),
            *map(addresses, (*vectors.values(), *scalars.values())),
        )  # fmt: skip
        # Launches of other tensors use the shared cache too: the key tells them apart.
        own = (self.device, *dtypes.values(), self._numels, self._columns)
        self._key = own if cache is shared else None

    def tables(self, grads: Sequence[Tensor], check: Callable[[], None] | None) -> list[Table]:
        """Return one table per alignment class; columns as in `chunks.py`."""
        starts = addresses(grads)

        def rows() -> list[Row]:
            if check is not None:
                check()
            indices = range(len(starts))
            return list(zip(self._numels, indices, starts, *self._columns, strict=True))

        return tables(self.device, (self._key, starts), self._cache, rows, self._is_aligned)

    def _is_aligned(self, row: Row) -> bool:
        _, _, grad, _, queue, stride, *others = row
        starts = (grad, queue, stride * self._row_unit, *others[: self._n_vectors])
        return all(start % VECTOR == 0 for start in starts)


def ring_launch(
    grads: Sequence[Tensor],
    queues: Sequence[Tensor],
    queued: Sequence[Tensor],
    vectors: dict[str, Sequence[Tensor]],
    scalars: dict[str, Sequence[Tensor]] | None = None,
) -> tuple[RingLaunch, list[Table]]:
    """Return the common part of a launch of at least one tensor, and a table per alignment class.

    The lists ``queues`` and ``grads`` may share a dict as their attribute ``memo``. The owner of
    the dict guarantees two things for all calls with it: every list but ``grads`` holds the same
    memory, and the gradients have the same lengths, types and device.

    Args:
        grads: N gradients ``(P,)``.
        queues: N ring buffers ``(L, P)``.
        queued: N counters, 0-d int64.
        vectors: lists of N tensors ``(P,)`` by name, one per further column.
        scalars: lists of N 0-d tensors by name, one per further column.

    Raises:
        ValueError: the tensors disagree in length, shape, dtype, layout or device.
    """
    scalars = scalars or {}

    def check() -> None:
        for name, tensors in {"grads": grads, **vectors}.items():
            check_flat(name, tensors, grads)
        check_queues(queues, grads)
        check_scalars("queued", queued, grads, torch.int64)
        for name, tensors in scalars.items():
            check_scalars(name, tensors, grads, torch.float32)

    memo = memo_of(grads, queues)
    if memo is None:
        launch = RingLaunch(grads, queues, queued, vectors, scalars, shared)
        return launch, launch.tables(grads, check)
    name = ("ring", *vectors)
    if name not in memo:
        check()
        memo[name] = RingLaunch(grads, queues, queued, vectors, scalars, {})
    launch = memo[name]
    return launch, launch.tables(grads, None)


def memo_of(*lists: Sequence[Tensor]) -> dict[Any, Any] | None:
    """Return the memo that all lists share, or None; see `ring_launch`."""
    memo = getattr(lists[0], "memo", None)
    for other in lists[1:]:
        if getattr(other, "memo", None) is not memo:
            return None
    return memo


def as_bytes(finite: Tensor | None) -> Tensor | None:
    """Return bool flags as the uint8 that kernels read."""
    return None if finite is None else finite.view(torch.uint8)


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


def check_dense(name: str, tensors: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Raise ValueError unless ``tensors`` are as long as ``grads``, and have no holes."""
    for index, (tensor, grad) in enumerate(zip(tensors, grads, strict=True)):
        fits = _is_dense(tensor) and tensor.numel() == grad.numel()
        if not fits or tensor.device != grads[0].device:
            raise ValueError(
                f"{name}[{index}] must have {grad.numel()} elements without holes on "
                f"{grads[0].device}, got {tuple(tensor.shape)} with strides {tensor.stride()} on "
                f"{tensor.device}"
            )
        _check_dtype(name, index, tensor, tensors[0])


def _is_dense(tensor: Tensor) -> bool:
    """Return whether a tensor's memory has no holes, whatever the order of its dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= max(size, 1)
    return True


def check_queues(queues: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Raise ValueError unless ``queues`` are rings ``(L, P)`` of one L and dtype."""
    height = queues[0].shape[0]
    if height < 1:
        raise ValueError("queues must have at least one row, got none")
    for index, (queue, grad) in enumerate(zip(queues, grads, strict=True)):
        shape = (height, grad.numel())
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
