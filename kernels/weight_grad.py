# pyright: basic, reportArgumentType=false, reportCallIssue=false
"""Gradients of weights by cluster: one launch for a layer, whatever its clusters are.

The kernels are in `weight_kernels.py`, the choice of tiles is in `tiles.py`. A linear layer is a
convolution whose window has one tap and meets every input once.

Shape legend: B = samples, K = clusters, T = positions of a sample at the output, S = positions at
the input, O or M = columns of ``dy``, I or N = columns of ``x``, G = groups of channels.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from gq_triton.kernels.launch import TRITON_DTYPE, device_guard
from gq_triton.kernels.tickets import take_tickets
from gq_triton.kernels.tiles import cdiv, device_of, power_of_2, precision_of, strip_of, tile_of
from gq_triton.kernels.weight_kernels import depthwise_kernel, weight_kernel

__all__ = ["convolution_sums", "product_sums"]

# Fewer inputs of a group than this do not fill a tile: its columns then go through all taps.
MIXED_BELOW = 64
# Most elements of both factors that are read where their channels come before their positions
# (estimated: about as long as two launches and the copies take).
MOST_NARROW = 1 << 24
# Warps that read them: each access needs an address, and fewer warps have no registers left.
NARROW_WARPS = 8
# Most clusters that are ranked by size in every program; more have less of a tail.
MOST_RANKED = 32


class _Window(NamedTuple):
    """How a window moves: numbers by dimension, the last one innermost.

    Attributes:
        out: positions at the output.
        size: positions at the input.
        taps: size of the window.
        step: distance of its places.
        padding: zeros added on both sides.
        gap: distance of its taps.
    """

    out: tuple[int, ...] = (1,)
    size: tuple[int, ...] = (1,)
    taps: tuple[int, ...] = (1,)
    step: tuple[int, ...] = (1,)
    padding: tuple[int, ...] = (0,)
    gap: tuple[int, ...] = (1,)

    @property
    def trivial(self) -> bool:
        """Whether the window has one tap, which meets every input once."""
        stays = set(self.step) == {1} and set(self.padding) == {0} and self.out == self.size
        return stays and math.prod(self.taps) == 1


@lru_cache(maxsize=256)
def _arguments(window: _Window) -> tuple[int, ...]:
    """Return the arguments that ``weight_kernels.GEOMETRY`` names, for three dimensions."""
    missing = 3 - len(window.out)
    ones, zeros = (1,) * missing, (0,) * missing
    out, size, taps, step, gap = (
        ones + n for n in (window.out, window.size, window.taps, window.step, window.gap)
    )
    sides = (*step, *zeros, *window.padding, *gap)
    return (*out[1:], *size, math.prod(taps), *taps[1:], *sides)


def _check(
    dy: Tensor, x: Tensor, order: Tensor, offsets: Tensor, out: Tensor, positions: int
) -> None:
    """Raise ValueError unless the types and sizes of all tensors fit each other."""
    wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
    if dy.dtype != x.dtype or dy.dtype not in TRITON_DTYPE or out.dtype != wide:
        raise ValueError(
            f"both factors must share one of {', '.join(map(str, TRITON_DTYPE))}, and out must be "
            f"{wide}, got {dy.dtype}, {x.dtype} and {out.dtype}"
        )
    if len(dy) * positions >= 2**31 or max(dy.shape[1:].numel(), x.shape[1:].numel()) >= 2**31:
        raise ValueError(
            "one call covers fewer than 2**31 rows, and as many elements of a sample, got "
            f"{tuple(dy.shape)} and {tuple(x.shape)}"
        )
    for name, tensor, length in (("order", order, len(dy)), ("offsets", offsets, len(out) + 1)):
        fits = tensor.shape == (length,) and tensor.is_contiguous()
        if not fits or tensor.dtype not in (torch.int32, torch.int64) or tensor.device != dy.device:
            raise ValueError(
                f"{name} must be contiguous int32 or int64 of shape ({length},) on {dy.device}, "
                f"got {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
            )


def _is_whole(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Return whether memory of these sizes has no holes and the last dimension innermost."""
    expected = 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _innermost(tensor: Tensor, images: bool) -> tuple[bool, bool]:
    """Return whether samples are contiguous with columns innermost, and with positions innermost.

    Samples may lie at any distance. Sizes and strides tell: a view costs the host more.
    """
    size, stride = tuple(tensor.shape[1:]), tensor.stride()[1:]
    here = _is_whole(size, stride)
    turned = _is_whole((*size[1:], size[0]), (*stride[1:], stride[0]))
    return (turned, here) if images else (here, turned)


def _strides_of(out: Tensor) -> tuple[int, ...] | None:
    """Return the strides of ``(K, O, I / G, taps)``; None where all taps have no common one."""
    inner, last = None, out.stride(-1)
    for size, stride in zip(reversed(out.shape[3:]), reversed(out.stride()[3:]), strict=True):
        if size != 1:
            if inner is None:
                inner = last = stride
            elif stride != inner:
                return None
            inner *= size
    return (*out.stride()[:3], last)


def _launch(
    dy: Tensor, x: Tensor, order: Tensor, offsets: Tensor, out: Tensor, strides: tuple[int, ...],
    window: _Window, groups: int, tf32: bool, images: bool = False,
) -> None:  # fmt: skip
    """Write the sums of products to ``out``.

    Args:
        dy: ``(B, T, O)``, the channels of all groups; images are ``(B, O, *)``.
        x: ``(B, S, I)`` or ``(B, I, *)``, the channels of all groups.
        order: the samples by cluster.
        offsets: the ends of the clusters.
        out: ``(K, O, I / G, *taps)``.
        strides: those of ``(K, O, I / G, taps)`` in the memory of ``out``.
        window: how the window moves.
        groups: G.
        tf32: whether float32 factors may be rounded to tf32.
        images: whether the channels of ``dy`` and ``x`` come before their positions.
    """
    positions = math.prod(dy.shape[2:]) if images else dy.shape[1]
    _check(dy, x, order, offsets, out, positions)
    if out.numel() == 0:
        return
    if dy.numel() == 0 or x.numel() == 0:
        out.zero_()
        return
    # Each output has one input of its own: nothing is a matrix.
    apart = groups > 1 and out.shape[2] == 1
    (dy_whole, dy_turned), (x_whole, x_turned) = _innermost(dy, images), _innermost(x, images)
    # Reads of factors whose positions are innermost are narrow: 4 bytes in place of 16. A copy of
    # both costs a large layer less, and copies to shared memory have at least 4 bytes.
    narrow = dy.itemsize >= 4 and dy.numel() + x.numel() <= MOST_NARROW
    first = not apart and narrow and dy_turned and x_turned and not (dy_whole and x_whole)
    if not first:
        dy = dy if dy_whole else (dy.movedim(1, -1) if images else dy).contiguous()
        x = x if x_whole else (x.movedim(1, -1) if images else x).contiguous()
    (clusters, channels, inputs), taps = out.shape[:3], math.prod(out.shape[3:])
    outputs, plain, device = channels // groups, window.trivial, device_of(dy.device)
    common = {"rows": len(dy) * positions, "clusters": clusters, "device": device}
    mixed = not plain and inputs < MIXED_BELOW
    width = inputs * taps if mixed else inputs
    precision = precision_of(dy.dtype, tf32, device)
    if apart:
        products = clusters * taps
        tile = strip_of(channels, products, **common)
        tiles = products * cdiv(channels, tile.outputs)
    else:
        products = clusters * groups * (1 if mixed or plain else taps)
        tile = tile_of(dy.dtype, precision, outputs, width, products, **common)
        if first:
            tile = tile._replace(warps=NARROW_WARPS)
        tiles = products * cdiv(outputs, tile.outputs) * cdiv(width, tile.inputs)
    sums, total, tickets, distance = out, None, None, clusters * strides[0]
    if tile.splits > 1:
        # As many sums as there are splits, each with the strides of ``out``.
        sizes = zip((clusters, channels, inputs, taps), strides, strict=True)
        distance = 1 + sum((size - 1) * stride for size, stride in sizes)
        sums = torch.empty(tile.splits * distance, dtype=out.dtype, device=out.device)
        total, tickets = out, take_tickets(out.device, tiles)
    arguments = (
        dy, x, order, offsets, sums, total, tickets, dy.stride(0), x.stride(0), outputs, inputs,
        distance, *strides, positions, groups, clusters, tile.splits, *_arguments(window),
    )  # fmt: skip
    constants = {
        "BO": tile.outputs, "BR": tile.rows, "C_DTYPE": TRITON_DTYPE[out.dtype],
        "KP": power_of_2(clusters) if 1 < clusters <= MOST_RANKED else 0,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    if not apart:
        # Triton's interpreter, which runs on the CPU, multiplies bfloat16 as if it were integers.
        widened = dy.device.type == "cpu" and dy.dtype == torch.bfloat16
        constants |= {
            "F_DTYPE": TRITON_DTYPE[torch.float32 if widened else dy.dtype],
            "BI": tile.inputs, "WHOLE": positions % tile.rows == 0, "TAPS": not plain,
            "MIXED": mixed, "FIRST": first, "PRECISION": precision,
        }  # fmt: skip
    kernel = depthwise_kernel if apart else weight_kernel
    with device_guard(dy.device):
        kernel[(tiles * tile.splits,)](*arguments, **constants)


def product_sums(
    left: Tensor, right: Tensor, order: Tensor, offsets: Tensor, out: Tensor, *, tf32: bool = False
) -> None:
    """Write the sums of ``left.T @ right`` by cluster; see ``engines.protocol``.

    The order of a sum depends on the shapes, the clusters' sizes and the device only: repeats agree
    bit for bit.

    Raises:
        ValueError: the tensors disagree in shape, dtype or device.
    """
    columns = left.shape[-1], right.shape[-1]
    if left.dim() != 3 or left.shape[:2] != right.shape[:2] or out.shape[1:] != columns:
        raise ValueError(
            f"left (B, T, M), right (B, T, N) and out (K, M, N) must fit, got {tuple(left.shape)}, "
            f"{tuple(right.shape)} and {tuple(out.shape)}"
        )
    _launch(left, right, order, offsets, out, (*out.stride(), 1), _Window(), 1, tf32)


def convolution_sums(
    dy: Tensor, x: Tensor, order: Tensor, offsets: Tensor, out: Tensor, *, stride: tuple[int, ...],
    padding: tuple[int, ...], dilation: tuple[int, ...], groups: int = 1, tf32: bool = False,
) -> None:  # fmt: skip
    """Write the gradients of a convolution's kernel by cluster; see ``engines.protocol``.

    Where channels do not lie next to each other (``channels_last``), the kernel reads small factors
    of at least 4 bytes as they are; others are copied first.

    Raises:
        ValueError: the tensors disagree in shape, dtype or device.
    """
    spatial = out.dim() - 3
    lengths = {dy.dim() - 2, x.dim() - 2, len(stride), len(padding), len(dilation)}
    columns = out.shape[1] if spatial > 0 else -1, out.shape[2] * groups if spatial > 0 else -1
    if not 1 <= spatial <= 3 or lengths != {spatial} or len(dy) != len(x):
        fits = False
    else:
        fits = (dy.shape[1], x.shape[1]) == columns and out.shape[1] % groups == 0
    if not fits:
        raise ValueError(
            "dy (B, O, *), x (B, I, *) and out (K, O, I / groups, *taps) must fit and have one to "
            f"three dimensions *, as stride, padding and dilation, got {tuple(dy.shape)}, "
            f"{tuple(x.shape)} and {tuple(out.shape)} with {groups} groups"
        )
    window = _Window(
        tuple(dy.shape[2:]), tuple(x.shape[2:]), tuple(out.shape[3:]), tuple(stride),
        tuple(padding), tuple(dilation),
    )  # fmt: skip
    strides = _strides_of(out)
    if strides is None:  # torch gives no kernel such a memory format
        sums = torch.empty_like(out, memory_format=torch.contiguous_format)
        strides = _strides_of(sums)
        assert strides is not None
        _launch(dy, x, order, offsets, sums, strides, window, groups, tf32, images=True)
        out.copy_(sums)
    else:
        _launch(dy, x, order, offsets, out, strides, window, groups, tf32, images=True)
