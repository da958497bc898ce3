"""The records of a study on disk: one file per finished trial, named by the trial's key."""

import json
from dataclasses import asdict
from pathlib import Path

from gq_triton.commands.files import whole_file
from gq_triton.study.design.trial import FORMAT, Record, Trial

__all__ = ["Store"]


class Store:
    """The records in a study's folder. Records are added, never changed or removed.

    Args:
        folder: the folder of the study.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "trials"
        self._records: dict[str, Record] = {}

    def load(self) -> int:
        """Read the records not known yet; return the number of files that hold no whole record."""
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
        """Return the record of a trial, or None if the trial has not been run."""
        return self._records.get(trial.key)

    def read(self, trial: Trial) -> Record | None:
        """Read the record of a trial from disk; None if no process has written it."""
        return _read(self.folder / f"{trial.key}.json")

    def add(self, record: Record) -> None:
        """Write a record to disk. Readers see all of it or none, also after a kill."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole_file(self.folder / f"{record.trial.key}.json") as file:
            file.write(json.dumps({"format": FORMAT, **asdict(record)}, allow_nan=False).encode())
        self.know(record)

    def know(self, record: Record) -> None:
        """Remember a record that another process has written."""
        self._records[record.trial.key] = record


def _read(path: Path) -> Record | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        parts = (content[name] for name in ("result", "timing", "environment"))
        return Record(Trial.of(content["trial"]), *parts)
    except (OSError, ValueError, KeyError, TypeError):
        return None
