"""The records of trajectories on disk: one file per finished one, and one that can be resumed."""

import json
from pathlib import Path
from typing import Any

from gq_triton.commands.files import check_folder, whole_file
from gq_triton.commands.refusal import Refusal
from gq_triton.variance.trajectory.plan import Trajectory

__all__ = ["Records"]

RUNS = "runs"


class Records:
    """The folder ``runs`` below the folder of a call.

    Args:
        folder: the folder of the call.
    """

    def __init__(self, folder: Path) -> None:
        self._out, self._folder = folder, folder / RUNS

    def check(self) -> None:
        """Raise a Refusal if the folder cannot be made, or holds something else."""
        check_folder(self._out)
        if self._out.exists() and not self._folder.is_dir() and any(self._out.iterdir()):
            raise Refusal(f"--out {self._out} holds something else: name a new or an empty folder")

    def make(self) -> None:
        """Make the folder.

        Raises:
            Refusal: it cannot be made.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Refusal(f"--out {self._out} cannot be written to: {error.strerror}") from error

    def state(self, trajectory: Trajectory) -> Path:
        """Return the file from which an unfinished trajectory goes on."""
        return self._folder / f"{trajectory.key}.pt"

    def get(self, trajectory: Trajectory) -> dict[str, Any] | None:
        """Return the record of a finished trajectory; None if there is no whole one."""
        try:
            text = (self._folder / f"{trajectory.key}.json").read_text(encoding="utf-8")
            record = json.loads(text)
            same = record["trajectory"] == trajectory.to_dict()
            return record if same and isinstance(record["rows"], list) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def add(self, trajectory: Trajectory, record: dict[str, Any]) -> None:
        """Write the record of a finished trajectory, whose other file is removed."""
        with whole_file(self._folder / f"{trajectory.key}.json") as file:
            content = {"trajectory": trajectory.to_dict(), **record}
            file.write(json.dumps(content, allow_nan=False).encode())
        self.state(trajectory).unlink(missing_ok=True)
