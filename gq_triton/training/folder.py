"""The folder of a run: which folder may become one, and what is read before anything is written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from gq_triton.commands.files import check_folder
from gq_triton.commands.refusal import Refusal
from gq_triton.training.checkpoints import checkpoints, load_newest_checkpoint, step_of
from gq_triton.training.place import launch_id
from gq_triton.training.saved import check_form

__all__ = ["CHECKPOINTS", "CURVES", "METRICS", "SUMMARY", "load_own", "load_saved", "make_folder"]

CHECKPOINTS, METRICS, SUMMARY, CURVES = "checkpoints", "metrics.jsonl", "summary.json", "curves.png"

Result = TypeVar("Result")
Saved = tuple[dict[str, Any] | None, list[Path]]


def load_own(out: Path, tasks: list[str]) -> Saved:
    """Return the newest checkpoint in ``out`` that an earlier attempt of this launch wrote.

    Args:
        out: folder for the run.
        tasks: names of the tasks.

    Returns:
        The content, or None if ``out`` is new or empty; and the paths of the newer checkpoints,
        which are damaged.

    Raises:
        Refusal: ``out`` holds anything else, or cannot be made.
    """
    return _reachable(f"--out {out} cannot be made", lambda: _load_own(out, tasks))


def _load_own(out: Path, tasks: list[str]) -> Saved:
    launch = launch_id()
    if launch is not None:
        saved, damaged = load_newest_checkpoint(out / CHECKPOINTS)
        if isinstance(saved, dict) and saved.get("launch") == launch:
            _check(out, saved, damaged, tasks)
            return saved, damaged
    _check_new(out)
    return None, []


def _check_new(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise Refusal(f"--out {out} is a file: name a folder")
    if out.resolve() == Path(out.resolve().anchor):
        raise Refusal(f"--out {out} is the root of the file system: name a folder below it")
    # Drafts alone are no run: their process was killed before its first checkpoint was whole.
    content = [path for path in out.iterdir() if path.name != CHECKPOINTS] if out.exists() else []
    kept = [path for path in (out / CHECKPOINTS).glob("*") if path.suffix != ".tmp"]
    if kept or any(path.name in (METRICS, SUMMARY, CURVES) for path in content):
        raise Refusal(f"--out {out} holds another run: name another folder, or use --resume {out}")
    if content:
        raise Refusal(f"--out {out} holds other files: name a new folder or an empty one")
    check_folder(out)


def make_folder(out: Path) -> None:
    """Make the folder of a run.

    Raises:
        Refusal: it cannot be made.
    """
    _reachable(f"--out {out} cannot be made", lambda: out.mkdir(parents=True, exist_ok=True))


def load_saved(out: Path, tasks: list[str]) -> Saved:
    """Return the newest whole checkpoint of a run, and the paths of the newer, damaged ones.

    Args:
        out: folder of the run.
        tasks: names of the tasks.

    Raises:
        Refusal: no checkpoint is whole, or the newest whole one is not launch/train.py's.
    """
    saved, damaged = _reachable(
        f"--resume {out} cannot be read", lambda: load_newest_checkpoint(out / CHECKPOINTS)
    )
    if saved is None:
        found = f"all {len(damaged)} there are damaged" if damaged else "there is none"
        raise Refusal(f"--resume {out} needs a checkpoint in {out / CHECKPOINTS}, and {found}")
    _check(out, saved, damaged, tasks)
    return saved, damaged


def _check(out: Path, saved: Any, damaged: list[Path], tasks: list[str]) -> None:
    """Raise a Refusal unless a checkpoint has the right form and its file's name says its step."""
    path = next(path for path in checkpoints(out / CHECKPOINTS) if path not in damaged)
    try:
        check_form(saved, step_of(path), tasks)
    except ValueError as error:
        raise Refusal(f"{path} was not written by this train.py: {error}") from error


def _reachable(refusal: str, act: Callable[[], Result]) -> Result:
    """Return what ``act`` returns; raise a Refusal if the system cannot use a path."""
    try:
        return act()
    except OSError as error:
        raise Refusal(f"{refusal}: {error.strerror}") from error
    except ValueError as error:  # a path with a zero byte
        raise Refusal(f"{refusal}: {error}") from error
