"""Trials and their records: one file per finished trial, named by a hash of what was asked for."""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gq_triton.study.arms import NO_LAW, Law
from gq_triton.training.files import whole_file

__all__ = ["EVALUATE", "FORMAT", "TUNE", "Record", "Store", "Trial"]

FORMAT = 1  # of the records; a change of what a trial means makes all old ones strangers
TUNE, EVALUATE = "tune", "evaluate"


@dataclass(frozen=True)
class Trial:
    """One training run; nothing else decides its result but the code and the versions.

    Args:
        task: of the list of tasks.
        batch_size: samples per step.
        steps: optimizer steps.
        schedule: of the learning rate.
        looks_every: steps between looks at the validation data.
        target: validation score of "steps to target".
        base: the optimizer.
        lr: its highest learning rate.
        seed: of data, initial weights and order.
        purpose: ``"tune"``, or ``"evaluate"``: only then test data is looked at, once.
        law: what is done to the gradient.
        class_weighted: weight the losses by the inverse frequency of the class.
        processes: that share each batch under DDP.
        device: that it computes on, ``"cpu"`` or ``"cuda"``.
        beta1: of Adam; with SGD the momentum.
        warmup: share of the steps in which the learning rate rises linearly.
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
    law: Law = NO_LAW
    class_weighted: bool = False
    processes: int = 1
    device: str = "cpu"
    beta1: float = 0.9
    warmup: float = 0.0

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Trial":
        """Return the trial that ``asdict`` made plain values of."""
        plain = {name: value for name, value in values.items() if name != "law"}
        return cls(**plain, law=Law(**values["law"]))

    @cached_property
    def key(self) -> str:
        """Content hash: trials that ask for the same are one, whichever arm they belong to."""
        asked = asdict(self)
        # These came later: records from before keep their names.
        for name in ("processes", "device", "beta1", "warmup"):
            if asked[name] == getattr(Trial, name):
                del asked[name]
        content = json.dumps([FORMAT, asked], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Record:
    """A finished trial.

    Args:
        trial: what was asked for.
        result: what came out; depends on nothing but the trial, the code and the versions.
        timing: seconds, which differ from run to run, and when it finished (UTC, ISO 8601; absent
            in records of the first studies).
        environment: versions, commit, machine.
    """

    trial: Trial
    result: dict[str, Any]
    timing: dict[str, Any]
    environment: dict[str, Any]


class Store:
    """The records in a folder; only ever added to.

    Args:
        folder: of the study.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "trials"
        self._records: dict[str, Record] = {}

    def load(self) -> int:
        """Read the records that are not known yet; return how many files were unreadable."""
        damaged = 0
        for path in sorted(self.folder.glob("*.json")):
            if path.stem in self._records:
                continue
            record = _read(path)
            if record is None or record.trial.key != path.stem:
                damaged += 1
            else:
                self._records[path.stem] = record
        return damaged

    def get(self, trial: Trial) -> Record | None:
        """Return the record of a trial, None if it was not run."""
        return self._records.get(trial.key)

    def read(self, trial: Trial) -> Record | None:
        """Read the record of a trial that another process may have written."""
        return _read(self.folder / f"{trial.key}.json")

    def add(self, record: Record) -> None:
        """Write a record; readers see all of it or none, also after a kill."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole_file(self.folder / f"{record.trial.key}.json") as file:
            file.write(json.dumps({"format": FORMAT, **asdict(record)}, allow_nan=False).encode())
        self.know(record)

    def know(self, record: Record) -> None:
        """Take in a record that another process wrote."""
        self._records[record.trial.key] = record


def _read(path: Path) -> Record | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        parts = (content[name] for name in ("result", "timing", "environment"))
        return Record(Trial.of(content["trial"]), *parts)
    except (OSError, ValueError, KeyError, TypeError):
        return None
