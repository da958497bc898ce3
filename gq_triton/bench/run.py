"""The lines of a run, and the time that it has left."""

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from gq_triton.bench.harness import Step, in_turns, seconds, spread, wait

__all__ = ["Line", "Run"]

Cell = float | int | str


@dataclass
class Line:
    """What one step of a case took.

    Attributes:
        part: the part of the run.
        case: what the steps of the case have in common.
        step: what was measured.
        unit: of ``median``, ``low`` and ``high``.
        median: the median over the turns.
        low: their 20 % quantile.
        high: their 80 % quantile.
        ratio: the median of the ratios, turn by turn, to the first step of the case.
        ratio_low: their 20 % quantile.
        ratio_high: their 80 % quantile.
        note: what a reader has to know.
        more: further columns of the part.
    """

    part: str
    case: str
    step: str = ""
    unit: str = ""
    median: Cell = ""
    low: Cell = ""
    high: Cell = ""
    ratio: Cell = ""
    ratio_low: Cell = ""
    ratio_high: Cell = ""
    note: str = ""
    more: dict[str, Cell] = field(default_factory=dict)


def _without_times(part: str, case: str, note: str) -> Line:
    """Return a line of a case that may name its step after a colon."""
    name, _, step = case.partition(": ")
    return Line(part, name, step, note=note)


class Run:
    """The lines of a run.

    Args:
        device: where everything runs.
        allowed: seconds after which no case begins.
        turns: turns of a comparison.
        small: whether tensors are tiny, which shows that the code works and no more.
        tell: is given the name of each case before it begins.

    Attributes:
        lines: what was measured so far.
        failures: what went wrong, in sentences.
    """

    def __init__(
        self,
        device: torch.device,
        allowed: float,
        turns: int,
        small: bool = False,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.device, self.turns, self.small = device, turns, small
        self.on_gpu = device.type == "cuda"
        self.lines: list[Line] = []
        self.failures: list[str] = []
        self._end, self._tell = time.monotonic() + allowed, tell

    @contextlib.contextmanager
    def case(self, part: str, case: str, seconds: float = 0.0) -> Iterator[bool]:
        """Yield whether there is time for a case; note what fails, and go on with the next one.

        Args:
            part: the part of the run.
            case: what is measured.
            seconds: an estimate of a long case, which does not begin where it would end too late.
        """
        begins = time.monotonic() + seconds < self._end
        if not begins:
            self.lines.append(_without_times(part, case, "left out: no time"))
        self._tell(f"{part}: {case}")
        try:
            yield begins
        except Exception as error:  # noqa: BLE001 - what fails must not hide the other cases
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            self.failures.append(f"{part}, {case}: {reason}")
            self.lines.append(_without_times(part, case, f"failed: {reason}"))
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def wait(self) -> None:
        """Wait until the device is idle."""
        wait(self.device)

    def taken(self, step: Step, calls: int = 1) -> float:
        """Return the milliseconds of one of some calls that are launched without waiting."""
        return 1000 * seconds(step, self.device, calls)

    def compare(
        self, part: str, case: str, steps: Mapping[str, Step], calls: int = 1, note: str = ""
    ) -> list[Line]:
        """Time steps in turns; return a line for each, the first of which is the base of ratios."""
        times = in_turns(list(steps.values()), self.turns, self.device, calls)
        found = {n: [1000 * t for t in taken] for n, taken in zip(steps, times, strict=True)}
        return self.note(part, case, "ms", found, note=note)

    def note(
        self,
        part: str,
        case: str,
        unit: str,
        values: Mapping[str, Sequence[float]],
        base: Sequence[float] | None = None,
        note: str = "",
    ) -> list[Line]:
        """Keep measurements; return a line for each step.

        Args:
            part: the part of the run.
            case: what the steps have in common.
            unit: of the values.
            values: the measurements of each step.
            base: what ratios are taken to: the first step's values by default. Where a step has
                another number of turns its ratios are those to the median of the base.
            note: what a reader has to know.
        """
        base = next(iter(values.values())) if base is None else base
        added = []
        for step, taken in values.items():
            others = base
            if len(base) != len(taken):
                others = [statistics.median(base)] * len(taken)
            ratios = [mine / other for mine, other in zip(taken, others, strict=True)]
            line = Line(part, case, step, unit, *spread(taken), *spread(ratios), note)
            added.append(line)
        self.lines += added
        return added
