"""The command ``gq-triton bench``: results against the oracle first, then times."""

import argparse
import inspect
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from gq_triton.bench import clusters, hook, kmeans, optimizer
from gq_triton.bench.checks import CHECKS, Finding
from gq_triton.bench.hardware import where
from gq_triton.bench.picture import roofline
from gq_triton.bench.rank_checks import ranks_agree
from gq_triton.bench.ranks import end_ranks
from gq_triton.bench.record import as_csv, as_markdown, as_table
from gq_triton.bench.run import Run
from gq_triton.commands.files import check_folder, whole_file
from gq_triton.commands.refusal import Parser, Refusal
from gq_triton.extras import how_to_install

__all__ = ["main"]

_ABOUT = """\
Compare results with the oracle, then measure what Grad Queue costs on this machine: under eight
minutes. A wrong result ends the run before anything is timed. What is compared is timed in turns;
tables have medians and the 20 % and 80 % quantiles. Written to --out for each theme:
DATE_DEVICE_THEME.md and .csv, with the hardware and the versions, and a picture for the optimizers.
torchao, heavyball and opacus are measured where they are installed.
"""


class Theme(NamedTuple):
    """What is checked and measured, and seconds after which none of its cases begins.

    Where a theme is measured without others, it has more of them.
    """

    measure: Callable[[Run], None]
    checks: tuple[Callable[[torch.device], Iterator[Finding]], ...]
    seconds: float
    module: ModuleType


THEMES = {
    "kmeans": Theme(kmeans.measure, (CHECKS["kmeans"],), 10, kmeans),
    "fsdp2": Theme(hook.fsdp2, (partial(ranks_agree, wrap="fsdp"),), 42, hook),
    "hook": Theme(hook.hook, (partial(ranks_agree, wrap="ddp"),), 62, hook),
    "clusters": Theme(clusters.measure, (CHECKS["sums"], CHECKS["clusters"]), 190, clusters),
    "optimizer": Theme(optimizer.measure, (CHECKS["optimizers"],), 150, optimizer),
}


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit status.

    Args:
        argv: the words after ``gq-triton bench``.
    """
    try:
        given = _read(argv)
    except Refusal as reason:
        sys.stderr.write(f"gq-triton bench: {reason}\n")
        return 2
    device = torch.device(given.device)
    names = [name for name in THEMES if name in given.only]
    allowed = _allowed(THEMES)
    with _progress(allowed) as tell:
        try:
            what, problems = "wrong results, nothing was timed", _wrong(device, names, tell)
            if not problems:
                what, problems = "these cases failed", _measure(device, names, given, tell)
        except KeyboardInterrupt:
            sys.stderr.write("gq-triton bench: stopped; the files of finished themes are kept\n")
            return 130
        finally:
            end_ranks()
    if problems:
        sys.stderr.write("\n".join([f"{what}:", *problems]) + "\n")
    return int(bool(problems))


def _allowed(names: Iterable[str]) -> float:
    return sum(THEMES[name].seconds for name in names)


def _measure(
    device: torch.device,
    names: Sequence[str],
    given: argparse.Namespace,
    tell: Callable[[str], None],
) -> list[str]:
    """Measure the themes and write their files; return what failed."""
    failures, end = [], time.monotonic()
    more = _allowed(THEMES) / _allowed(names)  # a theme that is alone has the time of all
    for name in names:
        end += more * THEMES[name].seconds
        turns = 2 if given.quick else (9 if device.type == "cuda" else 5)
        run = Run(device, end - time.monotonic(), turns, given.quick, tell)
        THEMES[name].measure(run)
        _write(given.out, name, run)
        failures += run.failures
    return failures


def _parser() -> Parser:
    parser = Parser(
        prog="gq-triton bench",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"],
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="what is measured (default: cuda where there is a GPU)",
    )  # fmt: skip
    parser.add_argument(
        "--only", nargs="+", choices=THEMES, default=list(THEMES), metavar="THEME",
        help=f"themes: {', '.join(THEMES)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results"), metavar="DIR",
        help="folder (default: benchmarks/results)",
    )  # fmt: skip
    parser.add_argument(
        "--quick", action="store_true",
        help="tiny tensors and two turns, which show that it works; the figures say nothing",
    )  # fmt: skip
    return parser


def _read(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options, of which each was checked before any work."""
    given = _parser().parse_args(argv)
    packages = {"rich": "rich", "matplotlib": "matplotlib", "sklearn": "scikit-learn"}
    absent = [name for module, name in packages.items() if find_spec(module) is None]
    if absent:
        raise Refusal(f"benchmarks need {', '.join(absent)}: {how_to_install('train')}")
    if given.device == "cuda" and not torch.cuda.is_available():
        raise Refusal("--device cuda needs a GPU that torch can use, and there is none")
    check_folder(given.out)
    return given


def _wrong(device: torch.device, names: Sequence[str], tell: Callable[[str], None]) -> list[str]:
    """Return a sentence for every result that differs from the oracle's."""
    wrong = []
    for name in names:
        for check in THEMES[name].checks:
            tell(f"{name}: results against the oracle")
            for what, error, bound in check(device):
                if not error <= bound:
                    wrong.append(f"{what}: error {error:.3g}, at most {bound:.3g} is allowed")
    return wrong


@contextmanager
def _progress(allowed: float) -> Iterator[Callable[[str], None]]:
    """Show what is measured and how much of the time is gone; without a terminal a line each."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, highlight=False)
    columns = BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    begin = time.monotonic()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=allowed)

        def tell(text: str) -> None:
            gone = time.monotonic() - begin
            bar.update(task, completed=min(gone, allowed), description=text)
            if not console.is_terminal:
                console.print(f"{gone:4.0f} s  {text}", markup=False, soft_wrap=True)

        yield tell


def _write(out: Path, theme: str, run: Run) -> None:
    """Print the table of a theme, and write its files."""
    from rich.console import Console

    facts = where(run.device)
    title = ", ".join(f"{key} {value}" for key, value in facts.items() if key != "device")
    title = f"{theme}: {facts['device']}, {title}" + (" (--quick)" if run.small else "")
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200
    console.print(as_table(title, run.lines))
    name = f"{facts['date']}_{run.device.type}_{theme}"
    files: dict[str, Any] = {
        f"{name}.csv": as_csv(run.lines, facts).encode(),
        f"{name}.png": _picture(facts, run) if theme == "optimizer" else None,
    }
    text = [f"# {theme}", "", _facts(facts), "", inspect.getdoc(THEMES[theme].module) or "", "",
            f"`gq-triton bench --device {run.device.type} --only {theme}`", "",
            as_markdown(run.lines)]  # fmt: skip
    if files[f"{name}.png"]:
        text += [f"![roofline]({name}.png)", ""]
    files[f"{name}.md"] = "\n".join(text).encode()
    out.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        if content:
            with whole_file(out / file) as target:
                target.write(content)
    console.print(f"written to {out}: {', '.join(n for n, c in files.items() if c)}")


def _picture(facts: dict[str, str], run: Run) -> bytes | None:
    title = f"optimizer steps, {facts['device']}, torch {facts['torch']}, {facts['date']}"
    return roofline(title + (" (--quick)" if run.small else ""), run.lines)


def _facts(facts: dict[str, Any]) -> str:
    return "\n".join(f"- {key}: {value}" for key, value in facts.items())
