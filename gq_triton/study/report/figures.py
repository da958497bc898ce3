"""The pictures of a report, as PNG."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gq_triton.study.report.canvas import COLOURS, LINES, MARKERS, finish, png
from gq_triton.study.report.canvas import figure as new_figure
from gq_triton.study.report.results import Group
from gq_triton.study.report.statistics import Comparison, interval, median_interval
from gq_triton.study.report.verdict import Finding

__all__ = ["forest", "scores", "steps_to_target", "weights"]

_GRAY = "#8A8A8A"
# More than _FEW arms get a panel each, in which the other arms are gray lines.
_FEW, _COLUMNS = 7, 4
_OTHERS: dict[str, Any] = {"color": "#BDBDBD", "linewidth": 0.8, "zorder": 0}


def _style(group: Group) -> dict[str, Any]:
    """Return the style of an arm, which is the same in all pictures of a study."""
    number = group.cell.config.arms.index(group.cell.arm.name)
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": LINES[number // len(COLOURS) % len(LINES)],
        "linewidth": 1.6,
        "markersize": 6,
    }


def _arms(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """Return the groups of each arm in the order of batch sizes, without controls."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        if not group.control:
            found.setdefault(group.cell.arm.name, []).append(group)
    return {name: sorted(some, key=lambda g: g.cell.batch_size) for name, some in found.items()}


def _batch_axis(panel: Any, groups: Sequence[Group], labelled: bool) -> None:
    from matplotlib.ticker import NullFormatter, NullLocator

    sizes = sorted({group.cell.batch_size for group in groups})
    panel.set_xscale("log", base=2)
    panel.set_xticks(sizes, [str(size) for size in sizes])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_xlim(sizes[0] / 1.5, sizes[-1] * 1.5)
    if labelled:
        panel.set_xlabel("batch size (samples per step)")


def _legend(figure: Any, panels: Mapping[str | None, Any]) -> None:
    """Add a legend, unless every arm has a panel whose title names it."""
    if None in panels and panels[None].get_legend_handles_labels()[0]:
        figure.legend(loc="outside right upper", frameon=False, fontsize=9)


def _canvas(arms: Mapping[str, Any], heading: str, unit: str) -> tuple[Any, dict[str | None, Any]]:
    """Return a figure and its panels by arm; few arms share one panel, whose key is None."""
    if len(arms) <= _FEW:
        figure = new_figure(8.6, 4.6)
        panel = figure.subplots()
        panel.set_ylabel(unit)
        panel.set_title(heading, loc="left")
        return figure, {None: panel}
    rows = -(-len(arms) // _COLUMNS)
    figure = new_figure(10.6, 1.2 + 2.0 * rows)
    panels = list(figure.subplots(rows, _COLUMNS, sharex=True, sharey=True).flat)
    for panel in panels[len(arms) :]:
        panel.set_visible(False)
    for panel in panels[len(arms) - _COLUMNS : len(arms)]:
        panel.tick_params(labelbottom=True)
    figure.suptitle(f"{heading}; gray: the others", x=0.01, ha="left")
    figure.supylabel(unit, fontsize=10)
    figure.supxlabel("batch size (samples per step)", fontsize=10)
    found: dict[str | None, Any] = dict(zip(arms, panels, strict=False))
    for name, panel in found.items():
        panel.set_title(name, fontsize=9, loc="left")
    return figure, found


def _shift(size: int, number: int, arms: int) -> float:
    """Return the place of an arm along the axis, next to those of the other arms."""
    return size * 2 ** (0.35 * ((number + 0.5) / arms - 0.5))


def _places(some: Sequence[Group], number: int, arms: int, alone: bool) -> list[float]:
    """Return the places of an arm's points along the axis; an arm with a panel is not moved."""
    number, arms = (0, 1) if alone else (number, arms)
    return [_shift(g.cell.batch_size, number, arms) for g in some]


def steps_to_target(groups: Sequence[Group], task: str, target: float) -> bytes:
    """Draw the median steps to the target against the batch size, with perfect scaling."""
    arms = _arms(groups)
    values = [s for some in arms.values() for g in some for s in g.steps if math.isfinite(s)]
    top = 2 * max(values, default=1)
    unit = f"steps to validation {groups[0].cell.entry.shown} {target:g}"
    heading = f"{task}: steps to target (median, 95 % interval over seeds)"
    if len(arms) > _FEW:  # there is no legend
        heading += "; dashes: perfect scaling"
    figure, panels = _canvas(arms, heading, unit)
    for place, panel in panels.items():
        for number, (name, some) in enumerate(arms.items()):
            xs = _places(some, number, len(arms), place is not None)
            if place in (None, name):
                _draw_steps(panel, some, xs, top)
            else:
                shown = [_finite(median_interval(g.steps)[0]) for g in some]
                panel.plot(xs, shown, **_OTHERS)
        if values:
            _step_axis(panel, groups, arms, top, place)
        else:
            panel.clear()
            panel.set_yticks([])
            panel.set_title(heading if place is None else place, loc="left",
                            fontsize=12 if place is None else 9)  # fmt: skip
            _batch_axis(panel, groups, labelled=place is None)
            panel.text(0.5, 0.5, f"no run has reached {target:g}", ha="center", va="center",
                       transform=panel.transAxes)  # fmt: skip
        finish(panel)
    _legend(figure, panels)
    return png(figure)


def _draw_steps(panel: Any, some: Sequence[Group], xs: Sequence[float], top: float) -> None:
    """Draw an arm; an open marker at the top means that most seeds missed the target."""
    style, points = _style(some[0]), [median_interval(g.steps) for g in some]
    shown = [_finite(median) for median, _, _ in points]
    panel.plot(xs, shown, label=some[0].label, **style)
    for x, (median, low, high) in zip(xs, points, strict=True):
        panel.plot([x, x], [min(low, top), min(high, top)], color=style["color"], alpha=0.6)
        if median == math.inf:
            panel.plot([x], [top], marker=style["marker"], color=style["color"],
                       markerfacecolor="white", markersize=9)  # fmt: skip


def _step_axis(
    panel: Any, groups: Sequence[Group], arms: dict[str, list[Group]], top: float, place: str | None
) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    _perfect(panel, groups, arms)
    panel.axhline(top, color=_GRAY, linewidth=0.8, linestyle=":")
    if place in (None, next(iter(arms))):
        left = min(g.cell.batch_size for g in groups) / 1.45
        panel.text(left, top * 1.15, "open marker: not reached by most seeds", color="#444444",
                   fontsize=8 if place is None else 6.5, va="bottom")  # fmt: skip
    panel.set_yscale("log")
    panel.set_ylim(top=1.6 * top)
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())
    _batch_axis(panel, groups, labelled=place is None)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.nan


def _perfect(panel: Any, groups: Sequence[Group], arms: dict[str, list[Group]]) -> None:
    """Draw perfect scaling: half the steps at twice the batch, from the fastest arm at the left."""
    sizes = sorted({group.cell.batch_size for group in groups})
    for size in sizes:
        medians = [median_interval(g.steps)[0] for some in arms.values() for g in some
                   if g.cell.batch_size == size]  # fmt: skip
        best = min(medians, default=math.inf)
        if math.isfinite(best):
            ends = [best * size / other for other in (size, sizes[-1])]
            panel.plot([size, sizes[-1]], ends, color=_GRAY, linewidth=1.2, linestyle=(0, (6, 3)),
                       label="perfect scaling")  # fmt: skip
            return


def scores(groups: Sequence[Group], task: str) -> bytes:
    """Draw the final test score against the batch size, with intervals over seeds."""
    arms, entry = _arms(groups), groups[0].cell.entry
    better = "higher" if entry.higher else "lower"
    unit = f"test {entry.shown}, {better} is better"
    heading = f"{task}: final score (mean, 95 % interval over seeds)"
    figure, panels = _canvas(arms, heading, unit)
    for place, panel in panels.items():
        for number, (name, some) in enumerate(arms.items()):
            xs = _places(some, number, len(arms), place is not None)
            means = [float(np.mean(g.scores)) for g in some]
            if place not in (None, name):
                panel.plot(xs, means, **_OTHERS)
                continue
            style = _style(some[0])
            panel.plot(xs, means, label=name, **style)
            for x, group in zip(xs, some, strict=True):
                panel.plot([x, x], interval(group.scores), color=style["color"], alpha=0.6)
        if arms:
            _batch_axis(panel, groups, labelled=place is None)
        finish(panel)
    _legend(figure, panels)
    return png(figure)


def forest(found: Sequence[Finding], task: str, arm: str) -> bytes:
    """Draw an arm's paired differences to its baseline and controls, a panel per batch size."""
    mine = [finding for finding in found if finding.group.cell.arm.name == arm]
    rows = list(dict.fromkeys(name for finding in mine for name in finding.against))
    # The title needs this width, however few panels there are.
    figure = new_figure(max(9.6, 2.2 + 2.7 * len(mine)), 1.6 + 0.36 * len(rows))
    panels = figure.subplots(1, len(mine), sharey=True, squeeze=False)[0]
    for panel, finding in zip(panels, mine, strict=True):
        panel.axvline(0, color=_GRAY, linewidth=1)
        for place, name in enumerate(rows):
            comparison = finding.against.get(name)
            if comparison is None or name in finding.pairs:
                said = "same runs" if comparison else "not run here"
                panel.text(0.5, place, said, color="#666666", fontsize=8, ha="center", va="center",
                           transform=panel.get_yaxis_transform())  # fmt: skip
                continue
            colour, marker = _SIGNS[comparison.sign]
            panel.plot([comparison.low, comparison.high], [place, place], color=colour, linewidth=2)
            panel.plot([comparison.sure_low, comparison.sure_high], [place, place], color=colour,
                       linewidth=0.8)  # fmt: skip
            panel.plot([comparison.mean], [place], marker=marker, color=colour, markersize=7)
        _clip(panel, list(finding.against.values()))
        panel.set_yticks(range(len(rows)), [f"against {name}" for name in rows])
        panel.set_ylim(len(rows) - 0.4, -0.6)
        panel.set_title(f"batch {finding.group.cell.batch_size}", fontsize=10)
        panel.grid(alpha=0.25, axis="x")
        panel.spines[["top", "right"]].set_visible(False)
        panel.locator_params(axis="x", nbins=4)
        panel.tick_params(axis="x", labelsize=8)
    figure.suptitle(f"{task}: {arm} against its tuned baseline and its controls", fontsize=11)
    unit = found[0].group.cell.entry.shown
    figure.supxlabel(f"paired difference in {unit}, right of 0 is better for {arm} "
                     "(thick: 95 %, thin: level of the verdict)", fontsize=9)  # fmt: skip
    return png(figure)


def _clip(panel: Any, drawn: Sequence[Comparison]) -> None:
    """Limit the axis to four times the 95 % intervals.

    With two or three seeds the intervals of the verdict are so long that they would hide the rest.
    """
    reach = 4 * max((max(abs(c.low), abs(c.high)) for c in drawn), default=0.0)
    low, high = panel.get_xlim()
    if reach > 0:
        panel.set_xlim(max(low, -reach), min(high, reach))


_SIGNS = {1: (COLOURS[0], ">"), 0: ("#555555", "o"), -1: (COLOURS[1], "<")}


def weights(groups: Sequence[Group], task: str) -> bytes | None:
    """Draw the measures of the laws over the steps; None if no arm has a law.

    Above them are the losses, also those of the baselines: what the laws change in the training.
    """
    from matplotlib.ticker import MaxNLocator

    arms = {name: some for name, some in _arms(groups).items() if _weighs(some)}
    if not any(record.result["losses"] for some in arms.values() for record in some[0].records):
        return None  # no arm, or a command, which says no more than its scores
    baselines = {some[0].cell.arm.baseline for some in arms.values()}
    plain = {name: some for name, some in _arms(groups).items() if name in baselines}
    sizes = sorted({group.cell.batch_size for some in arms.values() for group in some})
    figure = new_figure(max(7.4, 2.4 + 2.9 * len(sizes)), 10.8)  # the title needs that width
    panels = figure.subplots(len(_PANELS), len(sizes), sharex=True, sharey="row", squeeze=False)
    for row, (title, names) in zip(panels, _PANELS, strict=True):
        for panel, size in zip(row, sizes, strict=True):
            drawn = {**plain, **arms} if names == _LOSSES else arms
            for some in drawn.values():
                for group in some:
                    if group.cell.batch_size == size:
                        _draw_series(panel, group, names)
            panel.grid(alpha=0.25)
            panel.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(title, fontsize=9)
    for panel, size in zip(panels[0], sizes, strict=True):
        panel.set_title(f"batch {size}", fontsize=10)
    for panel in panels[-1]:
        panel.set_xlabel("step")
    for panel in panels[-1]:
        panel.set_ylim(bottom=0)
        panel.yaxis.set_major_locator(MaxNLocator(integer=True))
    found = [panel.get_legend_handles_labels() for panel in panels[0]]
    legend = {label: handle for pair in found for handle, label in zip(*pair, strict=True)}
    figure.legend(
        legend.values(), legend, loc="outside upper left", frameon=False, fontsize=9, ncols=3,
        title=f"{task}: what the law does over the steps (mean over seeds)", title_fontsize=11,
        alignment="left",
    )  # fmt: skip
    return png(figure)


_LOSSES = ("losses",)
_PANELS = (
    ("training loss", _LOSSES),
    ("mean weight", ("mean_weight",)),
    ("norm ratio |g*| / |g|", ("norm_ratio",)),
    ("share at rho (full)\nand at 1/rho (pale)", ("saturated_high", "saturated_low")),
    ("effective length", ("effective_length",)),
)


def _weighs(groups: Sequence[Group]) -> bool:
    """Return whether an arm has a law whose weights can differ from 1."""
    law = groups[0].cell.arm.law
    return law.kind != "none" and law.rho > 1


def _draw_series(panel: Any, group: Group, names: Sequence[str]) -> None:
    style = _style(group)
    for pale, name in enumerate(names):
        values = _series(group, name)
        if values is not None:
            panel.plot(
                range(1, len(values) + 1),
                _smooth(values),
                color=style["color"],
                linestyle=style["linestyle"],
                linewidth=1.4,
                alpha=0.45 if pale else 1.0,
                label=None if pale else group.label,
            )


def _series(group: Group, name: str) -> np.ndarray | None:
    """Return a measure's mean over seeds by step, up to the first end of a run; None if absent."""
    results = [record.result for record in group.records]
    found = [one["losses"] if name in _LOSSES else one["series"].get(name, []) for one in results]
    length = min(map(len, found))
    return np.mean([values[:length] for values in found], axis=0) if length else None


def _smooth(values: np.ndarray) -> np.ndarray:
    """Return running means over a thirtieth of the steps."""
    window = max(1, len(values) // 30)
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)
