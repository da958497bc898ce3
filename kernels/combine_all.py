# pyright: basic, reportInvalidTypeForm=false, reportArgumentType=false, reportCallIssue=false
"""The law for clusters on many parameters: two launches per alignment class for all of them.

Shape legend: N = parameters, K = clusters, L = queue slots, P = elements of one parameter, C =
chunks of a launch.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gq_triton.float8 import slots
from gq_triton.kernels.chunks import (
    GRAD,
    INDEX,
    NUMEL,
    QUEUE,
    QUEUED,
    STRIDE,
    find_tensor,
    typed,
)
from gq_triton.kernels.combine import CHUNK, check_clusters, combine_chunk
from gq_triton.kernels.launch import (
    THREADS,
    TRITON_DTYPE,
    VECTOR,
    Row,
    addresses,
    block_size,
    check_dense,
    check_flat,
    check_queues,
    check_scalars,
    device_guard,
    num_warps,
    shared,
    tables,
)
from gq_triton.law import Law

__all__ = ["combine_all"]

# Columns after those of every table with a ring; column GRAD has the sums.
STRIDE_SUMS = tl.constexpr(6)
WEIGHTED = tl.constexpr(7)
RAW = tl.constexpr(8)
# Lengths and distances in the aligned class are multiples of it, so masks are as wide as loads.
EVEN = 16


@triton.jit(do_not_specialize=["n_tensors", "n_clusters"])
def _combine_all_kernel(
    rows, starts, n_tensors, length_ptr, grad_scale_ptr, inverse_shares, mixture, sigma_scales,
    partials, flags, n_clusters, low: tl.float64, high: tl.float64,
    S_DTYPE: tl.constexpr, W_DTYPE: tl.constexpr, C_DTYPE: tl.constexpr, Q_DTYPE: tl.constexpr,
    L: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    THREADS: tl.constexpr, REPAIR: tl.constexpr,
):  # fmt: skip
    """Combine one chunk of one of N parameters; see `combine_chunk`.

    The first launch clears the flag of a parameter whose raw gradient is not finite in the chunk;
    every program that clears a flag writes the same byte, so the order does not matter. The second
    launch, with REPAIR, repeats the work of such parameters with every weight 1, and returns at
    once elsewhere.
    """
    chunk = tl.program_id(0)
    tensor = find_tensor(starts, n_tensors, chunk)
    row = rows + tensor.to(tl.int64) * 9
    flag = flags + tl.load(row + INDEX)
    if REPAIR:
        if tl.load(flag) != 0:
            return
    n = tl.load(row + NUMEL)
    stride_sums = tl.load(row + STRIDE_SUMS)
    if ALIGNED:
        # A hint on the pointer to a cluster's sums would not survive the loop over the clusters.
        n, stride_sums = tl.multiple_of(n, 16), tl.multiple_of(stride_sums, 16)
    bad = combine_chunk(
        typed(tl.load(row + GRAD), S_DTYPE, ALIGNED), stride_sums,
        typed(tl.load(row + QUEUE), Q_DTYPE, ALIGNED), tl.load(row + STRIDE),
        typed(tl.load(row + QUEUED), tl.int64, False), length_ptr, grad_scale_ptr,
        inverse_shares, mixture, sigma_scales,
        typed(tl.load(row + WEIGHTED), W_DTYPE, ALIGNED),
        typed(tl.load(row + RAW), S_DTYPE, ALIGNED), partials + chunk.to(tl.int64) * 5,
        (chunk - tl.load(starts + tensor)) * CHUNK, n, n_clusters, low, high,
        C_DTYPE, Q_DTYPE, L, ALIGNED, CHUNK, BLOCK, THREADS, REPAIR,
    )  # fmt: skip
    if not REPAIR:
        tl.store(flag, tl.full((), 0, tl.uint8), mask=bad > 0)


def combine_all(
    sums: Sequence[Tensor],
    queues: Sequence[Tensor],
    queued: Sequence[Tensor],
    weighted: Sequence[Tensor],
    raw: Sequence[Tensor],
    law: Law,
    *,
    inverse_shares: Tensor,
    mixture: Tensor,
    sigma_scales: Tensor,
) -> tuple[list[Tensor], Tensor]:
    """Weight the cluster means of many parameters and add them up; see ``engines.protocol``.

    Computed in float32 (float64 if a tensor is float64), each chunk as in ``combine``.

    Raises:
        ValueError: the tensors disagree in length, shape, dtype, layout or device.
    """
    device, clusters = sums[0].device, len(inverse_shares)
    dtypes = sums[0].dtype, queues[0].dtype, weighted[0].dtype
    numels = tuple([mean.numel() for mean in raw])
    strides = numels
    if clusters > 1:
        strides = tuple(
            [n if part.dim() == 1 else part.stride(0) for part, n in zip(sums, numels, strict=True)]
        )
    ring_strides = tuple([queue.stride(0) for queue in queues])
    columns = (
        addresses(sums), addresses(queued), addresses(queues), ring_strides, strides,
        addresses(weighted), addresses(raw),
    )  # fmt: skip

    def rows() -> list[Row]:
        _check(sums, queues, queued, weighted, raw, clusters)
        check_clusters(
            clusters, device, inverse_shares=inverse_shares, mixture=mixture,
            sigma_scales=sigma_scales,
        )  # fmt: skip
        return list(zip(numels, range(len(numels)), *columns, strict=True))

    def is_aligned(row: Row) -> bool:
        n, _, start, _, queue, ring_stride, stride, *others = row
        places = start, queue, ring_stride * queues[0].element_size(), *others
        return not any(place % VECTOR for place in places) and n % EVEN == stride % EVEN == 0

    key = "combine", device, clusters, dtypes, numels, columns
    law_numbers = law.length, law.grad_scale, inverse_shares, mixture, sigma_scales
    wide = TRITON_DTYPE[torch.float64 if torch.float64 in dtypes else torch.float32]
    with device_guard(device):
        classes = tables(device, key, shared, rows, is_aligned, chunk=CHUNK)
        partials = torch.empty(
            sum(table.n_chunks for table in classes), 5, dtype=torch.float64, device=device
        )
        flags = torch.ones(len(sums), dtype=torch.uint8, device=device)
        for repair in (False, True):
            begin = 0
            for table in classes:
                if table.n_chunks:
                    _combine_all_kernel[(table.n_chunks,)](
                        table.rows, table.starts, table.n_tensors, *law_numbers,
                        partials[begin:], flags, clusters, 1.0 / law.rho, float(law.rho),
                        S_DTYPE=TRITON_DTYPE[dtypes[0]], W_DTYPE=TRITON_DTYPE[dtypes[2]],
                        C_DTYPE=wide, Q_DTYPE=TRITON_DTYPE[dtypes[1]], L=slots(queues[0]),
                        ALIGNED=table.aligned, CHUNK=CHUNK, BLOCK=block_size(*dtypes),
                        THREADS=THREADS, REPAIR=repair, num_warps=num_warps(device),
                    )  # fmt: skip
                begin += table.n_chunks
    # Column INDEX, as the host wrote it.
    order = [
        index for table in classes for index in table.host[1 : 9 * table.n_tensors : 9].tolist()
    ]
    return _by_parameter(partials, numels, order), flags.view(torch.bool)


def _by_parameter(partials: Tensor, numels: tuple[int, ...], order: list[int]) -> list[Tensor]:
    """Return the rows of each parameter: the launches have them in the order of their tables."""
    sizes = [-(-numels[index] // CHUNK) for index in order]
    found = dict(zip(order, partials.split(sizes), strict=True))
    return [found[index] for index in range(len(numels))]


def _check(
    sums: Sequence[Tensor], queues: Sequence[Tensor], queued: Sequence[Tensor],
    weighted: Sequence[Tensor], raw: Sequence[Tensor], clusters: int,
) -> None:  # fmt: skip
    """Raise ValueError unless the tensors belong together."""
    for index, part in enumerate(sums):
        if (
            part.dim() == 0
            or (part.numel() if part.dim() == 1 else len(part) - clusters) % clusters
        ):
            raise ValueError(
                f"sums[{index}] must have shape ({clusters}, *), or be flat, got "
                f"{tuple(part.shape)}"
            )
    sums = [part.view(clusters, -1) if part.dim() == 1 else part for part in sums]
    firsts = [part[0] for part in sums]
    check_dense("sums", firsts, firsts)
    check_queues(queues, firsts)
    check_scalars("queued", queued, firsts, torch.int64)
    check_dense("weighted", weighted, firsts)
    check_flat("raw", raw, firsts)
    if raw[0].dtype != sums[0].dtype:
        raise ValueError(f"raw must be {sums[0].dtype} as the sums, got {raw[0].dtype}")
