"""The speeds of a machine: given, or measured on the spot."""

import functools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

__all__ = ["Machine", "Measured", "Message", "calibrate"]

_COPIED, _SENT, _TURNS = 2**28, 2**25, 7


@dataclass(frozen=True)
class Machine:
    """Speeds in bytes per second, and seconds.

    Attributes:
        memory: bytes that a copy on one GPU reads and writes.
        link: the bus bandwidth of an all-reduce among the GPUs of a node, as nccl-tests prints it.
        network: the same among the GPUs of several nodes.
        latency: of one message between two GPUs.
        per_node: GPUs of a node.
        compute: forward and backward pass of one step on one GPU, without communication.
        capacity: bytes on a GPU for parameters, gradients, optimizer state and queue.
    """

    memory: float
    link: float
    network: float
    latency: float
    per_node: int
    compute: float
    capacity: float

    @property
    def forward(self) -> float:
        """The forward pass, a third of the two."""
        return self.compute / 3

    @property
    def backward(self) -> float:
        """The backward pass, two thirds of the two."""
        return self.compute - self.forward


class Message(NamedTuple):
    """A collective.

    Attributes:
        nbytes: bytes of the whole payload.
        trips: 1 for a reduce-scatter or an all-gather, 2 for an all-reduce.
        ranks: number of ranks.
        among: how many groups of the same kind share a node's network at the same time.
    """

    nbytes: float
    trips: int
    ranks: int
    among: int = 1

    @property
    def sent(self) -> float:
        """The bytes that a rank sends on a ring."""
        return self.trips * (self.ranks - 1) / self.ranks * self.nbytes

    def seconds(self, machine: Machine) -> float:
        """Return how long it takes: a ring's bytes, and as many latencies as a tree has levels."""
        if self.ranks == 1:
            return 0.0
        inside = self.among == 1 and self.ranks <= machine.per_node
        speed = machine.link if inside else machine.network / self.among
        return self.sent / speed + self.trips * math.ceil(math.log2(self.ranks)) * machine.latency


class Measured(NamedTuple):
    """What a calibration found: bytes per second, and seconds; NaN where one device is alone."""

    device: str
    memory: float
    link: float
    latency: float


def calibrate(ranks: int, cuda: bool) -> Measured:
    """Measure copy, all-reduce and latency on ranks of this machine, all at the same time.

    Args:
        ranks: their number; with GPUs one rank has one GPU.
        cuda: whether to measure GPUs.
    """
    # Ranks are processes of their own. Those of the tests' tools do, and hand back a file's bytes.
    import tempfile
    from pathlib import Path

    from gq_triton.testing import spawn

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "measured")
        spawn(ranks, _measure, str(file), cuda)
        memory, link, latency = map(float, file.read_text().split())
    name = f"{ranks} x {torch.cuda.get_device_name()}" if cuda else f"CPU, {ranks} ranks"
    return Measured(name, memory, link, latency)


def _measure(rank: int, file: str, cuda: bool) -> None:
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    group = dist.new_group(backend="nccl") if cuda else None
    source = torch.ones(_COPIED // 4, device=device)
    target = torch.empty_like(source)
    # The slowest rank's time of a turn counts, as in a step.
    copied = _seconds(functools.partial(target.copy_, source), device)
    found = [2 * source.nbytes / copied, math.nan, math.nan]
    if (world := dist.get_world_size()) > 1:
        many, one = source[: _SENT // 4], torch.ones(1, device=device)
        sent = _seconds(lambda: dist.all_reduce(many, group=group), device)
        tiny = _seconds(lambda: dist.all_reduce(one, group=group), device)
        trips = 2 * math.ceil(math.log2(world))
        found[1:] = [Message(many.nbytes, 2, world).sent / max(sent - tiny, 1e-9), tiny / trips]
    if rank == 0:
        with open(file, "w", encoding="utf-8") as written:
            written.write(" ".join(map(str, found)))


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the median over turns of the slowest rank's seconds; every rank must call."""
    taken = torch.zeros(_TURNS + 1, dtype=torch.float64)
    for turn in range(_TURNS + 1):
        dist.barrier()
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken[turn] = time.perf_counter() - start
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return statistics.median(taken[1:].tolist())
