# pyright: basic, reportInvalidTypeForm=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false
"""The statistics of a ring, stored for operations that do not read the ring.

Shape legend: L = queue slots, P = elements of one parameter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gq_triton.float8 import slots
from gq_triton.kernels.launch import (
    TRITON_DTYPE,
    check_queues,
    check_scalars,
    device_guard,
)
from gq_triton.kernels.law import reciprocal, spread

__all__ = ["queue_statistics"]

# Elements of one program.
BLOCK = 512
# The value of 1 / sigma for a constant queue. It is finite, so that its product with 0 is 0.
_HUGE32 = tl.constexpr(3.4028234663852886e38)
_HUGE64 = tl.constexpr(1.7976931348623157e308)


@triton.jit
def _statistics_kernel(
    queue, stride_queue, queued_ptr, length_ptr, center, rate, n, L: tl.constexpr,
    BLOCK: tl.constexpr, C_DTYPE: tl.constexpr,
):  # fmt: skip
    """Write mu and ``1 / sigma`` of one block, the latter clamped to the largest finite number.

    For a constant queue mu is exactly its value, so that z is 0 where a gradient equals it, and
    huge where a gradient differs by 1e-36 or more. For any other queue mu is rounded once.

    Example: rows 1, 1, 1, 5 give 2 and 1 / sqrt(3).
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    mask = first + offsets < n
    queued = tl.load(queued_ptr)
    length = None if length_ptr is None else tl.load(length_ptr).to(tl.int32)
    base, mean, inverse, sigma = spread(
        queue + first, stride_queue, queued % L, offsets, mask, length, C_DTYPE, L, False
    )
    huge: tl.constexpr = _HUGE64 if C_DTYPE == tl.float64 else _HUGE32
    per_sigma = tl.minimum(inverse * reciprocal(sigma), huge)
    tl.store(center + first + offsets, base + mean, mask=mask)
    tl.store(rate + first + offsets, tl.where(queued >= L, per_sigma, float("nan")), mask=mask)


def queue_statistics(
    queue: Tensor, queued: Tensor, out: Tensor, *, length: Tensor | None = None
) -> None:
    """Write a ring's mean and 1 / sigma; see ``engines.protocol``.

    Computed in the type of ``out``. Repeats agree bit for bit.

    Raises:
        ValueError: the tensors disagree in shape, dtype, layout or device.
    """
    if out.dtype not in (torch.float32, torch.float64) or out.dim() != 2 or len(out) != 2:
        raise ValueError(
            f"out must be (2, P) in float32 or float64, got {tuple(out.shape)} {out.dtype}"
        )
    check_queues([queue], [out[0]])
    check_queues([out], [out[0]])
    check_scalars("queued", [queued], [out], torch.int64)
    n = out.shape[1]
    if n == 0:
        return
    with device_guard(out.device):
        _statistics_kernel[(triton.cdiv(n, BLOCK),)](
            queue, queue.stride(0), queued, length, out[0], out[1], n, L=slots(queue),
            BLOCK=BLOCK, C_DTYPE=TRITON_DTYPE[out.dtype],
        )  # fmt: skip
