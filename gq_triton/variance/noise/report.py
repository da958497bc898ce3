"""What a meter reports, and its table."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from gq_triton.variance.noise.predict import CONSTANT, WITHIN, steps_ratio
from gq_triton.variance.noise.window import COLUMNS, Estimate, Window, ratio

__all__ = ["LayerNoise", "NoiseReport", "layers", "report"]


class LayerNoise(NamedTuple):
    """The noise of one parameter's gradient, or of all, over a window.

    Attributes:
        noise_scale: ``tr S / |G|**2``, in samples, with its interval of 95 %; infinite where no
            signal is seen.
        variance: ``tr S``, of one sample's gradient, the mean over the window.
        signal: ``|G|**2``, the mean over the window; noise may make it negative.
        signal_to_noise: ``B |G|**2 / tr S``, of a batch's gradient.
        between_to_within: F, whether clusters of features tell more than random groups, which have
            1; NaN without ``features``.
        lag_share: the share of noise in the squared distance from momentum to gradient; NaN without
            ``optimizer``.
    """

    noise_scale: Estimate
    variance: float
    signal: float
    signal_to_noise: float
    between_to_within: Estimate
    lag_share: Estimate


@dataclass(frozen=True)
class NoiseReport:
    """The figures of a window, for ``print``.

    Attributes:
        total: those of the whole model.
        layers: those of every parameter, by name.
        group_norms: norms of the groups' gradients in the last measured step, on this process.
        steps: number of measurements in the window.
        first: the forward pass of the first one.
        last: the forward pass of the last one.
        batch_size: B, the mean over the window; under DDP that of all ranks.
        unmeasured: names of parameters whose gradient is not known by group.
    """

    total: LayerNoise
    layers: dict[str, LayerNoise]
    group_norms: list[float]
    steps: int
    first: int
    last: int
    batch_size: float
    unmeasured: list[str]

    @property
    def critical_batch(self) -> Estimate:
        """The batch at which twice the least steps are needed, predicted within a factor of 3.

        The factor between it and the noise scale, 2.4, was fitted to six ladders of batches. The
        interval is the range in which those six and four other ladders lay. Their noise scales were
        those of whole runs, from the first step on; a late window's is larger.
        """
        value = CONSTANT * self.total.noise_scale.value
        return Estimate(value, value / WITHIN, value * WITHIN)

    def steps_ratio(self, new: float, old: float | None = None) -> Estimate:
        """Return the steps of another batch size over those of the present one, as predicted.

        Args:
            new: the other batch size.
            old: the batch size to compare with; None takes ``batch_size``.

        Returns:
            The ratio for the predicted critical batch, and those for a third and three times as
            much.
        """
        old = self.batch_size if old is None else old
        if not self.steps:
            return Estimate(math.nan, math.nan, math.nan)
        ratios = [steps_ratio(batch, old, new) for batch in self.critical_batch]
        return Estimate(ratios[0], min(ratios[1:]), max(ratios[1:]))

    def __str__(self) -> str:
        """Return a table of the parameters, and the prediction."""
        if not self.steps:
            return "nothing was measured yet"
        rows = [_HEAD, *(_row(name, layer) for name, layer in self.layers.items())]
        rows.append(_row("all", self.total))
        width = max(len(row[0]) for row in rows)
        lines = [f"{row[0]:{width}}" + "".join(f"  {cell:>{w}}" for cell, w in
                 zip(row[1:], _WIDTHS, strict=True)) for row in rows]  # fmt: skip
        return "\n".join([*lines, *self._sentences()])

    def _sentences(self) -> list[str]:
        scale, batch = self.total.noise_scale, self.critical_batch
        size = self.batch_size
        lines = [
            "",
            f"{self.steps} measurements, forward passes {self.first} to {self.last}, batch "
            f"{size:g}",
            f"noise scale {_short(scale.value)} samples, {_range(scale)}",
            f"critical batch about {_short(batch.value)}, {_range(batch)}: {CONSTANT:g} noise "
            f"scales, fitted to six ladders, within {WITHIN:g} times on those and four others",
        ]
        if math.isfinite(batch.value):
            for new in (2 * size, 4 * size):
                saved = self.steps_ratio(new)
                lines.append(
                    f"batch {new:g} would take {saved.value:.0%} of the steps, "
                    f"{saved.low:.0%} to {saved.high:.0%}"
                )
        if not math.isnan(self.total.between_to_within.value):
            found = self.total.between_to_within
            lines.append(
                f"F = {_short(found.value)}, {_range(found)}: clusters of features differ so many "
                "times as much as random groups"
            )
        if not math.isnan(self.total.lag_share.value):
            found = self.total.lag_share
            lines.append(
                f"lag share {_short(found.value)}, {_range(found)}: the share of noise in the "
                "distance from momentum to gradient"
            )
        if self.unmeasured:
            lines.append(f"not measured: {', '.join(self.unmeasured)}")
        return lines


_HEAD = ("", "noise scale", "from", "to", "variance", "signal", "signal/noise")
_WIDTHS = 11, 9, 9, 9, 9, 12


def _row(name: str, layer: LayerNoise) -> tuple[str, ...]:
    cells = (*layer.noise_scale, layer.variance, layer.signal, layer.signal_to_noise)
    return name, *map(_short, cells)


def _short(value: float) -> str:
    return "inf" if math.isinf(value) else f"{value:.3g}"


def _range(found: Estimate) -> str:
    return f"{_short(found.low)} to {_short(found.high)}"


def layers(window: Window, *, total: bool = False) -> dict[str, LayerNoise]:
    """Return the noise of every measured parameter, or of all of them under the name ``""``."""
    measured, tables = window.tables()
    if total:
        names, tables = [""], window.totals()[:, None]
    else:
        known = window.known()
        names = [name for name, yes in zip(window.names, known, strict=True) if yes]
        tables = tables[:, known]
    batch = sum(one.samples for one in measured) / max(len(measured), 1)
    found = {}
    for row, name in enumerate(names):
        column = {key: tables[:, row, place] for place, key in enumerate(COLUMNS)}
        variance, signal = (column[key].mean().item() for key in ("variance", "signal"))
        found[name] = LayerNoise(
            ratio(column["variance"], column["signal"]),
            variance,
            signal,
            batch * signal / variance if variance > 0 else math.inf,
            _known_ratio(column["between"], column["within"]),
            _known_ratio(column["expected"], column["innovation"]),
        )
    return found


def _known_ratio(numerators: Tensor, denominators: Tensor) -> Estimate:
    """Return the ratio over the steps in which both are known."""
    known = numerators.isfinite() & denominators.isfinite()
    return ratio(numerators[known], denominators[known])


def report(window: Window) -> NoiseReport:
    """Return the figures of a window."""
    measured, _ = window.tables()
    known = window.known()
    return NoiseReport(
        layers(window, total=True)[""],
        layers(window),
        measured[-1].norms.tolist() if measured else [],
        len(measured),
        measured[0].step if measured else 0,
        measured[-1].step if measured else 0,
        sum(one.samples for one in measured) / max(len(measured), 1),
        [name for name, yes in zip(window.names, known, strict=True) if not yes],
    )
