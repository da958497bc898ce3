"""One server from which the processes of all workers of pytest-xdist are forked.

It imports and compiles for a quarter of a minute, which each worker's own server would do again.
"""

import os
from multiprocessing import forkserver
from typing import Any

import train_runs  # noqa: F401  names modules that the server imports

from gq_triton.testing import server

_SERVER: Any = forkserver._forkserver  # pyright: ignore[reportAttributeAccessIssue]
# The key exists from Python 3.14 on.
_KNOWN = "_forkserver_address", "_forkserver_authkey"


def started() -> dict[str, Any]:
    """Start this process's server, if it has none, and return how another process reaches it."""
    server()
    streams = [os.dup(1), os.dup(2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for stream in (1, 2):  # ranks write to what their server has
            os.dup2(nowhere, stream)
        _SERVER.ensure_running()
    finally:
        for stream, kept in enumerate(streams, 1):
            os.dup2(kept, stream)
            os.close(kept)
        os.close(nowhere)
    return {name: getattr(_SERVER, name) for name in _KNOWN if hasattr(_SERVER, name)}


def use(address: dict[str, Any]) -> None:
    """Have this process fork from the server of another one, which must live longer."""
    for name, value in address.items():
        setattr(_SERVER, name, value)
    _SERVER.ensure_running = lambda: None
    # Whoever holds the other server's file keeps it alive; that is the process that started it.
    _SERVER._forkserver_alive_fd = os.open(os.devnull, os.O_WRONLY)
