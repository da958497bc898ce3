"""What the scales and shifts of normalisation layers are made of, in one pass over memory.

Shape legend: B = samples, C = channels, S = positions.
"""

import itertools
from functools import partial

import numpy as np
import torch
from torch import Tensor

from gq_triton.compiled.law import DTYPES, sums
from gq_triton.compiled.threads import run
from gq_triton.eager import norms

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
    """Sum what scales and shifts get by cluster and channel; see ``eager.channel_sums``."""
    if x is None or mean is None or rstd is None:
        return norms.channel_sums(dy, order, offsets)
    mean, rstd = (norms.per_channel(t, dy.shape[1]) for t in (mean, rstd))
    scale, shift = _sample_sums(dy, x, mean, rstd)
    return norms.by_cluster(shift, order, offsets), norms.by_cluster(scale, order, offsets)


def _sample_sums(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over positions what a scale and a shift get from a sample; see ``norms.sample_sums``."""
    tensors = grad, x, mean, rstd
    known = all(t.dtype == grad.dtype and t.dtype in DTYPES for t in tensors)
    if not (known and grad.is_contiguous() and x.is_contiguous() and grad.numel()):
        return norms.sample_sums(grad, x, mean, rstd)
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
