"""The hardware, the driver and the versions of a run."""

import contextlib
import datetime
import os
import platform
import subprocess
import sys

import torch

import gq_triton

__all__ = ["processor", "where"]


def processor() -> str:
    """Return the processor's name."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(": ")[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def where(device: torch.device) -> dict[str, str]:
    """Return the facts about a run on a device that its readers need."""
    facts = {"device": f"{processor()}, {os.cpu_count()} cores"}
    if device.type == "cuda":
        facts = {"device": torch.cuda.get_device_name(device), "driver": _driver()}
    facts |= {"threads": str(torch.get_num_threads()), "python": platform.python_version()}
    facts |= {"torch": torch.__version__, "gq_triton": gq_triton.__version__}
    for name in ("triton", "numba"):  # those that something has used
        if name in sys.modules:
            facts[name] = sys.modules[name].__version__
    return facts | {"date": str(datetime.datetime.now(datetime.timezone.utc).date())}


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError, IndexError):
        said = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        return said.splitlines()[0].strip()
    return "unknown"
