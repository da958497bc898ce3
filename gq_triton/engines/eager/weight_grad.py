"""Gradients of weights by cluster: one product of torch for each cluster.

The host reads the clusters' sizes: a product of torch must know its rows. Shape legend:
B = samples, K = clusters.
"""

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["convolution_sums", "product_into", "product_sums"]


def product_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Write ``left.T @ right``, summed in float32 at least, to ``out``.

    Args:
        out: ``(M, N)``.
        left: ``(R, M)``.
        right: ``(R, N)``.
    """
    if left.dtype == out.dtype:
        torch.mm(left.mT, right, out=out)
    elif left.device.type != "cpu":
        torch.mm(left.mT, right, out_dtype=out.dtype, out=out)
    else:
        torch.mm(left.to(out.dtype).mT, right.to(out.dtype), out=out)


def product_sums(
    left: Tensor, right: Tensor, order: Tensor, offsets: Tensor, out: Tensor, *, tf32: bool = False
) -> None:
    """Write the sums of ``left.T @ right`` by cluster; see ``protocol``."""
    for total, a, b in zip(out, *_sorted(order, offsets, left, right), strict=True):
        product_into(total, a.flatten(0, 1), b.flatten(0, 1))  # zero for an empty cluster


def convolution_sums(
    dy: Tensor, x: Tensor, order: Tensor, offsets: Tensor, out: Tensor, *, stride: tuple[int, ...],
    padding: tuple[int, ...], dilation: tuple[int, ...], groups: int = 1, tf32: bool = False,
) -> None:  # fmt: skip
    """Write the gradients of a convolution's kernel by cluster; see ``protocol``."""
    taps, sizes = out.shape[3:], dy.shape[2:]
    moves = zip(sizes, stride, dilation, taps, strict=True)
    reach = [(n - 1) * step + gap * (tap - 1) + 1 for n, step, gap, tap in moves]
    if [size + 2 * pad for size, pad in zip(x.shape[2:], padding, strict=True)] != reach:
        # Torch derives the number of windows from the input: it must end where the last one does.
        sides = [(p, r - size - p) for p, r, size in zip(padding, reach, x.shape[2:], strict=True)]
        x, padding = F.pad(x, [n for side in reversed(sides) for n in side]), (0,) * len(taps)
    weight = out.new_empty(out.shape[1:])
    for total, a, b in zip(out, *_sorted(order, offsets, dy, x), strict=True):
        if not len(a):
            total.zero_()
            continue
        found = torch.ops.aten.convolution_backward(
            a.to(out.dtype), b.to(out.dtype), weight, None, stride, padding, dilation, False,
            [0] * len(taps), groups, [False, True, False],
        )[1]  # fmt: skip
        total.copy_(found)


def _sorted(order: Tensor, offsets: Tensor, *tensors: Tensor) -> Iterator[list[Tensor]]:
    """Yield for each tensor ``(B, ...)`` the samples of each cluster: K views of a sorted copy."""
    ends = offsets.tolist()
    sizes = [end - begin for begin, end in itertools.pairwise(ends)]
    for tensor in tensors:
        yield list(tensor.index_select(0, order).split(sizes))
