"""The roofline of the optimizer steps: operations per second by operations per byte."""

import io
from collections.abc import Sequence
from typing import Any

from gq_triton.bench.optimizer import COPY, OPERATIONS_PER_BYTE, PRODUCT, RATE
from gq_triton.bench.run import Line

__all__ = ["roofline"]

# Okabe and Ito's palette, whose colours stay distinct with every common form of colour blindness.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000",
            "#7F4F24")  # fmt: skip
_MARKERS = "osD^vP*X"


def roofline(title: str, lines: Sequence[Line]) -> bytes | None:
    """Return the picture as PNG with a palette, or None where no step has counted operations.

    Args:
        title: its title.
        lines: those of the theme ``optimizer``.
    """
    roofs = {line.step: float(line.median) for line in lines if line.step in (COPY, PRODUCT)}
    points = [line for line in lines if OPERATIONS_PER_BYTE in line.more]
    if not points or len(roofs) < 2:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.6), dpi=100, layout="constrained")
    panel = figure.subplots()
    copy, peak = roofs[COPY], roofs[PRODUCT]  # GB/s and GFLOP/s
    least, most = 0.1, 2 * peak / copy
    panel.plot([least, peak / copy, most], [least * copy, peak, peak], color="#8A8A8A")
    panel.annotate(f"copy, {copy:.3g} GB/s", (least, least * copy), color="#5A5A5A", rotation=0,
                   xytext=(14, -3), textcoords="offset points", fontsize=9)  # fmt: skip
    panel.annotate(f"float32 product, {peak:.3g} GFLOP/s", (most, peak), color="#5A5A5A",
                   ha="right", xytext=(0, 6), textcoords="offset points", fontsize=9)  # fmt: skip
    models = list(dict.fromkeys(line.case.rpartition(",")[0] for line in points))
    steps = list(dict.fromkeys(line.step for line in points))
    for line in points:
        at = float(line.more[OPERATIONS_PER_BYTE])
        colour = _COLOURS[steps.index(line.step) % len(_COLOURS)]
        marker = _MARKERS[models.index(line.case.rpartition(",")[0]) % len(_MARKERS)]
        panel.plot(at, at * float(line.more[RATE]), marker, color=colour, markersize=7, alpha=0.8)
    for number, name in enumerate(steps):
        panel.plot([], [], "o", color=_COLOURS[number % len(_COLOURS)], label=name)
    for number, name in enumerate(models):
        panel.plot([], [], _MARKERS[number], color="#5A5A5A", markerfacecolor="none", label=name)
    panel.set(xscale="log", yscale="log", xlabel="operations per byte that the update must move",
              ylabel="GFLOP/s")  # fmt: skip
    panel.set_title(title, fontsize=9)
    panel.grid(alpha=0.25, which="both")
    panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return _with_palette(figure)


def _with_palette(figure: Any) -> bytes:
    """Return a figure as PNG with 64 colours, a third of the bytes of one with all."""
    from PIL import Image

    drawn, content = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    # The usual method merges the few points of one colour with those of another.
    covering = Image.Quantize.MAXCOVERAGE
    few = Image.open(drawn).convert("RGB").quantize(64, method=covering)
    few.save(content, format="png", optimize=True)
    return content.getvalue()
