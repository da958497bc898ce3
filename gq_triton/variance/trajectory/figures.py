"""The pictures of trajectories, as PNG."""

import math
from collections.abc import Sequence
from typing import Any

from gq_triton.study.report.canvas import COLOURS, LINES, MARKERS, figure, finish, png
from gq_triton.variance.trajectory.plan import GRID
from gq_triton.variance.trajectory.results import Group
from gq_triton.variance.trajectory.train import ESTIMATORS

__all__ = ["curves", "overparametrisation"]

_TITLES = {"average": "Average variance", "normalised": "Normalised variance"}
_UNITS = {"average": "variance per parameter", "normalised": "V / E[g²], at most 1"}


def curves(group: Group) -> bytes:
    """Draw variance and normalised variance against steps: the mean over seeds, and their range."""
    drawn = figure(11.5, 4.6)
    seeds = len(group.records)
    drawn.suptitle(f"{group.name}, {seeds} seed{'s' * (seeds > 1)}", x=0.01, ha="left")
    panels = drawn.subplots(1, 2)
    for panel, (measure, title) in zip(panels, _TITLES.items(), strict=True):
        for number, name in enumerate(ESTIMATORS):
            _draw_curve(panel, group.curve(name, measure), name, number)
        panel.set(title=title, xlabel="step", ylabel=_UNITS[measure])
        if measure == "average":
            _log(panel)
        else:
            panel.set_ylim(0, 1.05)
        finish(panel)
    handles, labels = panels[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside right upper", frameon=False)
    return png(drawn)


def _draw_curve(
    panel: Any, curve: Sequence[tuple[int, list[float]]], name: str, number: int
) -> None:
    # A logarithmic axis has no place for 0, which SVRG reaches at its anchor.
    points = [(step, values) for step, values in curve if min(values) > 0]
    steps = [step for step, _ in points]
    means = [math.fsum(values) / len(values) for _, values in points]
    panel.plot(steps, means, label=name, **_style(number), markersize=3.5,
               markevery=max(1, len(steps) // 12))  # fmt: skip
    if any(len(values) > 1 for _, values in points):
        panel.fill_between(steps, [min(v) for _, v in points], [max(v) for _, v in points],
                           color=COLOURS[number], alpha=0.15, linewidth=0)  # fmt: skip


def overparametrisation(groups: Sequence[Group]) -> bytes:
    """Draw the last part's variance against the student's features per sample.

    The groups that differ in nothing else share a panel.
    """
    panels: dict[tuple[Any, ...], list[Group]] = {}
    for group in groups:
        plan = group.trajectories[0].plan
        other = tuple(getattr(plan, name)[0] for name in GRID if name != "ratios")
        panels.setdefault(other, []).append(group)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    drawn = figure(1.8 + 3.9 * columns, 0.8 + 3.4 * rows)
    drawn.suptitle("Variance in the last 70 % of the steps, mean over seeds", x=0.01, ha="left")
    every = drawn.subplots(rows, columns, squeeze=False, sharey=True).flat
    for panel, own in zip(every, panels.values(), strict=False):
        own = sorted(own, key=lambda group: group.trajectories[0].plan.ratios[0])
        for number, name in enumerate(ESTIMATORS):
            points = [(g.trajectories[0].plan.ratios[0], g.last(name, "average")) for g in own]
            points = [(x, v) for x, v in points if v and min(v) > 0]
            panel.plot([x for x, _ in points], [math.fsum(v) / len(v) for _, v in points],
                       label=name, **_style(number), markersize=5)  # fmt: skip
            for x, values in points:
                panel.plot([x, x], [min(values), max(values)], color=COLOURS[number], alpha=0.5)
        title = ", ".join(p for p in own[0].name.split(", ") if not p.startswith("hs/N"))
        panel.set_title(title, fontsize=10, loc="left")
        _log(panel)
        finish(panel)
    for panel in list(drawn.axes)[len(panels) :]:
        panel.set_visible(False)
    drawn.supxlabel("features of the student per training sample, hs/N", fontsize=10)
    drawn.supylabel("variance per parameter", fontsize=10)
    handles, labels = drawn.axes[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside right upper", frameon=False)
    return png(drawn)


def _style(number: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number],
        "marker": MARKERS[number],
        "linestyle": LINES[number % len(LINES)],
        "linewidth": 1.5,
    }


def _log(panel: Any) -> None:
    """Make the axis of values logarithmic, with a label at more than powers of ten if it is short.

    A panel without a positive value keeps its linear axis.
    """
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    values = [y for line in panel.lines for y in line.get_ydata() if 0 < y < math.inf]
    if not values:
        return
    panel.set_yscale("log")
    if max(values) < 300 * min(values):
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:.1g}"))
        panel.yaxis.set_minor_formatter(NullFormatter())
