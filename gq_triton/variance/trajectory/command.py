"""The command ``gq-triton variance``."""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from gq_triton.commands.files import alone, whole_file
from gq_triton.commands.refusal import Parser, Refusal
from gq_triton.extras import how_to_install
from gq_triton.study.run.device import check_device, take_device
from gq_triton.study.trials.environment import environment
from gq_triton.tasks import MissingData
from gq_triton.variance.trajectory.plan import PRESETS, RANDOM_FEATURES, Plan, Trajectory, flag
from gq_triton.variance.trajectory.records import Records
from gq_triton.variance.trajectory.train import Training, load_task

__all__ = ["main"]

_ABOUT = """\
Train with plain SGD and log along the way how far the gradients of five estimators scatter: SG-B
(uniform batches of B), SG-2B, SVRG, GC (one sample of each of B clusters in gradient space) and IS
(importance sampling, 3 B samples scored). None of them drives the training, and measuring does not
disturb it. Written to --out: results.csv (all figures), summary.txt (means over the last 70 % of
the steps), a picture per setting in curves/ and, for several --ratios, overparametrisation.png. The
same command again continues where it stopped, also after Ctrl-C or a kill; options below go before
the preset's.
"""
INTERRUPTED = 130  # exit status after Ctrl-C


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit status.

    Args:
        argv: the words after ``gq-triton variance``.
    """
    try:
        given = _parser().parse_args(argv)
        plan = _plan(given)
        records = Records(given.out)
        groups = _checked(plan, given.data, records)
        records.make()
        with alone(given.out, "command"):
            return _run(plan, groups, records, given)
    except (Refusal, MissingData) as reason:
        sys.stderr.write(f"gq-triton variance: {reason}\n")
        return 2


def _parser() -> Parser:
    presets = "\n".join(f"  {name:18} {text}" for name, (_, text) in PRESETS.items())
    parser = Parser(
        prog="gq-triton variance",
        description=_ABOUT,
        epilog=f"presets:\n{presets}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("preset", choices=[*PRESETS], metavar="PRESET", help="one of those below")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR",
        help="folder of the results; one with unfinished ones is continued",
    )  # fmt: skip
    parser.add_argument(
        "--data", type=Path, metavar="DIR",
        help="folder with the files of cifar10, mnist or fashion-mnist",
    )  # fmt: skip
    for option in fields(Plan):
        default: Any = option.default
        many = isinstance(default, tuple)
        kind = type(default) if not many else type(default[0]) if default else int
        how: dict[str, Any] = {"type": kind, "metavar": "NAME" if kind is str else "N"}
        if many:
            how["nargs"] = 2 if option.name == "appended" else "*"
        parser.add_argument(
            flag(option.name), default=argparse.SUPPRESS, help=option.metadata["help"], **how
        )
    return parser


def _plan(given: argparse.Namespace) -> Plan:
    plan, _ = PRESETS[given.preset]
    values = {
        option.name: tuple(value) if isinstance(value, list) else value
        for option in fields(Plan)
        if (value := getattr(given, option.name, None)) is not None
    }
    for name, value in values.items():
        if value == () and name != "drops":
            raise Refusal(f"{flag(name)} needs at least one value")
    task = values.get("task", plan.task)
    if plan.task == RANDOM_FEATURES and task != RANDOM_FEATURES:
        plain = Plan()  # the grid of random features means nothing to another task
        plan = replace(plan, **{n: getattr(plain, n) for n in ("ratios", "inputs", "teacher")})
    return replace(plan, **values)


def _checked(plan: Plan, data: Path | None, records: Records) -> list[list[Trajectory]]:
    """Return the trajectories by setting, or refuse them before any work.

    Raises:
        Refusal: an option, a package, the device or the folder is not as it must be.
        MissingData: the files of the task are not there.
    """
    plan.check()
    absent = [name for name in ("rich", "matplotlib") if find_spec(name) is None]
    if absent:
        raise Refusal(f"this command needs {' and '.join(absent)}: {how_to_install('train')}")
    check_device(plan.device, 1)
    records.check()
    groups = list(plan.groups())
    if plan.task == RANDOM_FEATURES:
        samples = min(group[0].samples for group in groups)
    else:
        try:
            task = load_task(groups[0][0], data)
        except ModuleNotFoundError as gone:
            raise Refusal(f"{plan.task} needs {gone.name}: {how_to_install('train')}") from gone
        samples = len(task.train[1])
        try:
            Training(groups[0][0], task)
        except (TypeError, ValueError) as reason:
            raise Refusal(f"{plan.task} cannot be measured: {reason}") from reason
    if plan.batch_size > samples:
        raise Refusal(
            f"--batch-size must be at most the {samples} training samples, got {plan.batch_size}"
        )
    return groups


def _run(
    plan: Plan, groups: list[list[Trajectory]], records: Records, given: argparse.Namespace
) -> int:
    from gq_triton.variance.trajectory.board import Board

    take_device(plan.device, 0)
    every = [trajectory for group in groups for trajectory in group]
    missing = [one for one in every if records.get(one) is None]
    finished = len(every) - len(missing)
    board = Board(len(every), plan.steps, finished)
    if finished:
        board.note(f"{finished} of {len(every)} trajectories were finished before")
    try:
        with board:
            for trajectory in missing:
                name = f"{trajectory.name(plan)}, seed {trajectory.seed}"
                board.begin(name)
                training = Training(trajectory, load_task(trajectory, given.data))
                state = records.state(trajectory)
                if state.exists() and not training.load(state):
                    board.note(f"{state} cannot be read: {name} starts anew")
                training.run(state, board.advance)
                if training.diverged_at is not None:
                    board.note(f"{name}: the loss is not finite at step {training.diverged_at}")
                where = environment(torch.device(plan.device))
                record = {"diverged_at": training.diverged_at, "rows": training.rows}
                records.add(trajectory, {**record, "environment": where})
                board.end()
    except KeyboardInterrupt:
        board.note("stopped; what is finished is kept, and the same command continues")
        return INTERRUPTED
    lines = _report(plan, groups, records, given.out)
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _report(plan: Plan, groups: list[list[Trajectory]], records: Records, out: Path) -> list[str]:
    """Write tables and pictures; return the lines for the terminal."""
    from gq_triton.variance.trajectory.figures import curves, overparametrisation
    from gq_triton.variance.trajectory.results import Group, results_csv, summary

    found = []
    for group in groups:
        own = [record for one in group if (record := records.get(one)) is not None]
        found.append(Group(group[0].name(plan), group, own))
    lines = ["Mean over the last 70 % of the steps and over seeds:", *summary(found)]
    files = {
        "results.csv": results_csv(found),
        "summary.txt": ("\n".join(lines) + "\n").encode(),
        **{f"curves/{_file_name(group.name)}.png": curves(group) for group in found},
    }
    if len(plan.ratios) > 1:
        files["overparametrisation.png"] = overparametrisation(found)
    (out / "curves").mkdir(exist_ok=True)
    for name, content in files.items():
        with whole_file(out / name) as file:
            file.write(content)
    return [*lines, f"written to {out}: results.csv, summary.txt and {len(files) - 2} pictures"]


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name.replace("hs/N", "ratio"))
