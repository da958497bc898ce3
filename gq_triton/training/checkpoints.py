"""The checkpoints of a run: the newest two are kept, and one is read if the other is damaged."""

import re
from pathlib import Path
from typing import Any

import torch

from gq_triton.commands.files import whole_file
from gq_triton.saved.files import DAMAGE, load_checked

__all__ = ["checkpoints", "load_newest_checkpoint", "save_checkpoint", "step_of"]

KEPT = 2  # checkpoints: one more than needed, since the newest may be damaged
_CHECKPOINT = re.compile(r"step-\d{8,}\.pt")


def save_checkpoint(folder: Path, step: int, content: dict[str, Any]) -> None:
    """Write the checkpoint of a step, and delete all checkpoints but the newest ``KEPT``.

    Args:
        folder: folder of the checkpoints, made if it does not exist.
        step: number of steps done.
        content: tensors and plain values, so that ``torch.load(weights_only=True)`` reads them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / f"step-{step:08d}.pt") as file:
        torch.save(content, file)
    for old in checkpoints(folder)[KEPT:]:
        old.unlink()
    for draft in folder.glob("*.tmp"):  # of a process that was killed while it wrote
        draft.unlink()


def load_newest_checkpoint(folder: Path) -> tuple[dict[str, Any] | None, list[Path]]:
    """Read the newest checkpoint that is whole.

    Returns:
        The content, or None if no checkpoint is whole; and the paths of the newer checkpoints,
        which are damaged.
    """
    damaged: list[Path] = []
    for path in checkpoints(folder):
        try:
            return load_checked(path), damaged
        except DAMAGE:
            damaged.append(path)
    return None, damaged


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the newest first."""
    found = [path for path in folder.glob("step-*.pt") if _CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """Return the number of steps done, from a checkpoint's name."""
    return int(path.stem.removeprefix("step-"))
