"""Files that readers see whole or not at all, and folders that one process writes to at a time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

from gq_triton.commands.refusal import Refusal

__all__ = ["alone", "check_folder", "whole_file"]


def check_folder(out: Path) -> None:
    """Raise a Refusal unless the folder ``--out`` is there or can be made, and written to."""
    try:
        if out.exists() and not out.is_dir():
            raise Refusal(f"--out must be a folder, and {out} is a file")
        above = next(path for path in (out, *out.absolute().parents) if path.exists())
    except OSError as error:  # as for a name that is too long
        raise Refusal(f"--out {out} cannot be made: {error.strerror}") from error
    try:
        # Not every folder that seems to be open to writing is, such as /proc.
        with TemporaryDirectory(dir=above):
            pass
    except OSError as error:
        raise Refusal(
            f"--out {out} cannot be made: {above} is no folder one may write to"
        ) from error


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file of which readers see the old content or all of the new, whatever happens.

    Args:
        path: the file; its folder must exist.

    Yields:
        A draft to write to, which takes the place of ``path`` at the end.
    """
    draft = path.with_name(path.name + ".tmp")
    try:
        with draft.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        _sync_folder(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a new name in a folder outlive a power cut; only POSIX can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def alone(folder: Path, what: str) -> Iterator[None]:
    """Hold the lock of a folder; it is released when the process ends or is killed.

    Args:
        folder: the folder, which must exist.
        what: what runs in it, for the message.

    Raises:
        Refusal: another process holds the lock.
    """
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows has no such lock; two processes only do the same twice
        yield
        return
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refusal(f"another process runs the {what} in {folder}") from None
        yield
