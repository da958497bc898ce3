"""The ways to use the package with a model on W ranks, and what each costs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from gq_triton.float8 import FLOAT8, ring_bytes, stored_type, wire_type
from gq_triton.plan import formulas
from gq_triton.plan.exchange import ddp, exposed, fsdp
from gq_triton.plan.machine import Machine
from gq_triton.plan.shapes import Parameter, Shapes, buckets

__all__ = ["QUEUES", "WAYS", "Cost", "Setup", "Way", "cost"]


@dataclass(frozen=True)
class Way:
    """A way to use the package.

    Attributes:
        name: what the table calls it.
        wrap: ``"ddp"``, ``"fsdp2"`` or ``"hsdp"``.
        law: what weights: ``"optimizer"``, ``"hook"`` or ``"plug-in"``.
        sliced: whether DDP's hook keeps the queue in slices.
        clusters: whether each rank clusters its samples.
    """

    name: str
    wrap: str
    law: str
    sliced: bool = False
    clusters: bool = False


WAYS = (
    Way("DDP, GQ optimizer", "ddp", "optimizer"),
    Way("DDP hook", "ddp", "hook"),
    Way("DDP hook, slices", "ddp", "hook", sliced=True),
    Way("FSDP2, GQ optimizer", "fsdp2", "optimizer"),
    Way("FSDP2, plug-in", "fsdp2", "plug-in"),
    Way("HSDP, GQ optimizer", "hsdp", "optimizer"),
    Way("HSDP, plug-in", "hsdp", "plug-in"),
    Way("DDP hook, clusters", "ddp", "hook", clusters=True),
    Way("DDP hook, clusters, slices", "ddp", "hook", sliced=True, clusters=True),
    Way("FSDP2, clusters", "fsdp2", "plug-in", clusters=True),
    Way("HSDP, clusters", "hsdp", "plug-in", clusters=True),
)


# The types of a queue, as ``queue_dtype`` takes them: each rounds more than those before it.
QUEUES: tuple[formulas.Queue, ...] = None, torch.bfloat16, FLOAT8


@dataclass(frozen=True)
class Setup:
    """What is trained, and how.

    Attributes:
        shapes: the model's.
        optimizer: ``"adamw"`` or ``"sgd"``, with momentum.
        length: L.
        clusters: K of a rank, or 0.
    """

    shapes: Shapes
    optimizer: str
    length: int
    clusters: int

    @property
    def queues(self) -> list[formulas.Queue]:
        """The types of a queue of which each takes less than those before it."""
        found: dict[int, formulas.Queue] = {}
        for queue in QUEUES:
            size = formulas.queue_whole(self.shapes.parameters, self.length, queue)
            if size < min(found, default=size + 1):
                found[size] = queue
        return list(found.values())


@dataclass(frozen=True)
class Cost:
    """What a way costs on one GPU, in bytes and seconds.

    Attributes:
        way: the way.
        queue_dtype: the queue's type, one of ``QUEUES``.
        world: W.
        queue: bytes of the queue.
        beside: bytes of the statistics that stand for the queue of other ranks.
        state: bytes of parameters, gradients and the optimizer's moments.
        moved: bytes that the law reads and writes in a step.
        sent: bytes that a rank sends in a step.
        sent_plain: the same without the law.
        exposed: seconds of communication that nothing hides.
        exposed_plain: the same without the law.
        step: seconds of a step.
        step_plain: the same without the law.
    """

    way: Way
    queue_dtype: formulas.Queue
    world: int
    queue: float
    beside: float
    state: float
    moved: float
    sent: float
    sent_plain: float
    exposed: float
    exposed_plain: float
    step: float
    step_plain: float

    @property
    def overhead(self) -> float:
        """The share of a step that the law adds."""
        return self.step / self.step_plain - 1

    @property
    def held(self) -> float:
        """All bytes."""
        return self.queue + self.beside + self.state


def cost(
    way: Way, setup: Setup, machine: Machine, world: int, queue_dtype: formulas.Queue
) -> Cost | None:
    """Return what a way costs, or None where it does not exist.

    One GPU divides nothing. HSDP keeps a copy of the model per node: it needs several whole nodes.
    A way with clusters needs clusters; one without them cannot have any.
    """
    if way.clusters != bool(setup.clusters):
        return None
    if world == 1 and (way.sliced or way.wrap != "ddp"):
        return None
    if way.wrap == "hsdp" and (world <= machine.per_node or world % machine.per_node):
        return None
    shapes = setup.shapes
    shards = {"ddp": 1, "fsdp2": world, "hsdp": machine.per_node}[way.wrap]
    if way.wrap == "ddp":
        plain = ddp(shapes, world)
        ours = ddp(shapes, world, queue=queue_dtype, sliced=way.sliced, clusters=way.clusters)
    else:
        number = len(shapes.parameters)
        copies = world // shards
        plain = fsdp(shapes, shards, copies)
        # A vote on every parameter; the plug-in adds up its figures too.
        figures = [formulas.FIGURES * number]
        end = [number, *(figures if way.law == "plug-in" and not way.clusters else [])]
        everywhere = [*figures, formulas.SHARES] if way.clusters else []
        ours = fsdp(shapes, shards, copies, queue=queue_dtype, clusters=way.clusters,
                    end=end, everywhere=everywhere)  # fmt: skip
    moved = _moved(way, setup, queue_dtype, world, shards)
    each = 2 + formulas.moments(setup.optimizer)
    stepped = _over(shapes.parameters, shards,
                    lambda p: formulas.optimizer(setup.optimizer, p.itemsize))  # fmt: skip
    waits = [exposed(exchange, machine) for exchange in (ours, plain)]
    common = machine.compute + stepped / machine.memory
    queue, beside = _held(way, setup, queue_dtype, world, shards)
    return Cost(
        way,
        queue_dtype,
        world,
        queue,
        beside,
        state=_over(shapes.parameters, shards, lambda p: each * p.itemsize),
        moved=moved,
        sent=ours.sent,
        sent_plain=plain.sent,
        exposed=waits[0],
        exposed_plain=waits[1],
        step=common + waits[0] + moved / machine.memory,
        step_plain=common + waits[1],
    )


def _over(params: Sequence[Parameter], shards: int, each: Callable[[Parameter], float]) -> float:
    """Return the sum over the largest shards of all elements' bytes, of which ``each`` tells."""
    return sum(p.shard(shards) * each(p) for p in params)


def _held(
    way: Way, setup: Setup, queue: formulas.Queue, world: int, shards: int
) -> tuple[int, int]:
    """Return the bytes of the queue, and of statistics beside it."""
    params, length = setup.shapes.parameters, setup.length
    if way.wrap != "ddp":
        beside = formulas.arriving(setup.shapes.units, shards) if way.clusters else 0
        return formulas.queue_sharded(params, shards, length, queue), beside
    if not way.sliced:
        return formulas.queue_whole(params, length, queue), 0
    divided = buckets(params)
    beside = formulas.clustered(divided, world) if way.clusters else 0
    return formulas.queue_sliced(divided, world, length, queue), beside


def _moved(way: Way, setup: Setup, queue: formulas.Queue, world: int, shards: int) -> float:
    """Return the bytes that the law reads and writes, the read for finiteness among them."""
    params, length = setup.shapes.parameters, setup.length
    mine, copied = 1.0, 0
    if way.sliced:
        mine = 1 / world
        for bucket in buckets(params):
            own = bucket[0].dtype
            sent = wire_type(queue, own) if way.clusters else own
            copied += formulas.padded(bucket, world, sent.itemsize, not way.clusters)

    def stepped(p: Parameter) -> float:
        return p.itemsize + formulas.law(length, stored_type(queue, p.dtype))

    def weighed(p: Parameter) -> float:
        ring = stored_type(queue, p.dtype)
        return p.itemsize + formulas.weighed(length, p.itemsize, ring)

    if way.law == "optimizer":
        return _over(params, shards, stepped)
    if not way.clusters:
        return mine * _over(params, shards, weighed) + copied
    divided = way.sliced or way.wrap != "ddp"

    def weighted(p: Parameter) -> float:
        ring = stored_type(queue, p.dtype)
        read = formulas.STATISTIC if divided else ring_bytes(length, ring)
        return formulas.combined(setup.clusters, p.itemsize, read)

    def queued(p: Parameter) -> float:
        ring = stored_type(queue, p.dtype)
        own = formulas.statistics(length, ring) if divided else 0
        return p.itemsize + formulas.pushed(length, p.itemsize, ring) + own

    return _over(params, 1, weighted) + mine * _over(params, shards, queued) + copied
