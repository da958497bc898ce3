"""The table of a plan, its rows as CSV, and what it recommends."""

import csv
import io
from collections.abc import Sequence

from gq_triton.plan.machine import Machine
from gq_triton.plan.ways import QUEUES, Cost, Setup, Way

__all__ = ["best", "queue_name", "recommendation", "rows", "table"]

_GIB = 2**30
_HEAD = ("way", "queue", "queue GiB", "all GiB", "sent GiB", "exposed ms", "step ms", "overhead")


def table(costs: Sequence[Cost], machine: Machine) -> str:
    """Return a table of the costs at one number of GPUs; what does not fit has a star."""
    lines = [_HEAD, *(_line(c, c.held > machine.capacity) for c in costs)]
    first = max(len(line[0]) for line in lines)
    text = [
        f"{line[0]:{first}}  {line[1]:>8}" + "".join(f"  {cell:>10}" for cell in line[2:])
        for line in lines
    ]
    if any(c.held > machine.capacity for c in costs):
        text.append(f"* does not fit into {machine.capacity / _GIB:.4g} GiB")
    return "\n".join(text)


def queue_name(c: Cost) -> str:
    """Return what the table calls the queue's type."""
    if c.queue_dtype is None:
        return "model's"
    return str(c.queue_dtype).removeprefix("torch.")


def _named(c: Cost) -> str:
    return "the model's type" if c.queue_dtype is None else queue_name(c)


def _line(c: Cost, too_large: bool) -> tuple[str, ...]:
    star = "*" if too_large else ""
    return (
        c.way.name, queue_name(c), f"{(c.queue + c.beside) / _GIB:.3g}",
        f"{star}{c.held / _GIB:.3g}", f"{c.sent / _GIB:.3g}",
        f"{1000 * c.exposed:.3g}", f"{1000 * c.step:.4g}", f"{100 * c.overhead:.2f} %",
    )  # fmt: skip


def rows(costs: Sequence[Cost]) -> str:
    """Return all figures as CSV: bytes, and seconds."""
    names = ["queue", "beside", "state", "moved", "sent", "sent_plain", "exposed", "exposed_plain",
             "step", "step_plain", "overhead"]  # fmt: skip
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["gpus", "way", "queue_dtype", *names])
    for c in costs:
        figures = [f"{getattr(c, name):.6g}" for name in names]
        writer.writerow([c.world, c.way.name, queue_name(c), *figures])
    return text.getvalue()


def best(costs: Sequence[Cost], machine: Machine) -> Cost | None:
    """Return the way with the shortest step of those that fit.

    A type of the queue is recommended only where none fits that rounds less.
    """
    fitting = [c for c in costs if c.held <= machine.capacity]
    return min(fitting, key=lambda c: (QUEUES.index(c.queue_dtype), c.step, c.held), default=None)


def recommendation(costs: Sequence[Cost], setup: Setup, machine: Machine) -> str:
    """Return what to use at one number of GPUs, in a sentence and the lines of code."""
    chosen = best(costs, machine)
    if chosen is None:
        least = min(costs, key=lambda c: c.held)
        return (
            f"Nothing fits: {least.way.name}, queue in {_named(least)}, takes the least, "
            f"{least.held / _GIB:.3g} GiB of the {machine.capacity / _GIB:.4g} that --capacity "
            "gives; use more GPUs or a shorter queue"
        )
    sentence = (
        f"Recommended: {chosen.way.name}, queue in {_named(chosen)}: a step of "
        f"{1000 * chosen.step:.4g} ms, {100 * chosen.overhead:.2f} % more for the law, and "
        f"{chosen.held / _GIB:.3g} GiB"
    )
    nodes = -(-chosen.world // machine.per_node)
    here = min(chosen.world, machine.per_node)
    start = "--standalone" if nodes == 1 else f"--nnodes={nodes} --rdzv-endpoint=HOST:29500"
    lines = [
        f"torchrun {start} --nproc-per-node={here} train.py",
        *_code(chosen.way, chosen, setup),
    ]
    return "\n".join([sentence, *(f"    {line}" for line in lines)])


def _code(way: Way, chosen: Cost, setup: Setup) -> list[str]:
    options = [f"queue_length={setup.length}"]
    if chosen.queue_dtype is not None:
        quoted = isinstance(chosen.queue_dtype, str)
        options.append(
            f'queue_dtype="{chosen.queue_dtype}"' if quoted else f"queue_dtype={chosen.queue_dtype}"
        )
    if way.clusters:
        options = [f"n_clusters={setup.clusters}", 'features="LAYER"', *options]
    if way.sliced:
        options.append("shard_queue=True")
    given = ", ".join(options)
    wrapped = "ddp = DistributedDataParallel(model)"
    if way.wrap == "fsdp2":
        wrapped = "for module in (*blocks, model): fully_shard(module, mesh=mesh)  # mesh: (ranks,)"
    elif way.wrap == "hsdp":
        wrapped = (
            "for module in (*blocks, model): fully_shard(module, mesh=mesh)  # mesh: (nodes, GPUs)"
        )
    law = f"state = register(ddp, {given})  # from gq_triton.dist"
    if way.law == "optimizer":
        name, moments = {"adamw": ("GQAdamW", ""), "sgd": ("GQSGD", "momentum=0.9, ")}[
            setup.optimizer
        ]
        law = f"optimizer = {name}(model.parameters(), lr=LR, {moments}{given})"
    elif way.law == "plug-in":
        law = f"GradQueue(model, {given}).attach(optimizer)"
    return [wrapped, law]
