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
from typing import Any, NamedTuple

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


class _Layout(NamedTuple):
    """All of a tensor that a launch depends on, besides its address."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def is_contiguous(self) -> bool:
        """Return whether the memory has no holes and the last dimension innermost."""
        return 0 in self.shape or _is_whole(self.shape, self.stride)


def _layout(tensor: Tensor) -> _Layout:
    return _Layout(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


class _Plan(NamedTuple):
    """A launch without its addresses, which layers repeat in every step.

    Attributes:
        kernel: the kernel; None where the sums are 0, because nothing is added up.
        grid: its programs.
        numbers: its arguments behind the tensors.
        constants: its keyword arguments.
        copied: which of both factors is copied.
        room: elements of the sums of splits, which are added up; 0 where nothing is split.
        tickets: the tickets for that.
    """

    kernel: Any
    grid: tuple[int]
    numbers: tuple[int, ...]
    constants: dict[str, Any]
    copied: tuple[bool, bool] = (False, False)
    room: int = 0
    tickets: int = 0


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
    dy: _Layout, x: _Layout, order: _Layout, offsets: _Layout, out: _Layout, positions: int
) -> None:
    """Raise ValueError unless the types and sizes of all tensors fit each other."""
    wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
    if dy.dtype != x.dtype or dy.dtype not in TRITON_DTYPE or out.dtype != wide:
        raise ValueError(
            f"both factors must share one of {', '.join(map(str, TRITON_DTYPE))}, and out must be "
            f"{wide}, got {dy.dtype}, {x.dtype} and {out.dtype}"
        )
    samples, clusters = dy.shape[0], out.shape[0]
    if samples * positions >= 2**31 or max(dy.shape[1:].numel(), x.shape[1:].numel()) >= 2**31:
        raise ValueError(
            "one call covers fewer than 2**31 rows, and as many elements of a sample, got "
            f"{tuple(dy.shape)} and {tuple(x.shape)}"
        )
    for name, tensor, length in (("order", order, samples), ("offsets", offsets, clusters + 1)):
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


def _innermost(factor: _Layout, images: bool) -> tuple[bool, bool]:
    """Return whether samples are contiguous with columns innermost, and with positions innermost.

    Samples may lie at any distance.
    """
    size, stride = tuple(factor.shape[1:]), factor.stride[1:]
    here = _is_whole(size, stride)
    turned = _is_whole((*size[1:], size[0]), (*stride[1:], stride[0]))
    return (turned, here) if images else (here, turned)


def _strides_of(out: _Layout) -> tuple[int, ...] | None:
    """Return the strides of ``(K, O, I / G, taps)``; None where all taps have no common one."""
    inner, last = None, out.stride[-1]
    for size, stride in zip(reversed(out.shape[3:]), reversed(out.stride[3:]), strict=True):
        if size != 1:
            if inner is None:
                inner = last = stride
            elif stride != inner:
                return None
            inner *= size
    return (*out.stride[:3], last)


def _plan(
    dy: _Layout, x: _Layout, order: _Layout, offsets: _Layout, out: _Layout,
    strides: tuple[int, ...], window: _Window, groups: int, tf32: bool, images: bool = False,
) -> _Plan:  # fmt: skip
    """Return the launch that writes sums of products to ``out``.

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
    sizes_of_both = dy.shape.numel(), x.shape.numel()
    if out.shape.numel() == 0 or 0 in sizes_of_both:
        return _Plan(None, (0,), (), {})
    # Each output has one input of its own: nothing is a matrix.
    apart = groups > 1 and out.shape[2] == 1
    (dy_whole, dy_turned), (x_whole, x_turned) = _innermost(dy, images), _innermost(x, images)
    # Reads of factors whose positions are innermost are narrow: 4 bytes in place of 16. A copy of
    # both costs a large layer less, and copies to shared memory have at least 4 bytes.
    narrow = dy.dtype.itemsize >= 4 and sum(sizes_of_both) <= MOST_NARROW
    first = not apart and narrow and dy_turned and x_turned and not (dy_whole and x_whole)
    copied = not (first or dy_whole), not (first or x_whole)
    apart_by = [
        factor.shape[1:].numel() if copy else factor.stride[0]
        for factor, copy in zip((dy, x), copied, strict=True)
    ]
    (clusters, channels, inputs), taps = out.shape[:3], math.prod(out.shape[3:])
    outputs, plain, device = channels // groups, window.trivial, device_of(dy.device)
    common = {"rows": dy.shape[0] * positions, "clusters": clusters, "device": device}
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
    room, distance = 0, clusters * strides[0]
    if tile.splits > 1:
        # As many sums as there are splits, each with the strides of ``out``.
        sizes = zip((clusters, channels, inputs, taps), strides, strict=True)
        distance = 1 + sum((size - 1) * stride for size, stride in sizes)
        room = tile.splits * distance
    numbers = (
        *apart_by, outputs, inputs, distance, *strides, positions, groups, clusters, tile.splits,
        *_arguments(window),
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
    return _Plan(kernel, (tiles * tile.splits,), numbers, constants, copied, room, tiles)


def _launch(
    plan: _Plan, dy: Tensor, x: Tensor, order: Tensor, offsets: Tensor, out: Tensor,
    images: bool = False,
) -> None:  # fmt: skip
    """Write the sums of products to ``out`` as planned; the arguments are those of `_plan`."""
    if plan.kernel is None:
        out.zero_()
        return
    if plan.copied[0]:
        dy = (dy.movedim(1, -1) if images else dy).contiguous()
    if plan.copied[1]:
        x = (x.movedim(1, -1) if images else x).contiguous()
    sums, total, tickets = out, None, None
    if plan.room:
        sums = torch.empty(plan.room, dtype=out.dtype, device=out.device)
        total, tickets = out, take_tickets(out.device, plan.tickets)
    with device_guard(dy.device):
        plan.kernel[plan.grid](
            dy, x, order, offsets, sums, total, tickets, *plan.numbers, **plan.constants
        )


def product_sums(
    left: Tensor, right: Tensor, order: Tensor, offsets: Tensor, out: Tensor, *, tf32: bool = False
) -> None:
    """Write the sums of ``left.T @ right`` by cluster; see ``engines.protocol``.

    The order of a sum depends on the shapes, the clusters' sizes and the device only: repeats agree
    bit for bit.

    Raises:
        ValueError: the tensors disagree in shape, dtype or device.
    """
    tensors = left, right, order, offsets, out
    _launch(_product_plan(*map(_layout, tensors), tf32), *tensors)


@lru_cache(maxsize=1024)
def _product_plan(
    left: _Layout, right: _Layout, order: _Layout, offsets: _Layout, out: _Layout, tf32: bool
) -> _Plan:
    columns = left.shape[-1], right.shape[-1]
    if len(left.shape) != 3 or left.shape[:2] != right.shape[:2] or out.shape[1:] != columns:
        raise ValueError(
            f"left (B, T, M), right (B, T, N) and out (K, M, N) must fit, got {tuple(left.shape)}, "
            f"{tuple(right.shape)} and {tuple(out.shape)}"
        )
    return _plan(left, right, order, offsets, out, (*out.stride, 1), _Window(), 1, tf32)


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
    tensors = dy, x, order, offsets, out
    moves = tuple(stride), tuple(padding), tuple(dilation)
    plan = _convolution_plan(*map(_layout, tensors), *moves, groups, tf32)
    if plan is None:  # torch gives no kernel such a memory format
        sums = torch.empty_like(out, memory_format=torch.contiguous_format)
        convolution_sums(
            dy, x, order, offsets, sums, stride=stride, padding=padding, dilation=dilation,
            groups=groups, tf32=tf32,
        )  # fmt: skip
        out.copy_(sums)
    else:
        _launch(plan, *tensors, images=True)


@lru_cache(maxsize=1024)
def _convolution_plan(
    dy: _Layout, x: _Layout, order: _Layout, offsets: _Layout, out: _Layout,
    stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...], groups: int,
    tf32: bool,
) -> _Plan | None:  # fmt: skip
    """Return the launch; None where no kernel writes to the memory format of ``out``."""
    spatial = len(out.shape) - 3
    moved = len(stride), len(padding), len(dilation)
    lengths = {len(dy.shape) - 2, len(x.shape) - 2, *moved}
    columns = out.shape[1] if spatial > 0 else -1, out.shape[2] * groups if spatial > 0 else -1
    if not 1 <= spatial <= 3 or lengths != {spatial} or dy.shape[0] != x.shape[0]:
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
        tuple(dy.shape[2:]), tuple(x.shape[2:]), tuple(out.shape[3:]), stride, padding, dilation
    )
    strides = _strides_of(out)
    if strides is None:
        return None
    return _plan(dy, x, order, offsets, out, strides, window, groups, tf32, images=True)
