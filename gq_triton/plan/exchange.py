"""What the ranks send in a step, unit by unit, and how much of it no computing hides."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gq_triton.float8 import wire_type
from gq_triton.plan import formulas
from gq_triton.plan.machine import Machine, Message
from gq_triton.plan.shapes import Parameter, Shapes, buckets

__all__ = ["Exchange", "Stage", "ddp", "exposed", "fsdp"]


@dataclass
class Stage:
    """A bucket of DDP or a unit of FSDP2, in one pass.

    Attributes:
        elements: its parameters' elements, after which its share of the computing is estimated.
        before: what must have arrived before it is computed.
        after: what is sent when it has been computed.
    """

    elements: int
    before: list[Message] = field(default_factory=list)
    after: list[Message] = field(default_factory=list)


@dataclass
class Exchange:
    """What is sent in a step.

    Attributes:
        forward: stages of the forward pass.
        backward: stages of the backward pass.
        end: what is sent when the backward pass is over, which nothing hides.
        later: what is sent while the next forward pass runs.
    """

    forward: list[Stage]
    backward: list[Stage]
    end: list[Message] = field(default_factory=list)
    later: list[Message] = field(default_factory=list)

    @property
    def sent(self) -> float:
        """The bytes that a rank sends."""
        stages = (*self.forward, *self.backward)
        inside = [m for stage in stages for m in (*stage.before, *stage.after)]
        return sum(m.sent for m in (*inside, *self.end, *self.later))


def ddp(
    shapes: Shapes,
    world: int,
    *,
    queue: formulas.Queue = None,
    clusters: bool = False,
    sliced: bool = False,
) -> Exchange:
    """Return what DDP sends, with the hook or, without clusters and slices, as plain DDP does.

    Args:
        shapes: the model's.
        world: W.
        queue: the queue's type.
        clusters: whether each rank clusters its samples.
        sliced: whether the queue is in slices.
    """
    found = Exchange([Stage(shapes.numel)], [])
    for bucket in buckets(shapes.parameters):
        elements = sum(p.numel for p in bucket)
        padded = -(-elements // world) * world
        size = bucket[0].itemsize
        raw = wire_type(queue, bucket[0].dtype).itemsize
        sent = [Message(size * elements, 2, world)]
        cut = Message(formulas.votes(bucket, world), 2, world)
        if clusters:
            sent.append(Message(formulas.masses(bucket), 2, world))
        if clusters and sliced:
            sent += [Message(raw * padded, 1, world), cut]
            found.later += [Message(formulas.STATISTIC / 2 * padded, 1, world)] * 2
        elif clusters:
            sent.append(Message(raw * elements, 2, world))
        elif sliced:
            sent = [Message(size * padded, 1, world), cut, Message(size * padded, 1, world)]
        if clusters and not found.backward:
            sent.insert(0, Message(16, 2, world))
        found.backward.append(Stage(elements, after=[m for m in sent if m.nbytes]))
    return found


def fsdp(
    shapes: Shapes,
    shards: int,
    copies: int = 1,
    *,
    queue: formulas.Queue = None,
    clusters: bool = False,
    end: Sequence[int] = (),
    everywhere: Sequence[int] = (),
) -> Exchange:
    """Return what FSDP2 sends, or HSDP with several copies of the shards.

    Args:
        shapes: the model's.
        shards: ranks that divide a parameter.
        copies: ranks that have the same shard.
        queue: the queue's type.
        clusters: whether each rank clusters its samples.
        end: payloads that are added up over the shards after the backward pass.
        everywhere: payloads that are added up over all ranks then.
    """

    def padded(unit: Sequence[Parameter], size: Callable[[Parameter], int]) -> int:
        """Return the bytes of a unit's shards, each as large as the largest."""
        return shards * sum(p.shard(shards) * size(p) for p in unit)

    def divided(nbytes: int) -> list[Message]:
        scattered = [Message(nbytes, 1, shards)]
        whole = [Message(nbytes / shards, 2, copies, among=shards)] if copies > 1 else []
        return scattered + whole

    found = Exchange([], [])
    for number, unit in enumerate(shapes.units):
        elements = sum(p.numel for p in unit)
        whole = padded(unit, lambda p: p.itemsize)
        parameters = Message(whole, 1, shards)
        found.forward.append(Stage(elements, before=[parameters]))
        # The model itself stays whole after its forward pass.
        stage = Stage(elements, before=[parameters] if number else [], after=divided(whole))
        if clusters:
            stage.before.append(Message(padded(unit, lambda _: formulas.STATISTIC), 1, shards))
            stage.after += divided(padded(unit, lambda p: wire_type(queue, p.dtype).itemsize))
        found.backward.insert(0, stage)
    found.end = [Message(nbytes, 2, shards) for nbytes in (*end, *everywhere)]
    if copies > 1:
        found.end += [Message(nbytes, 2, copies, among=shards) for nbytes in everywhere]
    return found


def exposed(exchange: Exchange, machine: Machine) -> float:
    """Return the seconds by which communication makes a step longer."""

    def all_of(messages: Sequence[Message]) -> float:
        return sum(message.seconds(machine) for message in messages)

    waited = all_of(exchange.end) + max(0.0, all_of(exchange.later) - machine.forward)
    for stages, seconds in (
        (exchange.forward, machine.forward),
        (exchange.backward, machine.backward),
    ):
        before = [all_of(stage.before) for stage in stages]
        after = [all_of(stage.after) for stage in stages]
        whole = sum(stage.elements for stage in stages)
        shares = [seconds * stage.elements / whole for stage in stages]
        waited += _end(shares, before, after) - seconds
    return waited


def _end(computed: Sequence[float], before: Sequence[float], after: Sequence[float]) -> float:
    """Return when the last of some stages is over, computed and sent.

    One link sends one message at a time; what a stage needs is fetched while the stage before it is
    computed.
    """
    link = arrived = before[0]
    done = 0.0
    for number, seconds in enumerate(computed):
        start = max(done, arrived)
        if number + 1 < len(computed):
            link = max(link, start) + before[number + 1]
            arrived = link
        done = start + seconds
        link = max(link, done) + after[number] if after[number] else link
    return max(done, link)
