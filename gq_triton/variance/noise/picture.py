"""The picture of a meter: noise scale against steps, by parameter, and what it predicts."""

import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import torch

from gq_triton.variance.noise.predict import WITHIN, steps_ratio
from gq_triton.variance.noise.report import NoiseReport
from gq_triton.variance.noise.window import Estimate, ratio

__all__ = ["draw"]

_BLUE, _ORANGE, _GRAY = "#0072B2", "#D55E00", "#8A8A8A"
# Points of the curve, each of as many measurements, and rows of the panel of parameters.
_POINTS, _ROWS = 12, 24


def draw(title: str, history: Sequence[Mapping[str, float]], report: NoiseReport) -> bytes:
    """Return a picture as PNG.

    Args:
        title: its title.
        history: the meter's rows.
        report: its report.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.2), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=12)
    curve, layers, steps = figure.subplots(1, 3)
    _draw_curve(curve, history, report)
    _draw_layers(layers, report)
    _draw_prediction(steps, report)
    content = BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


def _draw_curve(panel: Any, history: Sequence[Mapping[str, float]], report: NoiseReport) -> None:
    pooled: list[tuple[float, Estimate]] = []
    size = max(1, len(history) // _POINTS)
    for start in range(0, len(history) - size + 1, size):
        rows = history[start : start + size]
        top, bottom = (
            torch.tensor([row[name] for row in rows], dtype=torch.float64)
            for name in ("variance", "signal")
        )
        pooled.append((sum(row["step"] for row in rows) / len(rows), ratio(top, bottom)))
    seen = [(at, found) for at, found in pooled if 0 < found.value < math.inf]
    at = [step for step, _ in seen]
    panel.plot(at, [f.value for _, f in seen], color=_BLUE, label="noise scale")
    for step, found in seen:
        bounded = found.low > 0 and found.high < math.inf
        panel.plot([step], [found.value], "o", color=_BLUE, mfc=_BLUE if bounded else "white")
        if bounded:
            panel.plot([step, step], [found.low, found.high], color=_BLUE, alpha=0.5)
    if any(found.high == math.inf for _, found in seen):
        panel.plot([], [], "o", color=_BLUE, mfc="white", label="of which no bound is known")
    panel.axhline(report.batch_size, color=_GRAY, linestyle="--", label="batch size")
    panel.set(
        title=f"Noise scale, {size} measurements a point", xlabel="forward pass", ylabel="samples"
    )
    panel.set_yscale("log")
    _plain(panel.yaxis)
    panel.legend()


def _draw_layers(panel: Any, report: NoiseReport) -> None:
    known = [(n, f.noise_scale) for n, f in report.layers.items() if 0 < f.noise_scale.value < 1e12]
    shown = known[:_ROWS]
    for row, (_, found) in enumerate(shown):
        panel.plot([found.value], [row], "o", color=_BLUE)
        if found.low > 0 and found.high < math.inf:
            panel.plot([found.low, found.high], [row, row], color=_BLUE, alpha=0.5)
    if report.total.noise_scale.value < math.inf:
        panel.axvline(report.total.noise_scale.value, color=_GRAY, linestyle="--")
    left = f" (first {_ROWS} of {len(known)})" if len(known) > _ROWS else ""
    panel.set(title=f"By parameter, dashed: all{left}", xlabel="samples", xscale="log")
    panel.set_yticks(range(len(shown)), [name for name, _ in shown], fontsize=8)
    panel.invert_yaxis()
    _plain(panel.xaxis)


def _draw_prediction(panel: Any, report: NoiseReport) -> None:
    critical, old = report.critical_batch, report.batch_size
    panel.set(title="Predicted steps to the same loss", xlabel="batch size",
              ylabel="steps, those of the present batch = 1")  # fmt: skip
    if not (0 < critical.value < math.inf):
        panel.text(0.5, 0.5, "no signal was seen", ha="center", transform=panel.transAxes)
        return
    sizes = [old * 2 ** (n / 4) for n in range(-8, 25)]
    curves = [[steps_ratio(batch, old, new) for new in sizes] for batch in critical]
    panel.fill_between(sizes, curves[1], curves[2], color=_ORANGE, alpha=0.2,
                       label=f"critical batch up to {WITHIN:g} times off")  # fmt: skip
    panel.plot(sizes, curves[0], color=_ORANGE, label="predicted")
    panel.plot(sizes, [old / new for new in sizes], ":", color=_GRAY, label="each sample as useful")
    panel.axvline(old, color=_GRAY, linestyle="--", label="present batch")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    _plain(panel.xaxis)
    _plain(panel.yaxis)
    panel.legend(fontsize=8)


def _plain(axis: Any) -> None:
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    low, high = sorted(axis.get_view_interval())
    few = low > 0 and high < 10 * low
    axis.set_minor_formatter(StrMethodFormatter("{x:g}") if few else NullFormatter())
