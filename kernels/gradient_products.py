# pyright: basic, reportInvalidTypeForm=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false
"""Products of samples' gradients with the centres of all clusters, and the gradients' norms.

A gradient of a weight is ``sum_t d_t a_t^T`` and a centre ``sum_r e_r c_r^T``. By position
(equations 5 and 9) their product is ``sum_{t,r} (a_t c_r) (d_t e_r)``, and a squared norm is the
same sum over pairs of a sample's own positions. From the whole gradient (equation 8) both come out
of one tile after the other: a tile is formed, squared, multiplied with all centres, and forgotten.

Shape legend: B = samples, G = groups, T = positions, K = clusters, R = terms of a centre. A layer
has ``width`` inputs and ``height`` outputs. A block of rows has S samples by P positions, one of
columns KT clusters by RP terms.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gq_triton.kernels.launch import TRITON_DTYPE, device_guard
from gq_triton.kernels.tiles import cdiv, power_of_2

__all__ = ["gradient_products"]

# Rows and columns of a tile by position; what a product needs at least.
ROWS, MOST_COLUMNS, LEAST = 32, 32, 16
# Elements of a sum that are multiplied at a time.
BLOCK = 16
# Sides of a tile of a whole gradient, and most columns that it is multiplied with.
SIDE, WHOLE_COLUMNS = 32, 64
NUM_WARPS = 4


@triton.jit
def _rows_at(a, d, b, g, t, a_sample, a_group, a_place, d_sample, d_group, d_place):
    """Return where the two factors of samples ``b`` at positions ``t`` begin."""
    b, t = b.to(tl.int64), t.to(tl.int64)
    left = a + b * a_sample + g * a_group + t * a_place
    return left, d + b * d_sample + g * d_group + t * d_place


@triton.jit
def _products(
    rows, known, step, columns, wanted, stride, n,
    TILE_R: tl.constexpr, TILE_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the products of vectors of length n, ``(TILE_R, TILE_C)``."""
    total = tl.zeros((TILE_R, TILE_C), tl.float32)
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        one = tl.load(
            rows[:, None] + at[None, :] * step,
            mask=known[:, None] & (at < n)[None, :], other=0.0,
        )  # fmt: skip
        other = tl.load(
            columns[None, :] + at[:, None] * stride,
            mask=wanted[None, :] & (at < n)[:, None], other=0.0,
        )  # fmt: skip
        total = tl.dot(one.to(tl.float32), other.to(tl.float32), total, input_precision="ieee")
    return total


@triton.jit
def _dots_by_position(
    a, d, c, e, dots, tile, B, G, T, width, height, K, R, dots_sample,
    a_sample, a_group, a_place, a_step, d_sample, d_group, d_place, d_step,
    S: tl.constexpr, P: tl.constexpr, KT: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the products of S samples with KT clusters."""
    row, column = tl.arange(0, S * P), tl.arange(0, KT * RP)
    b, k = tl.program_id(0) * S + row // P, tile * KT + column // RP
    total = tl.zeros((S, KT), tl.float32)
    for g in range(0, G):
        for begin in range(0, T, P):
            t = begin + row % P
            known = (b < B) & (t < T)
            left, right = _rows_at(
                a, d, b, g, t, a_sample, a_group, a_place, d_sample, d_group, d_place
            )
            for first in range(0, R, RP):
                r = first + column % RP
                wanted = (k < K) & (r < R)
                place = ((k * G + g) * R + r).to(tl.int64)
                both = _products(
                    left, known, a_step, c + place * width, wanted, 1, width, S * P, KT * RP, BLOCK
                )
                both *= _products(
                    right, known, d_step, e + place * height, wanted, 1, height, S * P, KT * RP,
                    BLOCK,
                )  # fmt: skip
                # A factor that is not finite must stay with its sample.
                both = tl.where(known[:, None] & wanted[None, :], both, 0.0)
                total += tl.sum(tl.sum(tl.reshape(both, (S, P, KT, RP)), axis=3), axis=1)
    sample = tl.program_id(0) * S + tl.arange(0, S)
    cluster = tile * KT + tl.arange(0, KT)
    to = dots + sample.to(tl.int64)[:, None] * dots_sample + cluster[None, :]
    mask = (sample < B)[:, None] & (cluster < K)[None, :]
    tl.store(to, total.to(dots.dtype.element_ty), mask=mask)


@triton.jit
def _norms_by_position(
    a, d, norms, B, G, T, width, height,
    a_sample, a_group, a_place, a_step, d_sample, d_group, d_place, d_step,
    S: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the squared norms of S samples."""
    row = tl.arange(0, S * P)
    b = tl.program_id(0) * S + row // P
    total = tl.zeros((S,), tl.float32)
    for g in range(0, G):
        for begin in range(0, T, P):
            t = begin + row % P
            known = (b < B) & (t < T)
            left, right = _rows_at(
                a, d, b, g, t, a_sample, a_group, a_place, d_sample, d_group, d_place
            )
            for first in range(begin, T, P):
                t = first + row % P
                wanted = (b < B) & (t < T)
                left_to, right_to = _rows_at(
                    a, d, b, g, t, a_sample, a_group, a_place, d_sample, d_group, d_place
                )
                both = _products(
                    left, known, a_step, left_to, wanted, a_step, width, S * P, S * P, BLOCK
                )
                both *= _products(
                    right, known, d_step, right_to, wanted, d_step, height, S * P, S * P, BLOCK
                )
                same = (b[:, None] == b[None, :]) & known[:, None] & wanted[None, :]
                # Pairs of different blocks are met once, and count twice.
                both = tl.where(same, both, 0.0) * tl.where(first > begin, 2.0, 1.0)
                total += tl.sum(tl.reshape(tl.sum(both, axis=1), (S, P)), axis=1)
    sample = tl.program_id(0) * S + tl.arange(0, S)
    tl.store(norms + sample, total.to(norms.dtype.element_ty), mask=sample < B)


@triton.jit(do_not_specialize=["B", "G", "T", "K", "R", "n_tiles"])
def _position_kernel(
    a, d, c, e, dots, norms, B, G, T, width, height, K, R, n_tiles, dots_sample,
    a_sample, a_group, a_place, a_step, d_sample, d_group, d_place, d_step,
    S: tl.constexpr, P: tl.constexpr, KT: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the products of S samples with KT clusters, or, in the last column, their norms."""
    tile = tl.program_id(1)
    if tile < n_tiles:
        _dots_by_position(
            a, d, c, e, dots, tile, B, G, T, width, height, K, R, dots_sample,
            a_sample, a_group, a_place, a_step, d_sample, d_group, d_place, d_step,
            S, P, KT, RP, BLOCK,
        )  # fmt: skip
    else:
        _norms_by_position(
            a, d, norms, B, G, T, width, height,
            a_sample, a_group, a_place, a_step, d_sample, d_group, d_place, d_step,
            S, P, BLOCK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["B", "G", "T", "K", "R", "n_tiles", "with_norms"])
def _whole_kernel(
    a, d, c, e, dots, norms, B, G, T, width, height, K, R, n_tiles, with_norms, dots_sample,
    a_sample, a_group, a_place, a_step, d_sample, d_group, d_place, d_step,
    SIDE: tl.constexpr, KT: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the products of one sample's gradient with KT clusters, and its norm."""
    b = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    column = tl.arange(0, KT * RP)
    k = tile * KT + column // RP
    side, block = tl.arange(0, SIDE), tl.arange(0, BLOCK)
    total = tl.zeros((KT,), tl.float32)
    norm = tl.zeros((SIDE,), tl.float32)
    for g in range(0, G):
        left, right = a + b * a_sample + g * a_group, d + b * d_sample + g * d_group
        for first in range(0, R, RP):
            r = first + column % RP
            wanted = (k < K) & (r < R)
            place = ((k * G + g) * R + r).to(tl.int64)
            for begin in range(0, height, SIDE):
                o = begin + side
                half = tl.zeros((SIDE, KT * RP), tl.float32)
                for start in range(0, width, SIDE):
                    i = start + side
                    gradient = tl.zeros((SIDE, SIDE), tl.float32)
                    for at in range(0, T, BLOCK):
                        t = at + block
                        one = tl.load(
                            right + o[:, None] * d_step + t.to(tl.int64)[None, :] * d_place,
                            mask=(o < height)[:, None] & (t < T)[None, :], other=0.0,
                        ).to(tl.float32)  # fmt: skip
                        other = tl.load(
                            left + t.to(tl.int64)[:, None] * a_place + i[None, :] * a_step,
                            mask=(t < T)[:, None] & (i < width)[None, :], other=0.0,
                        ).to(tl.float32)  # fmt: skip
                        gradient = tl.dot(one, other, gradient, input_precision="ieee")
                    if first == 0:
                        norm += tl.sum(gradient * gradient, axis=1)
                    if n_tiles > 0:
                        centre = tl.load(
                            c + (place * width)[None, :] + i[:, None],
                            mask=(i < width)[:, None] & wanted[None, :], other=0.0,
                        )  # fmt: skip
                        half = tl.dot(gradient, centre, half, input_precision="ieee")
                if n_tiles > 0:
                    known = (o < height)[:, None] & wanted[None, :]
                    centre = tl.load(
                        e + (place * height)[None, :] + o[:, None], mask=known, other=0.0
                    )
                    both = tl.sum(tl.where(known, half * centre, 0.0), axis=0)
                    total += tl.sum(tl.reshape(both, (KT, RP)), axis=1)
    cluster = tile * KT + tl.arange(0, KT)
    mask = (cluster < K) & (n_tiles > 0)
    tl.store(dots + b * dots_sample + cluster, total.to(dots.dtype.element_ty), mask=mask)
    if (with_norms > 0) & (tile == 0):
        tl.store(norms + b, tl.sum(norm).to(norms.dtype.element_ty))


def gradient_products(
    inputs: Tensor,
    outputs: Tensor,
    centre_inputs: Tensor,
    centre_outputs: Tensor,
    dots: Tensor,
    norms: Tensor,
    *,
    whole_dots: bool,
    whole_norms: bool,
) -> None:
    """Write products and squared norms; see ``engines.protocol``.

    Factors of float64 are not covered. Sums are formed in float32, in a fixed order, without tf32.

    Raises:
        ValueError: the tensors disagree in shape, dtype or device, or are not covered.
    """
    _check(inputs, outputs, centre_inputs, centre_outputs, dots, norms)
    batch, groups, positions, width = inputs.shape
    height, (clusters, _, terms, _) = outputs.shape[3], centre_inputs.shape
    given = (
        inputs, outputs, centre_inputs.contiguous(), centre_outputs.contiguous(), dots, norms,
        batch, groups, positions, width, height, clusters, terms,
    )  # fmt: skip
    strides = dots.stride(0), *inputs.stride(), *outputs.stride()
    with device_guard(inputs.device):
        if not (whole_dots and whole_norms):
            part = min(ROWS, power_of_2(positions))
            rows = max(1, (ROWS if batch * part >= ROWS else LEAST) // part)
            kt, rp = columns_of(clusters, terms, MOST_COLUMNS)
            tiles = 0 if whole_dots else cdiv(clusters, kt)
            grid = cdiv(batch, rows), tiles + (not whole_norms)
            _position_kernel[grid](
                *given, tiles, *strides,
                S=rows, P=part, KT=kt, RP=rp, BLOCK=BLOCK, num_warps=NUM_WARPS,
            )  # fmt: skip
        if whole_dots or whole_norms:
            kt, rp = columns_of(clusters, terms, WHOLE_COLUMNS)
            tiles = cdiv(clusters, kt) if whole_dots else 0
            _whole_kernel[batch, max(1, tiles)](
                *given, tiles, int(whole_norms), *strides,
                SIDE=SIDE, KT=kt, RP=rp, BLOCK=BLOCK, num_warps=NUM_WARPS,
            )  # fmt: skip


def columns_of(clusters: int, terms: int, most: int) -> tuple[int, int]:
    """Return how many clusters, and terms of each, a tile has: powers of two, at least 16 columns.

    Example: 10 clusters of 3 terms: 8 by 4, with at most 32 columns.
    """
    rp = min(LEAST, power_of_2(terms))
    kt = min(most // rp, power_of_2(clusters))
    return max(kt, LEAST // rp), rp


def _check(inputs, outputs, centre_inputs, centre_outputs, dots, norms) -> None:
    """Raise ValueError unless factors, centres and results fit each other."""
    for name, factor in {"inputs": inputs, "outputs": outputs}.items():
        if factor.dim() != 4 or TRITON_DTYPE.get(factor.dtype) in (None, tl.float64):
            raise ValueError(
                f"{name} must be float16, bfloat16 or float32 of four dimensions, got "
                f"{factor.dtype} of shape {tuple(factor.shape)}"
            )
    batch, groups, positions, width = inputs.shape
    clusters, _, terms, _ = centre_inputs.shape
    height = outputs.shape[3]
    right = {
        "outputs": (outputs, (batch, groups, positions, height), outputs.dtype),
        "centre_inputs": (centre_inputs, (clusters, groups, terms, width), torch.float32),
        "centre_outputs": (centre_outputs, (clusters, groups, terms, height), torch.float32),
        "dots": (dots, (batch, clusters), dots.dtype),
        "norms": (norms, (batch,), norms.dtype),
    }
    for name, (tensor, shape, dtype) in right.items():
        fits = tensor.shape == shape and tensor.dtype == dtype and min(shape) > 0
        if not fits or tensor.device != inputs.device:
            raise ValueError(
                f"{name} must be {dtype} of shape {shape} with no 0 on {inputs.device}, got "
                f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
            )
    if dots.stride(1) != 1 or norms.stride(0) != 1:
        raise ValueError(
            f"dots and norms must have contiguous rows, got strides {dots.stride()} and "
            f"{norms.stride()}"
        )
