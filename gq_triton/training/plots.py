"""The picture of a run."""

from collections.abc import Sequence
from typing import IO, Any

__all__ = ["draw_curves"]

# Okabe and Ito's palette, whose colours stay distinct with every common form of colour blindness.
_BLUE, _ORANGE, _GREEN, _GRAY = "#0072B2", "#D55E00", "#009E73", "#9A9A9A"
_WINDOW = 15  # steps of the running mean


def draw_curves(rows: Sequence[dict[str, Any]], title: str, file: IO[bytes]) -> None:
    """Draw loss, accuracy, weights and effective length of a run into a PNG.

    Args:
        rows: the rows of ``metrics.jsonl``; null stands for what was not finite.
        title: one line above the panels.
        file: where the PNG is written.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import (
        LogLocator,
        MaxNLocator,
        NullFormatter,
        PercentFormatter,
        StrMethodFormatter,
    )

    steps = [row for row in rows if row["kind"] == "step"]
    epochs = [row for row in rows if row["kind"] == "epoch"]

    def series(of: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
        return [row["step"] for row in of], [_number(row[name]) for row in of]

    clustered = [row for row in steps if row.get("cluster_sizes")]
    layout: list[Any] = [["loss", "accuracy"], ["weights", "length"]] + [["sizes", "sizes"]] * bool(
        clustered
    )
    figure = Figure(figsize=(11, 3.75 * len(layout)), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=13)
    panels = figure.subplot_mosaic(layout, sharex=True)
    loss, accuracy, weights, length = (
        panels[name] for name in ("loss", "accuracy", "weights", "length")
    )

    loss.plot(*series(steps, "loss"), color=_GRAY, linewidth=0.8, label="batch, while training")
    for panel, name in ((loss, "loss"), (accuracy, "accuracy")):
        style = {"linewidth": 2, "marker": "."}
        panel.plot(*series(epochs, f"train_{name}"), color=_BLUE, label="training set", **style)
        panel.plot(*series(epochs, f"test_{name}"), "--", color=_ORANGE, label="test set", **style)
    loss.set(title="Loss", ylabel="cross entropy (nats)", yscale="log")
    # Labels at 1, 2 and 5 times each power of ten; on a long axis at the powers alone, since more
    # labels would overlap.
    low, high = loss.get_ylim()
    loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1e4 * low else (1,)))
    loss.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    few = high < 4 * low  # then there is room for a label at every tick
    loss.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}") if few else NullFormatter())
    accuracy.set(title="Accuracy", ylabel="share of samples classified right")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))

    for name, color, label in (
        ("norm_ratio", _ORANGE, "norm ratio |g*| / |g|"),
        ("mean_weight", _BLUE, "mean weight w"),
    ):
        at, values = series(steps, name)
        weights.plot(at, values, color=color, linewidth=0.7, alpha=0.35)
        weights.plot(at, _smooth(values), color=color, linewidth=2, label=label)
    weights.axhline(1, color=_GRAY, linewidth=1, linestyle=":")
    weights.set(
        title=f"Effect on the gradient (bold: mean of {_WINDOW} steps)",
        ylabel="ratio (1: unchanged)",
    )
    weights.margins(y=0.15)

    length.step(*series(steps, "effective_length"), where="post", color=_GREEN, linewidth=1.5)
    length.set(title="Effective length of the queue", ylabel="gradients per element")
    length.set_ylim(0, 1.15 * max([1, *(_number(row["effective_length"]) for row in steps)]))
    length.yaxis.set_major_locator(MaxNLocator(integer=True))

    skipped = [row["step"] for row in steps if row["skipped"]]
    for number, step in enumerate(skipped):
        label = f"skipped steps ({len(skipped)})" if number == 0 else None
        loss.axvline(step, color="black", linewidth=0.8, alpha=0.5, label=label)
    if clustered:
        _draw_sizes(panels["sizes"], clustered)
    below = [panels["sizes"]] if clustered else []
    for panel in [weights, length, *below]:
        panel.set_xlabel("optimizer step")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.tick_params(labelbottom=True)
    for panel in panels.values():
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    loss.legend(frameon=False)
    accuracy.legend(frameon=False, loc="lower right")
    weights.legend(frameon=False, loc="upper left", ncols=2)
    figure.savefig(file, format="png")


def _draw_sizes(panel: Any, rows: list[dict[str, Any]]) -> None:
    """Draw the sizes of the clusters of all processes over the steps."""
    at = [row["step"] for row in rows]
    sizes = [sorted(n for rank in row["cluster_sizes"] for n in rank) for row in rows]
    middle = [of[len(of) // 2] for of in sizes]
    panel.fill_between(at, [of[0] for of in sizes], [of[-1] for of in sizes], color=_BLUE,
                       alpha=0.15, linewidth=0, label="smallest to largest")  # fmt: skip
    panel.plot(at, _smooth(middle), color=_BLUE, linewidth=2,
               label=f"median (mean of {_WINDOW} steps)")  # fmt: skip
    even = [sum(of) / len(of) for of in sizes]
    panel.plot(at, even, color=_GRAY, linewidth=1, linestyle=":", label="all of one size")
    panel.set(title=f"Sizes of the {len(sizes[0])} clusters of a step", ylabel="samples")
    panel.set_ylim(bottom=0)
    panel.legend(frameon=False, ncols=3)


def _smooth(values: list[float]) -> list[float]:
    """Return running means: of each value and those before it, at most ``_WINDOW`` together."""
    windows = (values[max(0, end - _WINDOW) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
