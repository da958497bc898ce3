"""Calls that every rank must make: a rank that waits for the others says which call it waits in."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["PATIENCE", "together"]

# Seconds after which a waiting rank logs a warning. It waits on: another rank may be writing.
PATIENCE = 20.0

_log = logging.getLogger("gq_triton")


@contextmanager
def together(call: str, rank: int, patience: float | None = None) -> Iterator[None]:
    """Run collectives of a call that every rank must make.

    No rank can know whether the others will make the call, so nothing is refused. A rank that has
    waited for ``patience`` seconds logs a warning. Where the process group gives up after its own
    timeout, the error names the call.

    Args:
        call: the call, such as ``"GradQueueState.metrics()"``.
        rank: this process's rank, for the message.
        patience: seconds before the warning; None stands for ``PATIENCE``.

    Raises:
        RuntimeError: a collective failed.
    """
    seconds = PATIENCE if patience is None else patience
    message = (
        f"rank {rank} has waited {seconds:g} s in {call}, which communicates: every rank must call "
        "it, not one rank alone"
    )
    reminder = threading.Timer(seconds, _log.warning, [message])
    reminder.daemon = True
    reminder.start()
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"{call} failed on rank {rank}; it communicates, so every rank must call it: {error}"
        ) from error
    finally:
        reminder.cancel()
