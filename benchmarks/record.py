"""The lines of a run of ``gpu.py``: steps timed in turns, a table, a CSV with the hardware."""

import contextlib
import csv
import datetime
import gc
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import gq_triton

Step = Callable[[], Any]


@dataclass
class Line:
    """One comparison.

    Attributes:
        part: the part of the run.
        case: what was measured.
        unit: of ``ours`` and ``rival``.
        ours: the median of what is ours.
        rival: the median of what it is compared with.
        ratio: the median of the turns' ratios.
        low: their least.
        high: their greatest.
        note: what a reader has to know.
    """

    part: str
    case: str
    unit: str = ""
    ours: float | str = ""
    rival: float | str = ""
    ratio: float | str = ""
    low: float | str = ""
    high: float | str = ""
    note: str = ""


class Run:
    """The lines of a run, and the time that it has left.

    Attributes:
        device: where everything runs.
        small: whether this is the reduced form.
        lines: what was measured so far.
        failures: what went wrong, in sentences.
    """

    def __init__(self, device: torch.device, seconds: float, turns: int) -> None:
        self.device, self.small, self.turns = device, device.type == "cpu", turns
        self.lines: list[Line] = []
        self.failures: list[str] = []
        self._end = time.monotonic() + seconds

    @contextlib.contextmanager
    def case(self, part: str, case: str) -> Iterator[bool]:
        """Yield whether there is time for a case; note what fails, and go on with the next one."""
        begins = time.monotonic() < self._end
        if not begins:
            self.lines.append(Line(part, case, note="left out: no time"))
        try:
            yield begins
        except Exception as error:  # noqa: BLE001 - what fails must not hide the other cases
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            self.failures.append(f"{part}, {case}: {reason}")
            self.lines.append(Line(part, case, note=f"failed: {reason}"))
        gc.collect()
        if not self.small:
            torch.cuda.empty_cache()

    def wait(self) -> None:
        """Wait until the device is idle."""
        if not self.small:
            torch.cuda.synchronize()

    def taken(self, step: Step, calls: int) -> float:
        """Return the milliseconds of one of some calls that are launched without waiting."""
        self.wait()
        start = time.perf_counter()
        for _ in range(calls):
            step()
        self.wait()
        return 1000 * (time.perf_counter() - start) / calls

    def compare(
        self, part: str, case: str, ours: Step, rival: Step, calls: int = 1, note: str = ""
    ) -> Line:
        """Time two steps in turns; return the line."""
        times = [[self.taken(step, calls) for step in (ours, rival)] for _ in range(self.turns)]
        return self.note(part, case, "ms", *zip(*times, strict=True), note=note)

    def note(self, part: str, case: str, unit: str, ours: Any, rival: Any, note: str = "") -> Line:
        """Keep the measurements ``ours`` and ``rival`` of as many turns; return their line."""
        ratios = [a / b for a, b in zip(ours, rival, strict=True)]
        mine, other, ratio = map(statistics.median, (ours, rival, ratios))
        line = Line(part, case, unit, mine, other, ratio, min(ratios), max(ratios), note)
        self.lines.append(line)
        return line


def where(device: torch.device) -> dict[str, str]:
    """Return the hardware, the driver and the versions."""
    name, driver = platform.processor() or platform.machine(), "none"
    if device.type == "cuda":
        name, driver = torch.cuda.get_device_name(device), "unknown"
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout
            driver = lines.splitlines()[0].strip()
    versions = {"torch": torch.__version__, "gq_triton": gq_triton.__version__}
    versions["triton"] = getattr(sys.modules.get("triton"), "__version__", "not used")
    date = str(datetime.date.today())
    python = platform.python_version()
    return {"device": name, "driver": driver, "python": python, **versions, "date": date}


def cell(value: float | str) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def show(run: Run, file: str | None) -> None:
    """Print the table; write the CSV."""
    facts = where(run.device)
    title = ", ".join(f"{key} {value}" for key, value in facts.items())
    names = list(Line.__dataclass_fields__)
    table = Table(*names, title=title + (", reduced form" if run.small else ""))
    for line in run.lines:
        table.add_row(*(cell(getattr(line, name)) for name in names))
    Console().print(table)
    if file is not None:
        with open(file, "w", newline="") as target:
            writer = csv.writer(target)
            writer.writerow([*names, *facts])
            writer.writerows(
                [[getattr(e, n) for n in names] + [*facts.values()] for e in run.lines]
            )
