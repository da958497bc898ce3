"""The update of one step fused into one pass over memory, compiled for the CPU by Numba.

The same functions as ``eager`` and ``kernels``. A tensor whose weights are all 1 (warm-up, rho = 1,
a gradient that is not finite) or whose types Numba does not know goes to ``eager``, which there is
bit for bit ``torch.optim``. Numba comes with the extra ``gq_triton[cpu]``.

Shape legend: L = queue slots, E = effective length, P = elements of one parameter, N = tensors.
"""

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache, partial
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from gq_triton import eager
from gq_triton.eager import VARIANCE_FLOOR, Turn, all_finite

__all__ = ["all_finite", "combine", "gqadamw_", "gqsgd_", "weigh_"]

# Elements of one piece of work: large against the cost of a call, small enough to balance threads.
CHUNK = 1 << 18
# Elements that are updated before they are queued: their gradients are still in L1 then.
TILE = 2048
_DTYPES = {torch.float32: np.float32, torch.float64: np.float64}

# No reassociation: (q - b) - s must be computed as written for a constant queue to be constant.
_exact = partial(numba.njit, nogil=True, error_model="numpy", fastmath={"contract", "nsz"})
_sums = partial(numba.njit, nogil=True, error_model="numpy", fastmath=True)

Job = Callable[[], Any]


@cache
def _spread(used: int) -> Callable[..., Any]:
    """Return ``eager.Spread.of`` for one element and an effective length the compiler unrolls."""

    @_exact()
    def spread(ring, stride, slots, slot, j, law):
        _, _, one, share, tiny, floor = law
        newest = slot - 1
        newest = newest + slots if newest < 0 else newest
        base = ring[np.uint64(newest * stride) + j]
        total = base - base
        largest = tiny
        for age in range(1, used):
            row = slot - 1 - age
            row = row + slots if row < 0 else row
            deviation = ring[np.uint64(row * stride) + j] - base
            total += deviation
            largest = max(largest, abs(deviation))
        mean = total * share
        inverse = one / largest
        scaled = mean * inverse
        squares = scaled * scaled
        for age in range(1, used):
            row = slot - 1 - age
            row = row + slots if row < 0 else row
            scaled = ((ring[np.uint64(row * stride) + j] - base) - mean) * inverse
            squares += scaled * scaled
        return base, mean, inverse, np.sqrt(max(squares * share, floor))

    return spread


@cache
def _weight(used: int) -> Callable[..., Any]:
    """Return the law of one element."""
    spread = _spread(used)

    @_exact()
    def weight(ring, stride, slots, slot, j, x, law):
        low, high = law[0], law[1]
        base, mean, inverse, sigma = spread(ring, stride, slots, slot, j, law)
        z = (abs((x - base) - mean) * inverse) / sigma
        return min(max(z, low), high)

    return weight


@_sums()
def _tile_sums(grad, weights, count, unscale, low, high, out):
    raw = weighted = total = 0.0
    at_high = at_low = 0
    for j in range(count):
        g = np.float64(grad[j]) * unscale
        w = np.float64(weights[j])
        raw += g * g
        weighted += (g * w) * (g * w)
        total += w
        at_high += weights[j] >= high
        at_low += weights[j] <= low
    out[0] += raw
    out[1] += weighted
    out[2] += total
    out[3] += at_high
    out[4] += at_low


@cache
def _weigh_kernel(used: int) -> Callable[..., Any]:
    weight = _weight(used)

    @_exact()
    def kernel(start, stop, ring, stride, slots, slot, grad, unscale, out, law):
        low, high = law[0], law[1]
        weights = np.empty(TILE, grad.dtype)
        for tile in range(start, stop, TILE):
            count = min(TILE, stop - tile)
            for i in range(count):
                j = np.uint64(tile + i)
                x = grad[j] * unscale
                weights[i] = weight(ring, stride, slots, slot, j, x, law)
            _tile_sums(grad[tile : tile + count], weights, count, unscale, low, high, out)
            for i in range(count):
                j = np.uint64(tile + i)
                g = grad[j]
                ring[np.uint64(slot * stride) + j] = g * unscale
                grad[j] = g * weights[i]

    return kernel


@cache
def _sgd_kernel(used: int, has_momentum: bool, nesterov: bool) -> Callable[..., Any]:
    weight = _weight(used)

    @_exact()
    def kernel(start, stop, ring, stride, slots, slot, grad, unscale, p, buf, law, update):
        sign, decay, momentum, damped, lr = update
        for tile in range(start, stop, TILE):
            end = min(tile + TILE, stop)
            for i in range(tile, end):
                j = np.uint64(i)
                x = grad[j] * unscale
                g = x * weight(ring, stride, slots, slot, j, x, law)
                g = sign * g + decay * p[j]
                if has_momentum:
                    m = momentum * buf[j] + damped * g
                    buf[j] = m
                    g = g + momentum * m if nesterov else m
                p[j] -= lr * g
            for i in range(tile, end):
                j = np.uint64(i)
                ring[np.uint64(slot * stride) + j] = grad[j] * unscale

    return kernel


@cache
def _adamw_kernel(used: int) -> Callable[..., Any]:
    weight = _weight(used)

    @_exact()
    def kernel(start, stop, ring, stride, slots, slot, grad, unscale, p, m, v, law, update):
        sign, keep, new1, beta2, new2, inverse_correction, eps, step_size = update
        for tile in range(start, stop, TILE):
            end = min(tile + TILE, stop)
            for i in range(tile, end):
                j = np.uint64(i)
                x = grad[j] * unscale
                g = sign * x * weight(ring, stride, slots, slot, j, x, law)
                first = m[j] + new1 * (g - m[j])
                second = beta2 * v[j] + new2 * g * g
                m[j] = first
                v[j] = second
                p[j] = p[j] * keep - step_size * (
                    first / (np.sqrt(second) * inverse_correction + eps)
                )
            for i in range(tile, end):
                j = np.uint64(i)
                ring[np.uint64(slot * stride) + j] = grad[j] * unscale

    return kernel


@cache
def _combine_kernel(used: int) -> Callable[..., Any]:
    """Return the weighted sum of cluster means."""
    spread = _spread(used)

    @_exact()
    def kernel(
        start, stop, ring, stride, slots, slot, sums, unscale, clusters, raw, out, seen, law
    ):
        low, high = law[0], law[1]
        inverse, portion, sigma_scale, population = clusters
        buffers = np.empty((7, TILE), sums.dtype)
        base, mean, shrink, sigma, mass, at_high, at_low = buffers
        for tile in range(start, stop, TILE):
            end = min(tile + TILE, stop)
            count = end - tile
            total, result = raw[tile:end], out[tile:end]
            for i in range(count):
                j = np.uint64(tile + i)
                base[i], mean[i], shrink[i], sigma[i] = spread(ring, stride, slots, slot, j, law)
            total[:] = 0
            result[:] = 0
            mass[:count] = 0
            at_high[:count] = 0
            at_low[:count] = 0
            for k in range(sums.shape[0]):
                if population[k] == 0:
                    continue
                part = sums[k, tile:end]
                invert, weigh, widen, share = inverse[k], portion[k], sigma_scale[k], population[k]
                for i in range(count):
                    total[i] += part[i]
                for i in range(count):
                    c = part[i] * invert
                    z = (abs((c * unscale - base[i]) - mean[i]) * shrink[i]) / (sigma[i] * widen)
                    w = min(max(z, low), high)
                    result[i] += weigh * (w * c)
                    mass[i] += share * w
                    at_high[i] += share if w >= high else share - share
                    at_low[i] += share if w <= low else share - share
            _combine_sums(total, result, mass, at_high, at_low, unscale, seen)

    return kernel


@_sums()
def _combine_sums(raw, weighted, mass, at_high, at_low, unscale, out):
    a = b = c = d = e = 0.0
    for i in range(raw.size):
        r, w = np.float64(raw[i]) * unscale, np.float64(weighted[i]) * unscale
        a += r * r
        b += w * w
        c += mass[i]
        d += at_high[i]
        e += at_low[i]
    out[0] += a
    out[1] += b
    out[2] += c
    out[3] += d
    out[4] += e


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Return the worker threads; a forked child has another process id and makes its own."""
    return ThreadPoolExecutor(threads, thread_name_prefix="gq_triton")


def _run(jobs: list[Job]) -> None:
    """Run jobs that do not depend on each other on as many threads as torch uses."""
    threads = min(torch.get_num_threads(), len(jobs))
    if threads <= 1:
        for job in jobs:
            job()
        return
    shares = [jobs[thread::threads] for thread in range(threads)]

    def work(share: list[Job]) -> None:
        for job in share:
            job()

    helpers = [_pool(os.getpid(), threads - 1).submit(work, share) for share in shares[1:]]
    work(shares[0])
    for helper in helpers:
        helper.result()


def _fuses(turn: Turn, *tensors: Tensor) -> bool:
    """Return whether the compiled pass does this tensor: weights active, one type it knows."""
    dtype = tensors[0].dtype
    known = dtype in _DTYPES and all(tensor.dtype == dtype for tensor in tensors)
    dense = all(tensor.is_contiguous() for tensor in tensors)
    return known and dense and bool(turn.rows) and tensors[0].numel() > 0


def _ring(turn: Turn, queue: Tensor) -> tuple[Any, ...]:
    slots, stride = queue.shape
    return queue.view(-1).numpy(), stride, slots, turn.slot


def _count_(counters: list[Tensor]) -> None:
    """Count one more queued gradient in each ring."""
    if counters:
        torch._foreach_add_(counters, 1)  # pyright: ignore[reportPrivateImportUsage]


@lru_cache(maxsize=64)
def _law(kind: type, rho: float, used: int) -> tuple[Any, ...]:
    """Return low, high, 1, 1/E, the smallest normal number and the variance floor in one type."""
    tiny = np.finfo(kind).tiny
    return _typed(kind, (1.0 / rho, rho, 1.0, 1.0 / used, float(tiny), VARIANCE_FLOOR))


@lru_cache(maxsize=64)
def _typed(kind: type, values: tuple[float, ...]) -> tuple[Any, ...]:
    """Return numbers in the type of the tensors, as a kernel takes them."""
    return tuple(kind(value) for value in values)


def _chunks(numel: int) -> list[tuple[int, int]]:
    return [(start, min(start + CHUNK, numel)) for start in range(0, numel, CHUNK)]


def weigh_(
    grads: Sequence[Tensor],
    queues: Sequence[Tensor],
    queued: Sequence[Tensor],
    finite: Tensor,
    *,
    rho: float,
    length: Tensor | None = None,
    grad_scale: Tensor | None = None,
) -> Tensor:
    """Weight gradients in place and queue the raw ones; see ``eager.weigh_``."""
    statistics = torch.zeros(len(grads), 5)
    unscale = 1.0 if grad_scale is None else 1.0 / float(grad_scale)
    jobs: list[Job] = []
    counters: list[Tensor] = []
    partials: list[tuple[int, list[Any]]] = []
    for index, (grad, queue) in enumerate(zip(grads, queues, strict=True)):
        turn = Turn(queue, queued[index], bool(finite[index]), rho, length)
        if not _fuses(turn, grad, queue):
            one = slice(index, index + 1)
            scale: dict[str, Any] = {"rho": rho, "length": length, "grad_scale": grad_scale}
            statistics[one] = eager.weigh_(
                grads[one], queues[one], queued[one], finite[one], **scale
            )
            continue
        kind = _DTYPES[grad.dtype]
        kernel, law = _weigh_kernel(len(turn.rows)), _law(kind, rho, len(turn.rows))
        ring, g = _ring(turn, queue), grad.numpy()
        sums = [np.zeros(5) for _ in _chunks(grad.numel())]
        partials.append((index, sums))
        for out, (start, stop) in zip(sums, _chunks(grad.numel()), strict=True):
            jobs.append(partial(kernel, start, stop, *ring, g, kind(unscale), out, law))
        counters.append(queued[index])
    _run(jobs)
    _count_(counters)
    for index, sums in partials:
        statistics[index] = torch.from_numpy(np.sum(sums, axis=0))
    return statistics


def gqsgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    queues: Sequence[Tensor],
    queued: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] | None,
    finite: Tensor | None,
    *,
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    rho: float,
    first: bool,
    length: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Take one step of SGD on weighted gradients; see ``eager.gqsgd_``."""
    if found_inf is not None and bool(found_inf):
        return
    settings: dict[str, Any] = dict(
        lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay,
        nesterov=nesterov, maximize=maximize, rho=rho, first=first, length=length,
        grad_scale=grad_scale,
    )  # fmt: skip
    unscale = 1.0 if grad_scale is None else 1.0 / float(grad_scale)
    hyper = (-1.0 if maximize else 1.0, weight_decay, momentum, 1.0 - dampening, float(lr))
    jobs: list[Job] = []
    counters: list[Tensor] = []
    for index, (param, grad, queue) in enumerate(zip(params, grads, queues, strict=True)):
        turn = Turn(queue, queued[index], finite is None or bool(finite[index]), rho, length)
        buffer = param if momentum_buffers is None else momentum_buffers[index]
        if first or not _fuses(turn, param, grad, queue, buffer):
            one = slice(index, index + 1)
            buffers = None if momentum_buffers is None else momentum_buffers[one]
            vouched = None if finite is None else finite[one]
            eager.gqsgd_(
                params[one], grads[one], queues[one], queued[one], buffers, vouched, **settings
            )
            continue
        kind, used = _DTYPES[param.dtype], len(turn.rows)
        kernel = _sgd_kernel(used, momentum_buffers is not None, nesterov)
        tensors = grad.numpy(), kind(unscale), param.numpy(), buffer.numpy()
        arguments = *_ring(turn, queue), *tensors, _law(kind, rho, used), _typed(kind, hyper)
        for start, stop in _chunks(param.numel()):
            jobs.append(partial(kernel, start, stop, *arguments))
        counters.append(queued[index])
    _run(jobs)
    _count_(counters)


def gqadamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    queues: Sequence[Tensor],
    queued: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    finite: Tensor | None,
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    rho: float,
    length: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Take one step of AdamW on weighted gradients; see ``eager.gqadamw_``."""
    if found_inf is not None and bool(found_inf):
        return
    settings: dict[str, Any] = dict(
        lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, maximize=maximize,
        rho=rho, length=length, grad_scale=grad_scale,
    )  # fmt: skip
    unscale = 1.0 if grad_scale is None else 1.0 / float(grad_scale)
    # A learning rate that is a tensor is worked with in its own type, as torch does.
    keep = float(1 - lr * weight_decay)
    jobs: list[Job] = []
    counters: list[Tensor] = []
    for index, (param, grad, queue) in enumerate(zip(params, grads, queues, strict=True)):
        turn = Turn(queue, queued[index], finite is None or bool(finite[index]), rho, length)
        moments = exp_avgs[index], exp_avg_sqs[index]
        if not _fuses(turn, param, grad, queue, *moments):
            one = slice(index, index + 1)
            state = queues[one], queued[one], exp_avgs[one], exp_avg_sqs[one], steps[one]
            vouched = None if finite is None else finite[one]
            eager.gqadamw_(params[one], grads[one], *state, vouched, **settings)
            continue
        steps[index].add_(1)
        step = float(steps[index])
        hyper = (
            -1.0 if maximize else 1.0, keep, 1 - beta1, beta2, 1 - beta2,
            (1 - beta2**step) ** -0.5, eps, float(lr / (1 - beta1**step)),
        )  # fmt: skip
        kind, used = _DTYPES[param.dtype], len(turn.rows)
        tensors = grad.numpy(), kind(unscale), param.numpy(), *(t.numpy() for t in moments)
        arguments = *_ring(turn, queue), *tensors, _law(kind, rho, used), _typed(kind, hyper)
        for start, stop in _chunks(param.numel()):
            jobs.append(partial(_adamw_kernel(used), start, stop, *arguments))
        counters.append(queued[index])
    _run(jobs)
    _count_(counters)


def combine(
    sums: Tensor,
    queue: Tensor,
    queued: Tensor,
    *,
    inverse_shares: Tensor,
    mixture: Tensor,
    sigma_scales: Tensor,
    rho: float,
    length: Tensor | None = None,
    grad_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight the cluster means of one parameter and add them up; see ``eager.combine``."""
    turn = Turn(queue, queued, True, rho, length)
    known = sums.dtype in _DTYPES and sums.dtype == queue.dtype
    dense = sums.is_contiguous() and queue.stride(1) == 1

    def plain() -> tuple[Tensor, Tensor, Tensor]:
        settings: dict[str, Any] = {"rho": rho, "length": length, "grad_scale": grad_scale}
        shares = {"inverse_shares": inverse_shares, "mixture": mixture}
        return eager.combine(sums, queue, queued, sigma_scales=sigma_scales, **shares, **settings)

    if not (known and dense and turn.rows and sums.numel()):
        return plain()
    kind, used = _DTYPES[sums.dtype], len(turn.rows)
    unscale = 1.0 if grad_scale is None else 1.0 / float(grad_scale)
    occupied = inverse_shares > 0
    population = torch.where(occupied, 1.0 / inverse_shares, 0.0)
    population = population / population.sum()
    clusters = tuple(
        values.to(sums.dtype).numpy()
        for values in (inverse_shares, mixture, sigma_scales, population)
    )
    weighted, raw = torch.empty_like(sums[0]), torch.empty_like(sums[0])
    # A part of a ring: rows keep the distance they have in the whole.
    stride, slots = queue.stride(0), queue.shape[0]
    ring = queue.as_strided(((slots - 1) * stride + queue.shape[1],), (1,)).numpy()
    kernel, law = _combine_kernel(used), _law(kind, rho, used)
    views = sums.numpy(), kind(unscale), clusters, raw.numpy(), weighted.numpy()
    pieces = _chunks(sums.shape[1])
    seen = [np.zeros(5) for _ in pieces]
    _run(
        [
            partial(kernel, start, stop, ring, stride, slots, turn.slot, *views, out, law)
            for (start, stop), out in zip(pieces, seen, strict=True)
        ]
    )
    # What is not finite in any cluster is not in their sum either.
    if not math.isfinite(raw.sum()):
        return plain()
    return weighted, raw, torch.from_numpy(np.sum(seen, axis=0))
