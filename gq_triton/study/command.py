"""The commands ``gq-triton study run``, ``report`` and ``fetch``."""

import argparse
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gq_triton.commands.refusal import Parser, Refusal
from gq_triton.extras import how_to_install
from gq_triton.study.design.arms import ARMS
from gq_triton.study.design.config import StudyConfig
from gq_triton.study.design.controls import CONTROLS
from gq_triton.study.design.protocol import cells, progress
from gq_triton.study.design.study_file import CONFIG, read_toml
from gq_triton.study.run.device import check_device
from gq_triton.study.run.records import Store
from gq_triton.tasks import STUDY_TASKS, MissingData, study_task
from gq_triton.tasks.fetch import SOURCES, fetch
from gq_triton.tasks.own import check_own_task

__all__ = ["main"]

_RUN = """\
Compare ways to train over a ladder of batch sizes. Every arm gets the same number of tuning trials
at every batch size. Its best settings run on fresh seeds, the same for all arms. Each Grad Queue
arm is also compared with controls at its own settings. The same command again continues where the
study stopped, also after Ctrl-C or a kill, which lose at most the trials under way. The next
command is `gq-triton study report DIR`.
"""


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit status.

    Args:
        argv: the words after ``gq-triton study``.
    """
    try:
        given = _parser().parse_args(argv)
        _check_extra()
        return given.function(given)
    except (Refusal, MissingData) as reason:
        sys.stderr.write(f"gq-triton study: {reason}\n")
        return 2


def _parser() -> Parser:
    parser = Parser(prog="gq-triton study", description="Large-batch scaling studies.")
    commands = parser.add_subparsers(required=True, metavar="run | report | fetch")
    _add_run(commands)
    _add_report(commands)
    _add_fetch(commands)
    return parser


def _check_extra() -> None:
    packages = {"rich": "rich", "matplotlib": "matplotlib", "scipy": "scipy",
                "sklearn": "scikit-learn", "numpy": "numpy", "jinja2": "jinja2",
                "distributed": "distributed"}  # fmt: skip
    absent = [name for module, name in packages.items() if find_spec(module) is None]
    if absent:
        raise Refusal(f"studies need {', '.join(absent)}: {how_to_install('study')}")


def _add_run(commands: Any) -> None:
    run = commands.add_parser(
        "run",
        help="run or continue a study",
        description=_RUN,
        epilog=_lists(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.set_defaults(function=_run)
    run.add_argument(
        "--out", type=Path, required=True, metavar="DIR",
        help=f"folder of the study; one that holds a {CONFIG} is continued",
    )  # fmt: skip
    run.add_argument(
        "--config", type=Path, metavar="FILE",
        help=f"TOML with the options below, dashes or underscores in their names (a {CONFIG} is "
        "one); options on the command line go before it",
    )  # fmt: skip
    run.add_argument(
        "--jobs", type=int, default=1, metavar="N",
        help="trials at a time, each in a process with one thread (default: 1)",
    )  # fmt: skip
    run.add_argument(
        "--scheduler", metavar="ADDRESS",
        help="run the trials on the workers of a dask scheduler, such as tcp://10.0.0.1:8786, and "
        "not in --jobs processes of this machine; launch/ starts one under SLURM or Kubernetes",
    )  # fmt: skip
    run.add_argument(
        "--data", type=Path, metavar="DIR",
        help="folder with the files of the tasks of cifar10, mnist, fashion-mnist and reuters",
    )  # fmt: skip
    run.add_argument(
        "--track", choices=["tensorboard", "wandb"],
        help="give every result to TensorBoard (DIR/tensorboard) or W&B (project: DIR's name) too",
    )  # fmt: skip
    run.add_argument(
        "--dry-run", action="store_true",
        help="print the number of trials and a time estimate from short runs; write nothing",
    )  # fmt: skip
    study = run.add_argument_group("the study")
    for option in fields(StudyConfig):
        _add_option(study, option)


def _add_option(group: Any, option: Any) -> None:
    flag = "--target" if option.name == "targets" else "--" + option.name.replace("_", "-")
    kinds: dict[Any, dict[str, Any]] = {
        int: {"type": int, "metavar": "N"},
        str: {"type": str, "metavar": "NAME"},
        tuple[str, ...]: {"type": str, "nargs": "+", "metavar": "NAME"},
        tuple[int, ...]: {"type": int, "nargs": "+", "metavar": "N"},
        tuple[float, ...]: {"type": float, "nargs": "+", "metavar": "VALUE"},
        dict[str, float]: {"type": _target, "nargs": "+", "metavar": "TASK=VALUE"},
    }
    default = option.default
    shown = ""
    if option.type in (tuple[float, ...], tuple[int, ...]) and default:
        shown = f" (default: {' '.join(f'{value:g}' for value in default)})"
    elif option.name == "controls":
        shown = " (default: all)"
    elif isinstance(default, (int, str)):
        shown = f" (default: {default})"
    text = option.metadata["help"] + shown
    how = kinds[option.type]
    if option.name.startswith("lr") or option.name == "rho":
        how |= {"nargs": 2, "metavar": ("LOW", "HIGH")}
    names = [flag, "--task"] if option.name == "tasks" else [flag]
    group.add_argument(*names, dest=option.name, default=argparse.SUPPRESS, help=text, **how)


def _target(text: str) -> tuple[str, float]:
    task, separator, value = text.partition("=")
    try:
        return task, float(value)
    except ValueError:
        sign = "" if separator else ", with an = between"
        raise argparse.ArgumentTypeError(f"must be TASK=NUMBER{sign}, got {text!r}") from None


def _lists() -> str:
    """Return the text that lists all tasks, arms and controls."""

    def listed(title: str, entries: dict[str, str]) -> str:
        width = max(map(len, entries)) + 4
        lines = [
            textwrap.fill(
                text,
                width=100,
                initial_indent=f"  {name}".ljust(width),
                subsequent_indent=" " * width,
            )
            for name, text in entries.items()
        ]
        return "\n".join([title, *lines])

    tasks = {
        name: f"{task.text}; score: {task.score.replace('_', ' ')}, target {task.target:g}"
        for name, task in STUDY_TASKS.items()
    }
    arms = {name: arm.text for name, arm in ARMS.items()}
    controls = {name: control.text for name, control in CONTROLS.items()}
    parts = listed("tasks:", tasks), listed("arms:", arms), listed("controls:", controls)
    return "\n\n".join(parts)


def _config(given: argparse.Namespace) -> StudyConfig:
    values: dict[str, Any] = {}
    stored = given.out / CONFIG
    if given.config is not None:
        values = read_toml(given.config)
    elif stored.exists():
        values = read_toml(stored)
    values = {key.replace("-", "_"): value for key, value in values.items()}
    for option in fields(StudyConfig):
        if hasattr(given, option.name):
            value = getattr(given, option.name)
            values[option.name] = dict(value) if option.name == "targets" else value
    if values.get("controls") in ("none", ["none"], ("none",)):
        values["controls"] = []
    return StudyConfig.of(values)


def _run(given: argparse.Namespace) -> int:
    if given.jobs < 1:
        raise Refusal(f"--jobs must be at least 1, got {given.jobs}")
    out: Path = given.out
    _check_folder(out)
    config = _config(given)
    _check_runnable(config, given.data, given.scheduler)
    every = cells(config)
    if not every:
        raise Refusal("no arm makes sense for these tasks: text has no classes to weight")
    _warn_of_missing_baselines(config)
    store = Store(out)
    damaged = store.load()
    finished, total = progress(every, store)
    if given.dry_run:
        return _dry_run(every, total, finished, given)
    from gq_triton.study.run.tracker import tracker
    from gq_triton.study.run.watch import watch

    track = {} if given.track is None else {"track": tracker(given.track, out)}
    _make_folder(out)
    _announce_changes(config, out / CONFIG)
    return watch(
        every, store, out, jobs=given.jobs, data=given.data, damaged=damaged,
        scheduler=given.scheduler, **track,
    )  # fmt: skip


def _check_folder(out: Path) -> None:
    """Refuse a folder that is not empty and holds no study.

    A run that was killed before it wrote its ``study.toml`` may leave its lock, an unfinished file
    and an empty folder; such a folder counts as empty.

    Raises:
        Refusal: the folder holds something else, or is a file.
    """
    if not out.exists() or (out / CONFIG).exists():
        return
    if not out.is_dir():
        raise Refusal(f"--out {out} is a file: name a folder")
    left = {".lock", f"{CONFIG}.tmp"}
    strange = {path.name for path in out.iterdir()} - left
    if strange == {"trials"} and not any((out / "trials").iterdir()):
        return
    if strange:
        raise Refusal(
            f"--out {out} holds something else and no {CONFIG}: name a new or an empty folder"
        )


def _warn_of_missing_baselines(config: StudyConfig) -> None:
    for name in config.arms:
        baseline = ARMS[name].baseline
        if baseline is not None and baseline not in config.arms:
            sys.stderr.write(
                f"gq-triton study: {name} gets no verdict, since the study lacks {baseline}: "
                "add it to --arms\n"
            )


def _announce_changes(config: StudyConfig, stored: Path) -> None:
    """Print how a study differs from the one in the folder, whose options it replaces."""
    if not stored.exists():
        return
    before, now = StudyConfig.of(read_toml(stored)).to_dict(), config.to_dict()
    for name in (name for name in now if now[name] != before[name]):
        was, is_now = _shown(before[name]), _shown(now[name])
        sys.stderr.write(
            f"gq-triton study: {name.replace('_', '-')} was {was} in {stored} and is now {is_now}; "
            "finished trials are kept, those that no longer belong are not reported\n"
        )


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


def _check_runnable(config: StudyConfig, data: Path | None, scheduler: str | None) -> None:
    """Refuse a study that cannot run here, before anything is written.

    Raises:
        Refusal: there are too few GPUs, or a batch is larger than a task's training data.
        MissingData: the files of a task are not there.
    """
    if scheduler is None:  # the workers elsewhere say what they have
        check_device(config.device, config.nproc_per_trial)
    for name in config.tasks:
        if config.command:
            continue
        if ":" in name:
            check_own_task(name)
        samples = len(study_task(name).load(0, data).train[1])
        if max(config.batch_sizes) > samples:
            raise Refusal(
                f"--batch-sizes: {max(config.batch_sizes)} is more than the {samples} training "
                f"samples of {name}"
            )


def _dry_run(every: list[Any], total: int, finished: int, given: argparse.Namespace) -> int:
    from gq_triton.study.run.board import clock
    from gq_triton.study.run.estimate import estimate_seconds

    seconds, runs = estimate_seconds(every, total - finished, given.jobs, given.data)
    sys.stdout.write(
        f"{total} trials, {finished} of them finished; about {clock(seconds)} with --jobs "
        f"{given.jobs} (measured from {runs} runs on this machine)\n"
    )
    return 0


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "trials").mkdir(exist_ok=True)
    except OSError as error:
        raise Refusal(f"--out {out} cannot be written to: {error.strerror}") from error


def _add_report(commands: Any) -> None:
    report = commands.add_parser(
        "report",
        help="write report.html, results.csv and the pictures of a study",
        description="Write DIR/report.html (one file, opens offline), DIR/results.csv (a row per "
        "task, arm, batch size and seed), DIR/timing.csv and DIR/*.png. A study under way can be "
        "reported too.",
    )
    report.set_defaults(function=_report)
    report.add_argument("folder", type=Path, metavar="DIR", help="folder of the study")


def _report(given: argparse.Namespace) -> int:
    from gq_triton.study.report.write import write_report

    if not (given.folder / CONFIG).exists():
        raise Refusal(f"{given.folder} holds no study: it has no {CONFIG}")
    config = StudyConfig.of(read_toml(given.folder / CONFIG))
    lines = write_report(config, given.folder)
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _add_fetch(commands: Any) -> None:
    parser = commands.add_parser(
        "fetch",
        help=f"fetch the files of {', '.join(SOURCES)}",
        description="Fetch the files of a task, check them against known SHA-256 sums and put them "
        "where `gq-triton study run --data DIR` finds them. What is there already is only checked.",
    )
    parser.set_defaults(function=_fetch)
    sizes = ", ".join(f"{name} ({source.size})" for name, source in SOURCES.items())
    parser.add_argument("task", choices=list(SOURCES), metavar="TASK", help=sizes)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="where to put them")


def _fetch(given: argparse.Namespace) -> int:
    if find_spec("pooch") is None:
        raise Refusal(f"fetching needs pooch: {how_to_install('data')}")
    folder = fetch(given.task, given.data)
    sys.stdout.write(
        f"{given.task} is in {folder}; now: gq-triton study run --data {given.data} ...\n"
    )
    return 0
