"""Records in groups by arm and control, and as tables with a row per run."""

import csv
import io
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gq_triton.study.design.protocol import Cell, Choice
from gq_triton.study.design.trial import SERIES, Record, Records

__all__ = ["Group", "collect", "results_csv", "timing_csv"]

MEASURES = (
    "loss", "accuracy", "balanced_accuracy", "worst_class_recall", "worst_group_accuracy",
    "bits_per_byte",
)  # fmt: skip
KEY = "task", "arm", "control", "batch_size", "seed"


@dataclass(frozen=True)
class Group:
    """The evaluation runs of an arm, or of one of its controls, at one batch size.

    Args:
        cell: the arm at its batch size.
        choice: the arm's tuned settings.
        control: name of the control; ``""`` for the arm itself.
        records: one per evaluation seed, by seed.
    """

    cell: Cell
    choice: Choice
    control: str
    records: list[Record]

    @property
    def label(self) -> str:
        """Its name in pictures and tables."""
        return f"{self.cell.arm.name}: {self.control}" if self.control else self.cell.arm.name

    @property
    def scores(self) -> list[float]:
        """Test scores by seed; that of a diverged run is chance."""
        return [self.score(record) for record in self.records]

    def score(self, record: Record) -> float:
        """Return the test score of a run; that of a diverged run is chance."""
        found = record.result["score"]
        return self.cell.entry.chance if found is None else found

    @property
    def steps(self) -> list[float]:
        """Steps to the target by seed, infinite where the target was not reached."""
        found = [record.result["steps_to_target"] for record in self.records]
        return [math.inf if steps is None else float(steps) for steps in found]

    @property
    def seconds(self) -> list[float]:
        """Seconds of training to the target by seed, infinite where it was not reached."""
        found = [record.timing["seconds_to_target"] for record in self.records]
        return [math.inf if seconds is None else seconds for seconds in found]

    @property
    def diverged(self) -> int:
        """Number of seeds on which the run diverged."""
        return sum(record.result["diverged_at"] is not None for record in self.records)


def gains(first: Group, second: Group) -> list[float]:
    """Return by seed how much better the first group scored; positive is better."""
    task = first.cell.entry
    pairs = zip(first.scores, second.scores, strict=True)
    return [task.gain(mine, other) for mine, other in pairs]


def collect(cells: Iterable[Cell], records: Records) -> list[Group]:
    """Return every group of which no run is missing."""
    groups = []
    for cell in cells:
        choice = cell.choice(records)
        if choice is None:
            continue
        wanted = {"": cell.evaluation(choice)}
        wanted |= {name: cell.control(name, choice) for name in cell.controls()}
        for control, trials in wanted.items():
            runs = [record for trial in trials if (record := records.get(trial)) is not None]
            if len(runs) == len(trials):
                groups.append(Group(cell, choice, control, runs))
    return groups


def results_csv(groups: Iterable[Group]) -> str:
    """Return the text of ``results.csv``: a row per task, arm, control, batch size and seed.

    Nothing in it depends on the clock. ``beta1`` and ``warmup`` have columns unless the study tries
    0.9 and 0 alone, as the first studies did.
    """
    groups = list(groups)
    spaces = {(group.cell.config.beta1, group.cell.config.warmup) for group in groups}
    tuned = () if spaces <= {((0.9,), (0.0,))} else ("beta1", "warmup")
    settings = "lr", *tuned, "rho", "queue_length", "n_clusters"
    columns = [
        *KEY, *settings, "score_name", "score", "diverged", "validation_score",
        "steps_to_target", "samples_to_target", "train_loss",
        *(f"test_{name}" for name in MEASURES), *SERIES, "trial",
    ]  # fmt: skip
    return _csv(columns, (_result_row(group, record) for group, record in _runs(groups)))


def _runs(groups: Iterable[Group]) -> Iterable[tuple[Group, Record]]:
    return ((group, record) for group in groups for record in group.records)


def _key(group: Group, record: Record) -> dict[str, Any]:
    trial = record.trial
    return {
        "task": trial.task,
        "arm": group.cell.arm.name,
        "control": group.control,
        "batch_size": trial.batch_size,
        "seed": trial.seed,
    }


def _result_row(group: Group, record: Record) -> dict[str, Any]:
    trial, result = record.trial, record.result
    steps, test = result["steps_to_target"], result["test"] or {}
    law = trial.law if trial.law.kind != "none" else None
    return {
        **_key(group, record),
        "lr": trial.lr,
        "beta1": trial.beta1,
        "warmup": trial.warmup,
        "rho": law.rho if law and law.weighted else None,
        "queue_length": law.queue_length if law else None,
        "n_clusters": law.n_clusters if law else None,
        "score_name": group.cell.entry.score,
        "score": group.score(record),
        "diverged": int(result["diverged_at"] is not None),
        "validation_score": result["validation_score"],
        "steps_to_target": steps,
        "samples_to_target": None if steps is None else steps * trial.batch_size,
        "train_loss": result["train_loss"],
        **{f"test_{name}": test.get(name) for name in MEASURES},
        **{name: result[name] for name in SERIES},
        "trial": trial.key,
    }


def timing_csv(groups: Iterable[Group]) -> str:
    """Return the text of ``timing.csv``: the seconds of every run, which differ in every study."""
    rows = (_key(group, record) | record.timing for group, record in _runs(groups))
    return _csv([*KEY, "seconds", "seconds_to_target"], rows)


def _csv(columns: list[str], rows: Iterable[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for row in rows:
        # Six digits are enough: scores are shares of a few hundred samples.
        short = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
        writer.writerow(short)
    return text.getvalue()
