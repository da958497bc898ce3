# pyright: basic, reportArgumentType=false, reportCallIssue=false
"""Gradients of weights by cluster: one launch for a layer, whatever its clusters are.

The kernels are in `weight_kernels.py`, the choice of tiles is in `tiles.py`. A linear layer is a
convolution whose window has one tap and meets every input once.

Shape legend: B = samples, K = clusters, T = positions of a sample at the output, S = positions at
the input, O or M = columns of ``dy``, I or N = columns of ``x``, G = groups of channels.
"""

import math
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

    def arguments(self) -> tuple[int, ...]:
        """Return the arguments that ``weight_kernels.GEOMETRY`` names, for three dimensions."""
        missing = 3 - len(self.out)
        ones, zeros = (1,) * missing, (0,) * missing
        out, size, taps, step, gap = (
            ones + n for n in (self.out, self.size, self.taps, self.step, self.gap)
        )
        sides = (*step, *zeros, *self.padding, *gap)
        return (*out[1:], *size, math.prod(taps), *taps[1:], *sides)


def _check(dy: Tensor, x: Tensor, order: Tensor, offsets: Tensor, out: Tensor) -> None:
    """Raise ValueError unless the types and sizes of all tensors fit each other."""
    wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
    if dy.dtype != x.dtype or dy.dtype not in TRITON_DTYPE or out.dtype != wide:
        raise ValueError(
            f"both factors must share one of {', '.join(map(str, TRITON_DTYPE))}, and out must be "
            f"{wide}, got {dy.dtype}, {x.dtype} and {out.dtype}"
        )
    if math.prod(dy.shape[:2]) >= 2**31 or any(math.prod(t.shape[1:]) >= 2**31 for t in (dy, x)):
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


def _is_whole(tensor: Tensor) -> bool:
    """Return whether the samples of a tensor are contiguous; they may lie at any distance."""
    expected = 1
    for size, stride in zip(reversed(tensor.shape[1:]), reversed(tensor.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _channels_first(dy: Tensor, x: Tensor) -> bool:
    """Return whether the kernel reads factors whose channels come before the positions.

    Such reads are narrow: 4 bytes in place of 16. A copy of both factors costs a large layer less,
    and copies to shared memory have at least 4 bytes.
    """
    if dy.itemsize < 4 or dy.numel() + x.numel() > MOST_NARROW:
        return False
    if _is_whole(dy) and _is_whole(x):
        return False
    return all(_is_whole(tensor.mT) for tensor in (dy, x))


def _launch(
    dy: Tensor, x: Tensor, order: Tensor, offsets: Tensor, out: Tensor, window: _Window,
    groups: int, tf32: bool,
) -> None:  # fmt: skip
    """Write the sums of products to ``out``.

    Args:
        dy: ``(B, T, O)``, the channels of all groups.
        x: ``(B, S, I)``, the channels of all groups.
        order: the samples by cluster.
        offsets: the ends of the clusters.
        out: ``(K, O, I / G, taps)`` at any strides.
        window: how the window moves.
        groups: G.
        tf32: whether float32 factors may be rounded to tf32.
    """
    _check(dy, x, order, offsets, out)
    if out.numel() == 0:
        return
    if dy.numel() == 0 or x.numel() == 0:
        out.zero_()
        return
    # Each output has one input of its own: nothing is a matrix.
    apart = groups > 1 and out.shape[2] == 1
    first = not apart and _channels_first(dy, x)
    if not first:
        dy, x = (t if _is_whole(t) else t.contiguous() for t in (dy, x))
    (batch, positions, channels), (clusters, _, inputs, taps) = dy.shape, out.shape
    outputs, plain, device = channels // groups, window.trivial, device_of(dy.device)
    common = {"rows": batch * positions, "clusters": clusters, "device": device}
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
    sums, total, tickets = out[None], None, None
    if tile.splits > 1:
        sums, total, tickets = _splits_of(out, tile.splits), out, take_tickets(out.device, tiles)
    arguments = (
        dy, x, order, offsets, sums, total, tickets, dy.stride(0), x.stride(0), outputs, inputs,
        *sums.stride(), positions, groups, clusters, tile.splits, *window.arguments(),
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


def _splits_of(out: Tensor, splits: int) -> Tensor:
    """Return memory for as many sums as there are splits, each with the strides of ``out``."""
    last = sum((n - 1) * stride for n, stride in zip(out.shape, out.stride(), strict=True))
    memory = torch.empty(splits * (last + 1), dtype=out.dtype, device=out.device)
    return memory.as_strided((splits, *out.shape), (last + 1, *out.stride()))


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
    _launch(left, right, order, offsets, out[..., None], _Window(), 1, tf32)


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
    dy, x = (t.movedim(1, -1).flatten(1, -2) for t in (dy, x))
    sums = out.flatten(3)  # a view in the memory formats that torch gives to a kernel
    _launch(dy, x, order, offsets, sums, window, groups, tf32)
    if sums.data_ptr() != out.data_ptr():
        out.copy_(sums.view(out.shape))
