"""The ways to use the package with a model on W ranks, and what each costs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gq_triton.plan import formulas
from gq_triton.plan.exchange import ddp, exposed, fsdp
from gq_triton.plan.machine import Machine
from gq_triton.plan.shapes import Parameter, Shapes, buckets

__all__ = ["WAYS", "Cost", "Setup", "Way", "cost"]


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


@dataclass(frozen=True)
class Cost:
    """What a way costs on one GPU, in bytes and seconds.

    Attributes:
        way: the way.
        narrow: whether the queue is bfloat16; False says that it has the parameters' type.
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
    narrow: bool
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


def cost(way: Way, setup: Setup, machine: Machine, world: int, narrow: bool) -> Cost | None:
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
    q = 2 if narrow else None
    shards = {"ddp": 1, "fsdp2": world, "hsdp": machine.per_node}[way.wrap]
    if way.wrap == "ddp":
        plain, ours = (ddp(shapes, world), ddp(shapes, world, q=q, sliced=way.sliced,
                                               clusters=way.clusters))  # fmt: skip
    else:
        number = len(shapes.parameters)
        copies = world // shards
        plain = fsdp(shapes, shards, copies)
        # A vote on every parameter; the plug-in adds up its figures too.
        figures = [formulas.FIGURES * number]
        end = [number, *(figures if way.law == "plug-in" and not way.clusters else [])]
        everywhere = [*figures, formulas.SHARES] if way.clusters else []
        ours = fsdp(shapes, shards, copies, q=q, clusters=way.clusters, end=end,
                    everywhere=everywhere)  # fmt: skip
    moved = _moved(way, setup, q, world, shards)
    each = 2 + formulas.moments(setup.optimizer)
    stepped = _over(shapes.parameters, shards,
                    lambda g: formulas.optimizer(setup.optimizer, g))  # fmt: skip
    waits = [exposed(exchange, machine) for exchange in (ours, plain)]
    common = machine.compute + stepped / machine.memory
    queue, beside = _held(way, setup, q, world, shards)
    return Cost(
        way,
        narrow,
        world,
        queue,
        beside,
        state=_over(shapes.parameters, shards, lambda g: each * g),
        moved=moved,
        sent=ours.sent,
        sent_plain=plain.sent,
        exposed=waits[0],
        exposed_plain=waits[1],
        step=common + waits[0] + moved / machine.memory,
        step_plain=common + waits[1],
    )


def _over(params: Sequence[Parameter], shards: int, each: Callable[[int], float]) -> float:
    """Return the sum of bytes per element over the largest shards, by the bytes of an element."""
    return sum(p.shard(shards) * each(p.itemsize) for p in params)


def _held(way: Way, setup: Setup, q: int | None, world: int, shards: int) -> tuple[int, int]:
    """Return the bytes of the queue, and of statistics beside it."""
    params, length = setup.shapes.parameters, setup.length
    if way.wrap != "ddp":
        beside = formulas.arriving(setup.shapes.units, shards) if way.clusters else 0
        return formulas.queue_sharded(params, shards, length, q), beside
    if not way.sliced:
        return formulas.queue_whole(params, length, q), 0
    divided = buckets(params)
    beside = formulas.clustered(divided, world) if way.clusters else 0
    return formulas.queue_sliced(divided, world, length, q), beside


def _moved(way: Way, setup: Setup, q: int | None, world: int, shards: int) -> float:
    """Return the bytes that the law reads and writes, the read for finiteness among them."""
    params, length = setup.shapes.parameters, setup.length
    mine = 1 / world if way.sliced else 1.0
    if way.law == "optimizer":
        return _over(params, shards, lambda g: g + formulas.law(length, q or g))
    if not way.clusters:
        return mine * _over(params, shards, lambda g: g + formulas.weighed(length, g, q or g))
    divided = way.sliced or way.wrap != "ddp"

    def weighted(g: int) -> float:
        read = formulas.STATISTIC if divided else length * (q or g)
        return formulas.combined(setup.clusters, g, read)

    def queued(g: int) -> float:
        own = formulas.statistics(length, q or g) if divided else 0
        return g + formulas.pushed(g, q or g) + own

    return _over(params, 1, weighted) + mine * _over(params, shards, queued)
