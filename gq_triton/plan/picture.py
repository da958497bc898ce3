"""The picture of a plan: memory, exposed communication and overhead against the number of GPUs."""

from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

from gq_triton.plan.machine import Machine
from gq_triton.plan.report import queue_name
from gq_triton.plan.ways import Cost

__all__ = ["draw"]

# Okabe and Ito's palette, whose colours stay distinct with every common form of colour blindness.
_COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"
_MARKERS = "osD^vP*"
_GRAY = "#8A8A8A"


def draw(title: str, costs: Sequence[Cost], machine: Machine) -> bytes:
    """Return a picture as PNG, of queues in the parameters' type.

    Dotted curves show the memory with the type of the queue that takes the least.

    Args:
        title: its title.
        costs: the costs of every way at every number of GPUs.
        machine: whose capacity the first panel shows.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.4), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=12)
    memory, waits, overhead = figure.subplots(1, 3)
    wide = [c for c in costs if c.queue_dtype is None]
    small = [c for c in costs if c.queue_dtype == costs[-1].queue_dtype is not None]
    _curves(memory, wide, lambda c: c.held / 2**30)
    if small:
        _curves(memory, small, lambda c: c.held / 2**30, dotted=True)
    memory.axhline(machine.capacity / 2**30, color=_GRAY, linestyle="--")
    end = max(c.world for c in wide), machine.capacity / 2**30
    memory.annotate("capacity", end, color=_GRAY, ha="right", va="bottom", fontsize=9)
    memory.set(title="Memory per GPU, without activations", ylabel="GiB", yscale="log")
    _curves(waits, wide, lambda c: 1000 * c.exposed)
    waits.set(title="Communication that nothing hides", ylabel="ms per step")
    _curves(overhead, wide, lambda c: 100 * c.overhead)
    overhead.set(title="What the law adds to the step", ylabel="% of the step without it")
    for panel in (memory, waits, overhead):
        _finish(panel, sorted({c.world for c in wide}))
    handles, labels = memory.get_legend_handles_labels()
    said = "queue in the model's type" + (f"; dotted: {queue_name(small[0])}" if small else "")
    figure.legend(handles, labels, title=said, loc="outside lower center", ncols=4, frameon=False)
    content = BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


def _curves(
    panel: Any, costs: Sequence[Cost], value: Callable[[Cost], float], dotted: bool = False
) -> None:
    for number, name in enumerate(dict.fromkeys(c.way.name for c in costs)):
        mine = [c for c in costs if c.way.name == name]
        line = "--" if mine[0].way.law == "plug-in" else "-"  # often on the optimizer's curve
        panel.plot(
            [c.world for c in mine],
            [value(c) for c in mine],
            label=None if dotted else name,
            color=_COLOURS[number],
            marker=None if dotted else _MARKERS[number],
            markersize=5,
            linestyle=":" if dotted else line,
            alpha=0.85,
        )


def _finish(panel: Any, worlds: Sequence[int]) -> None:
    from matplotlib.ticker import NullFormatter, NullLocator, StrMethodFormatter

    panel.set_xscale("log", base=2)
    shown = worlds[:: max(1, -(-len(worlds) // 8))]
    panel.set_xticks(shown, [str(world) for world in shown], fontsize=9)
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xlabel("GPUs")
    if panel.get_yscale() == "log":
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.yaxis.set_minor_formatter(NullFormatter())
    else:
        panel.set_ylim(bottom=0)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
