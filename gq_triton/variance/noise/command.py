"""The command ``gq-triton noise``: how noisy the gradients of a task, or of a script, are."""

import argparse
import csv
import io
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from gq_triton.commands.files import check_folder, whole_file
from gq_triton.commands.refusal import Parser, Refusal
from gq_triton.extras import how_to_install
from gq_triton.tasks import STUDY_TASKS, MissingData, sample_losses
from gq_triton.variance.noise.meter import NoiseScale
from gq_triton.variance.noise.picture import draw
from gq_triton.variance.noise.predict import CONSTANT
from gq_triton.variance.noise.script import run_script
from gq_triton.variance.noise.window import ratio

__all__ = ["main"]

_ABOUT = """\
Measure how noisy gradients are while a model trains, and say which batch size that predicts to be
worth its samples. --task trains one of the tasks below. --script runs a training script of your
own, in this process and with the arguments after its name, which must come last; the model is the
first module that it calls with gradients, or the first of class --model. Under torchrun: torchrun
[...] -m gq_triton.commands.cli noise --script train.py. Written to --out: noise.txt (the table),
noise.csv (a row per measurement) and noise.png.
"""


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit status.

    Args:
        argv: the words after ``gq-triton noise``.
    """
    try:
        given = _read(argv)
        if given.script is not None:
            return _run_script(given)
        return _run_task(given)
    except (Refusal, MissingData) as reason:
        sys.stderr.write(f"gq-triton noise: {reason}\n")
        return 2


def _parser() -> Parser:
    tasks = "\n".join(f"  {name:16} {task.text}" for name, task in STUDY_TASKS.items())
    parser = Parser(
        prog="gq-triton noise",
        description=_ABOUT,
        epilog=f"tasks:\n{tasks}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--task", choices=[*STUDY_TASKS], metavar="NAME", help="train this task")
    what.add_argument(
        "--script", nargs=argparse.REMAINDER, metavar="FILE",
        help="run this script with the arguments that follow",
    )  # fmt: skip
    parser.add_argument("--model", metavar="CLASS", help="class of the script's model")
    parser.add_argument(
        "--out", type=Path, default=Path("noise"), metavar="DIR", help="folder (default: noise)"
    )
    counts = {
        "--every": (None, "one of so many forward passes is measured (default: 1; scripts: 10)"),
        "--clusters": (8, "groups per batch (default: 8)"),
        "--window": (50, "measurements in the table (default: 50)"),
        "--steps": (300, "steps of the task (default: 300)"),
        "--batch-size": (64, "samples per batch of the task (default: 64)"),
    }
    for name, (default, text) in counts.items():
        parser.add_argument(name, type=_count, default=default, metavar="N", help=text)
    parser.add_argument(
        "--lr", type=_rate, default=1e-3, help="learning rate of the task (default: 0.001)"
    )
    parser.add_argument(
        "--optimizer", choices=["adamw", "sgdm"], default="adamw",
        help="AdamW, or SGD with momentum 0.9 (default: adamw)",
    )  # fmt: skip
    parser.add_argument(
        "--features", nargs="?", const="", metavar="LAYER",
        help="measure F of clusters of this layer's outputs; without LAYER that of the task",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed (default: 0)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of the task's files")
    return parser


def _count(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if not 1 <= value <= 10**9:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text!r}")
    return value


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number > 0, got {text!r}")
    return value


def _read(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options, of which each was checked before any work."""
    given = _parser().parse_args(argv)
    if find_spec("matplotlib") is None:
        raise Refusal(f"the picture needs matplotlib: {how_to_install('train')}")
    if not 0 <= given.seed < 2**31:
        raise Refusal(f"--seed must be from 0 to 2**31 - 1, got {given.seed}")
    check_folder(given.out)
    if given.script is not None:
        if not given.script:
            raise Refusal("--script needs a file: gq-triton noise --script train.py")
        if not Path(given.script[0]).is_file():
            raise Refusal(f"--script needs a file, and there is no {given.script[0]}")
        if given.features == "":
            raise Refusal("--features needs the name of a layer where --script is given")
    elif given.model is not None:
        raise Refusal("--model is the class of a script's model: a task has one model")
    return given


def _run_task(given: argparse.Namespace) -> int:
    entry = STUDY_TASKS[given.task]
    if given.clusters < 2:
        raise Refusal("--clusters must be at least 2 in one process, got 1")
    try:
        task = entry.load(given.seed, given.data)
    except ModuleNotFoundError as absent:
        raise Refusal(f"{given.task} needs {absent.name}: {how_to_install('train')}") from absent
    inputs, labels = task.train
    if not 2 <= given.batch_size <= len(labels):
        raise Refusal(
            f"--batch-size must be from 2 to the {len(labels)} samples of {given.task}, got "
            f"{given.batch_size}"
        )
    torch.set_num_threads(1)  # more gain nothing on models this small
    torch.manual_seed(given.seed)
    model = task.model()
    params = model.parameters()
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(params, lr=given.lr)
        if given.optimizer == "adamw"
        else torch.optim.SGD(params, lr=given.lr, momentum=0.9)
    )
    features = task.features if given.features == "" else given.features
    meter = _meter(given, model, given.every or 1, features=features, optimizer=optimizer)
    order = task.order(len(labels), given.batch_size, given.seed)
    with _progress(given.steps) as advance:
        for step in range(1, given.steps + 1):
            chosen = next(order)
            loss = sample_losses(model(inputs[chosen]), labels[chosen]).mean()
            if not math.isfinite(value := loss.item()):
                raise Refusal(f"the loss is {value} at step {step}: take a smaller --lr")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            advance(value)
    title = (
        f"{given.task}, {given.optimizer}, learning rate {given.lr:g}, batch {given.batch_size}, "
        f"{given.steps} steps"
    )
    return _write(given.out, title, meter)


def _meter(given: argparse.Namespace, model: Any, every: int, **options: Any) -> NoiseScale:
    try:
        return NoiseScale(model, every, clusters=given.clusters, window=given.window,
                          seed=given.seed, **options)  # fmt: skip
    except ValueError as reason:
        raise Refusal(reason) from reason


def _run_script(given: argparse.Namespace) -> int:
    script, *arguments = given.script

    def meter_of(model: Any) -> NoiseScale:
        return _meter(given, model, given.every or 10, features=given.features)

    meter, ended = run_script(Path(script), arguments, given.model, meter_of)
    code = 0
    if isinstance(ended, SystemExit):
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    elif isinstance(ended, Refusal):
        raise ended
    if meter is None:
        if isinstance(ended, Exception):
            raise ended
        which = "called no model with gradients" if given.model is None else (
            f"called no model of class {given.model} with gradients"
        )  # fmt: skip
        raise Refusal(f"{script} {which}, so there is nothing to measure")
    if int(os.environ.get("RANK", "0")) == 0:
        code = _write(given.out, Path(script).name, meter) or code
    if ended is not None and not isinstance(ended, SystemExit):
        raise ended
    return code


@contextmanager
def _progress(steps: int) -> Iterator[Any]:
    """Show how far the training is, where a terminal watches and rich is installed."""
    if not sys.stderr.isatty() or find_spec("rich") is None:
        yield lambda loss: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=steps)
        yield lambda loss: bar.update(task, advance=1, description=f"loss {loss:.4g}")


def _write(out: Path, title: str, meter: NoiseScale) -> int:
    """Print the table, write the files, and return the exit status."""
    report, history = meter.report(), meter.history
    text = f"{title}\n{report}\n{_overall(history)}"
    sys.stdout.write(text)
    if not report.steps:
        sys.stderr.write("gq-triton noise: no step was measured: take a smaller --every\n")
        return 1
    out.mkdir(parents=True, exist_ok=True)
    table = io.StringIO()
    rows = csv.DictWriter(table, fieldnames=list(history[0]), lineterminator="\n")
    rows.writeheader()
    rows.writerows(history)
    files = {
        "noise.txt": text.encode(),
        "noise.csv": table.getvalue().encode(),
        "noise.png": draw(title, history, report),
    }
    for name, content in files.items():
        with whole_file(out / name) as file:
            file.write(content)
    sys.stdout.write(f"written to {out}: {', '.join(files)}\n")
    return 0


def _overall(history: Sequence[Mapping[str, float]]) -> str:
    """Return a line with the noise scale of all measurements, where the window has not all."""
    found = ratio(*(torch.tensor([row[name] for row in history], dtype=torch.float64)
                    for name in ("variance", "signal")))  # fmt: skip
    if not history:
        return ""
    return (
        f"all {len(history)} measurements of the run: noise scale {found.value:.3g} samples, "
        f"{found.low:.3g} to {found.high:.3g}; critical batch of the whole run about "
        f"{CONSTANT * found.value:.3g}\n"
    )
