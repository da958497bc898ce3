"""A command that ends with the process that waits for it, also if that process is killed.

This file is run as a script, as the parent of the command. It imports nothing of the package: its
start takes milliseconds.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence

__all__ = ["guarded"]

_GRACE = 5.0  # seconds between the request to end and the kill


def guarded(command: Sequence[str], env: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Run a command and return its exit status and what it printed, errors among the rest.

    The command runs in a process group of its own, without standard input. The group is ended when
    this process ends, however it ends.

    Args:
        command: the words of the command.
        env: variables of the environment that the command gets beside those of this process.

    Raises:
        OSError: there is no such command.
    """
    # Nothing is written to the pipe: its end tells the guard that this process has ended.
    reading, writing = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, __file__, *command],
            stdin=reading,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
        output, _ = process.communicate()
    finally:
        os.close(reading)
        os.close(writing)
    if process.returncode == _ABSENT:
        raise FileNotFoundError(output.strip())
    return process.returncode, output


_ABSENT = 127


def _main(command: list[str]) -> None:
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        sys.stdout.write(f"{command[0]}: {error.strerror}\n")
        sys.stdout.flush()
        os._exit(_ABSENT)

    def watch() -> None:
        os.read(0, 1)  # until the other end is closed
        _end(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
        _end(process, signal.SIGKILL)  # what the command has started, too
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    code = process.wait()
    os._exit(code if code >= 0 else 128 - code)  # as a shell does; the thread still reads


def _end(process: "subprocess.Popen[bytes]", number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


if __name__ == "__main__":
    _main(sys.argv[1:])
