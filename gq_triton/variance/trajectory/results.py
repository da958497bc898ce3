"""What trajectories say together: curves over seeds, and figures of the last part of a training."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gq_triton.variance.trajectory.plan import Trajectory
from gq_triton.variance.trajectory.train import ESTIMATORS

__all__ = ["MEASURES", "Group", "results_csv", "summary"]

MEASURES = ("average", "normalised", "noise_to_signal")
# The share of a training, its last part, over which figures are averaged, as in the paper's.
LAST = 0.7


@dataclass(frozen=True)
class Group:
    """The finished trajectories of one setting, one for each seed.

    Args:
        name: what tells it from the other groups.
        trajectories: the trajectories.
        records: their records, in the same order.
    """

    name: str
    trajectories: list[Trajectory]
    records: list[dict[str, Any]]

    def curve(self, estimator: str, measure: str) -> list[tuple[int, list[float]]]:
        """Return steps and the values of a measure over the seeds that got there."""
        values: dict[int, list[float]] = {}
        for record in self.records:
            for row in record["rows"]:
                if row["estimator"] == estimator:
                    value = row[measure]
                    values.setdefault(row["step"], []).append(math.inf if value is None else value)
        return sorted(values.items())

    def last(self, estimator: str, measure: str) -> list[float]:
        """Return every seed's mean of a measure over the last 70 % of the steps."""
        first = (1 - LAST) * self.trajectories[0].plan.steps
        means = []
        for record in self.records:
            own = [r[measure] for r in record["rows"]
                   if r["estimator"] == estimator and r["step"] > first]  # fmt: skip
            if own and record["diverged_at"] is None:
                means.append(math.inf if None in own else math.fsum(own) / len(own))
        return means

    def ratio(self, estimator: str) -> float:
        """Return the variance over that of SG-B, of the last part, the mean over seeds."""
        pairs = zip(self.last(estimator, "average"), self.last("SG-B", "average"), strict=True)
        ratios = [one / base for one, base in pairs if base > 0]
        return math.fsum(ratios) / len(ratios) if ratios else math.nan


def summary(groups: Sequence[Group]) -> list[str]:
    """Return lines with the figures of the last part of every group, for a terminal."""
    names = [name for name in ESTIMATORS if name != "SG-B"]
    head = ["", "SG-B variance", *(f"{name}/SG-B" for name in names), "normalised"]
    rows = [head]
    for group in groups:
        base, normalised = (group.last("SG-B", m) for m in ("average", "normalised"))
        ratios = (group.ratio(name) for name in names)
        rows.append([group.name, *map(_short, (_mean(base), *ratios, _mean(normalised)))])
    widths = [max(len(row[n]) for row in rows) for n in range(len(head))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in
                  zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _short(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"


def results_csv(groups: Sequence[Group]) -> bytes:
    """Return a row per setting, seed, step and estimator."""
    text = io.StringIO()
    settings = ("lr", "ratios", "inputs", "teacher", "duplicates")
    writer: Any = None
    for group in groups:
        for trajectory, record in zip(group.trajectories, group.records, strict=True):
            plan = trajectory.plan
            own = {name: getattr(plan, name)[0] for name in settings}
            own = {"task": plan.task, "seed": trajectory.seed, **own}
            for row in record["rows"]:
                whole = own | row
                if writer is None:
                    writer = csv.DictWriter(text, fieldnames=list(whole), lineterminator="\n")
                    writer.writeheader()
                writer.writerow(whole)
    return text.getvalue().encode()
