"""A trial, which is one training run that a study asks for, and the record of its result."""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Protocol

from gq_triton.study.design.law import NO_LAW, StudyLaw

__all__ = ["EVALUATE", "FORMAT", "SERIES", "TUNE", "Record", "Records", "Trial"]

# Part of every trial's key: with another number no old record belongs to any trial.
FORMAT = 1
TUNE, EVALUATE = "tune", "evaluate"
# What a law measures in every step, in the order of the columns of results.csv.
SERIES = "mean_weight", "norm_ratio", "saturated_high", "saturated_low", "effective_length"


@dataclass(frozen=True)
class Trial:
    """One training run. Its result depends on these fields, the code and the versions alone.

    The names of the fields are part of ``key``, and so of the names of all records on disk.

    Args:
        task: a key of ``STUDY_TASKS``, a task of the user's own, or ``COMMAND``.
        batch_size: samples per step.
        steps: optimizer steps.
        schedule: of the learning rate.
        looks_every: steps between looks at the validation data.
        target: validation score of "steps to target".
        base: the optimizer, a key of ``OPTIMIZERS``.
        lr: highest learning rate.
        seed: of data, initial weights and the order of samples.
        purpose: ``"tune"``, or ``"evaluate"``, which alone looks at test data, once, at the end.
        law: what is done to the gradient.
        class_weighted: whether losses are weighted by the inverse frequency of their class.
        processes: number of processes that share each batch under DDP.
        device: ``"cpu"`` or ``"cuda"``.
        beta1: of Adam; with SGD the momentum.
        warmup: share of the steps over which the learning rate rises linearly.
        command: the user's command that runs the trial, names of settings in braces; ``""``: none.
    """

    task: str
    batch_size: int
    steps: int
    schedule: str
    looks_every: int
    target: float
    base: str
    lr: float
    seed: int
    purpose: str
    law: StudyLaw = NO_LAW
    class_weighted: bool = False
    processes: int = 1
    device: str = "cpu"
    beta1: float = 0.9
    warmup: float = 0.0
    command: str = ""

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Trial":
        """Return the trial that ``asdict`` turned into these values."""
        plain = {name: value for name, value in values.items() if name != "law"}
        return cls(**plain, law=StudyLaw(**values["law"]))

    @cached_property
    def key(self) -> str:
        """Hash of all fields: arms that ask for the same run share one trial."""
        asked = asdict(self)
        # Fields that were added later are left out at their defaults: old records keep their names.
        for name in ("processes", "device", "beta1", "warmup", "command"):
            if asked[name] == getattr(Trial, name):
                del asked[name]
        content = json.dumps([FORMAT, asked], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Record:
    """A finished trial.

    Args:
        trial: what was asked for.
        result: scores and curves; they depend on the trial, the code and the versions alone.
        timing: seconds of training, and ``finished``, the time of day (UTC, ISO 8601), which
            records of the first studies lack.
        environment: versions, commit, machine.
    """

    trial: Trial
    result: dict[str, Any]
    timing: dict[str, Any]
    environment: dict[str, Any]


class Records(Protocol):
    """The records that are known."""

    def get(self, trial: Trial) -> Record | None:
        """Return the record of a trial, or None if the trial has not been run."""
        ...
