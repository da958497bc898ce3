"""Where a trial ran: versions, machine, commit of the code."""

import os
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

import gq_triton

__all__ = ["environment"]


@cache
def environment(device: torch.device) -> dict[str, Any]:
    """Return the versions, the machine and the commit that a record names."""
    gpu = {"gpu": torch.cuda.get_device_name()} if device.type == "cuda" else {}
    return {
        **gpu,
        "gq_triton": gq_triton.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def _commit() -> str | None:
    """Return the commit of the code, marked if files differ from it; None without a repository."""
    folder = Path(__file__).parent

    def git(*args: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *args],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
        return done.stdout.strip()

    try:
        if git("ls-files", Path(__file__).name) == "":
            return None  # the package lies inside another repository
        return git("rev-parse", "HEAD") + (
            "-changed" if git("status", "--porcelain", "-uno") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return None
