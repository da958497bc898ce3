"""Sums by cluster for the scales and shifts of normalisation layers, in one pass over memory.

Shape legend: B = samples, C = channels, S = positions.
"""

import itertools
from functools import partial

import numpy as np
import torch
from torch import Tensor

from gq_triton.engines.compiled.law import DTYPES, sums
from gq_triton.engines.compiled.threads import run
from gq_triton.engines.eager import sums as plain

__all__ = ["channel_sums"]


@sums()
def _rows(start, stop, grad, x, mean, rstd, scale, shift):
    for row in range(start, stop):
        center = mean[row]
        product = total = 0.0
        for i in range(grad.shape[1]):
            product += np.float64(grad[row, i] * (x[row, i] - center))
            total += np.float64(grad[row, i])
        scale[row] = product * rstd[row]
        shift[row] = total


def channel_sums(
    dy: Tensor,
    order: Tensor,
    offsets: Tensor,
    *,
    x: Tensor | None = None,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Sum by cluster and channel, over all positions; see ``protocol``."""
    if x is None or mean is None or rstd is None:
        return plain.channel_sums(dy, order, offsets)
    mean, rstd = (plain.per_channel(t, dy.shape[1]) for t in (mean, rstd))
    scale, shift = _sample_sums(dy, x, mean, rstd)
    return plain.by_cluster(shift, order, offsets), plain.by_cluster(scale, order, offsets)


def _sample_sums(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of scale and shift, sample by sample; see ``plain.sample_sums``."""
    tensors = grad, x, mean, rstd
    known = all(t.dtype == grad.dtype and t.dtype in DTYPES for t in tensors)
    if not (known and grad.is_contiguous() and x.is_contiguous() and grad.numel()):
        return plain.sample_sums(grad, x, mean, rstd)
    batch, channels = grad.shape[:2]
    count = batch * channels
    per_row = [t.expand(batch, channels).reshape(count).numpy() for t in (mean, rstd)]
    scale, shift = (grad.new_empty(batch, channels) for _ in range(2))
    views = grad.view(count, -1).numpy(), x.view(count, -1).numpy(), *per_row
    outs = scale.view(count).numpy(), shift.view(count).numpy()
    threads = min(torch.get_num_threads(), count)
    bounds = [count * i // threads for i in range(threads + 1)]
    run([partial(_rows, a, b, *views, *outs) for a, b in itertools.pairwise(bounds)])
    return scale, shift
