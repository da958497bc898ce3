"""The arithmetic of Grad Queue: bytes that are held, read and written, and sent.

Letters: L gradients of a queue, K clusters, W ranks; g is the bytes of an element of a gradient
(and of a parameter). A queue is told by the option ``queue_dtype``, a ring by the type of its
tensor: ``gq_triton.float8`` says what a ring of that type takes. ``kernels/README.md`` and
``docs/distributed.md`` say the same in words.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch

from gq_triton.float8 import BYTE, ring_bytes, stored_type
from gq_triton.plan.shapes import Bucket, Parameter

__all__ = [
    "FIGURES",
    "SHARES",
    "STATISTIC",
    "Queue",
    "arriving",
    "clustered",
    "combined",
    "gather",
    "law",
    "masses",
    "moments",
    "optimizer",
    "padded",
    "pushed",
    "queue_sharded",
    "queue_sliced",
    "queue_whole",
    "reduced",
    "statistics",
    "votes",
    "weighed",
]

# The option queue_dtype; None takes the parameter's type.
Queue = torch.dtype | str | None
# Mean and 1 / sigma of an element, each in float32. (float64 tensors have twice as much.)
STATISTIC = 8
# The figures of a parameter that metrics() adds up, five float64 numbers; and what a rank's samples
# count in a forward pass, four.
FIGURES, SHARES = 40, 32


# --- read and written per element


def moments(name: str) -> int:
    """Return how many moments per element torch's optimizer keeps."""
    return {"adamw": 2, "sgd": 1}[name]


def optimizer(name: str, g: int) -> int:
    """Return the bytes of torch's fused step: it reads p, g, moments, and writes all but g."""
    return (2 + moments(name)) * g + (1 + moments(name)) * g


def _written(length: int, ring: torch.dtype) -> int:
    """Return the bytes that a push writes: a row, but all of a ring in bytes."""
    return ring_bytes(length if ring == BYTE else 1, ring)


def law(length: int, ring: torch.dtype) -> int:
    """Return what ``GQSGD`` and ``GQAdamW`` add to the step: the ring is read, and a push."""
    return ring_bytes(length, ring) + _written(length, ring)


def weighed(length: int, g: int, ring: torch.dtype) -> int:
    """Return the bytes of a gradient that is weighted in place and queued (``weigh_``)."""
    return g + g + law(length, ring)


def pushed(length: int, g: int, ring: torch.dtype) -> int:
    """Return the bytes of a raw gradient that is queued (``push_``); bytes are read before."""
    read = ring_bytes(length, ring) if ring == BYTE else 0
    return g + read + _written(length, ring)


def statistics(length: int, ring: torch.dtype) -> int:
    """Return the bytes of mean and 1 / sigma of a ring (``queue_statistics``)."""
    return ring_bytes(length, ring) + STATISTIC


def combined(clusters: int, g: int, read: int) -> int:
    """Return the bytes of weighting K sums (``combine``), of which K - 1 are more to write before.

    Args:
        clusters: K.
        g: bytes of an element of a sum.
        read: bytes of the ring, or of the statistics in their place.
    """
    return (clusters - 1) * g + clusters * g + read + 2 * g


def padded(bucket: Bucket, world: int, size: int, back: bool) -> int:
    """Return the bytes of copying a bucket in slices that the ranks do not divide.

    A buffer of zeros is written and the bucket copied to it; the slices of all ranks are gathered
    in another buffer and copied back.

    Args:
        bucket: the parameters.
        world: W.
        size: bytes of an element that is sent.
        back: whether the bucket is gathered, too.
    """
    elements = sum(p.numel for p in bucket)
    return (5 if back else 3) * size * elements if elements % world else 0


# --- held per rank


def queue_whole(params: Sequence[Parameter], length: int, queue: Queue) -> int:
    """Return the bytes of a queue that every rank has whole.

    Args:
        params: the parameters.
        length: L.
        queue: its type.
    """
    return queue_sharded(params, 1, length, queue)


def queue_sliced(divided: Sequence[Bucket], world: int, length: int, queue: Queue) -> int:
    """Return the bytes of a rank's slices of a queue (``shard_queue=True``), bucket by bucket."""
    slices = [(-(-sum(p.numel for p in b) // world), b[0].dtype) for b in divided]
    return sum(n * ring_bytes(length, stored_type(queue, own)) for n, own in slices)


def queue_sharded(params: Sequence[Parameter], ranks: int, length: int, queue: Queue) -> int:
    """Return the bytes of the queue of the largest shards (FSDP2, HSDP)."""
    return sum(p.shard(ranks) * ring_bytes(length, stored_type(queue, p.dtype)) for p in params)


def clustered(divided: Sequence[Bucket], world: int) -> int:
    """Return the bytes of the statistics of all elements beside a queue in slices."""
    return sum(STATISTIC * world * -(-sum(p.numel for p in b) // world) for b in divided)


def arriving(units: Sequence[Sequence[Parameter]], ranks: int) -> int:
    """Return the bytes of the statistics of two units, which FSDP2 with clusters holds at most."""
    sizes = sorted(STATISTIC * ranks * sum(p.shard(ranks) for p in unit) for unit in units)
    return sum(sizes[-2:])


# --- sent per rank, on a ring


def gather(nbytes: float, world: int) -> float:
    """Return what a rank sends in an all-gather or reduce-scatter of so many bytes in all."""
    return (world - 1) / world * nbytes


def reduced(nbytes: float, world: int) -> float:
    """Return what a rank sends in an all-reduce: a reduce-scatter and an all-gather."""
    return 2 * gather(nbytes, world)


def votes(bucket: Bucket, world: int) -> int:
    """Return the bytes of the votes on a bucket in slices: one for each parameter that is cut."""
    size = -(-sum(p.numel for p in bucket) // world)
    ends = list(accumulate(p.numel for p in bucket))
    return sum(
        (end - p.numel) // size != (end - 1) // size
        for p, end in zip(bucket, ends, strict=True)
        if p.numel
    )


def masses(params: Sequence[Parameter]) -> int:
    """Return the bytes of what the ranks' samples count in clustered parameters of a bucket."""
    return 16 * len(params)
