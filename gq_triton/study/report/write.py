"""The command ``gq-triton study report``: the page, the tables and the pictures of a study."""

import base64
import math
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

from gq_triton.commands.files import whole_file
from gq_triton.commands.refusal import Refusal
from gq_triton.study.design.config import StudyConfig
from gq_triton.study.design.controls import CONTROLS
from gq_triton.study.design.protocol import cells, progress
from gq_triton.study.design.study_file import command_line, write_toml
from gq_triton.study.report import figures
from gq_triton.study.report.page import PAGE
from gq_triton.study.report.results import Group, collect, results_csv, timing_csv
from gq_triton.study.report.statistics import interval, median_interval
from gq_triton.study.report.verdict import Finding, findings, lacking, task_verdict
from gq_triton.study.run.board import clock
from gq_triton.study.run.records import Store
from gq_triton.tasks import StudyTask

__all__ = ["write_report"]


def write_report(config: StudyConfig, folder: Path) -> list[str]:
    """Write ``report.html``, ``results.csv``, ``timing.csv`` and the pictures of a study.

    Args:
        config: options of the study.
        folder: folder of the study.

    Returns:
        Lines for the terminal: the verdicts, and the path of the page.

    Raises:
        Refusal: no trial is finished. Nothing is written then.
    """
    store = Store(folder)
    damaged = store.load()
    every = cells(config)
    finished, total = progress(every, store)
    if not finished:
        raise Refusal(
            f"{store.folder} holds no finished trial of this study: there is nothing to report, "
            "and nothing was written"
        )
    groups = collect(every, store)
    lines, tasks = [], []
    for name in config.tasks:
        mine = [group for group in groups if group.cell.task == name]
        found = findings(mine, name)
        pictures = _pictures(mine, found, name, config)
        for title, content in pictures.items():
            _write(folder / f"{title}.png", content)
        tasks.append(_task(name, config.entry(name), mine, found, pictures))
        lines += [f"{name}: {arm} {text}" for arm, text, _ in tasks[-1]["verdict"]]
    environment = _environment(groups)
    page = _render(
        config=config,
        arms=config.arms,
        finished=finished,
        total=total,
        notes=_notes(config, environment, damaged, finished, total) + _flat(groups),
        tasks=tasks,
        controls=[(name, CONTROLS[name].text) for name in config.controls],
        toml=write_toml(config),
        command=command_line(config, str(folder)),
        dates=_dates(groups),
        version=_version(environment),
        environment=[(name, ", ".join(values)) for name, values in environment.items()],
    )
    _write(folder / "results.csv", results_csv(groups).encode())
    _write(folder / "timing.csv", timing_csv(groups).encode())
    _write(folder / "report.html", page.encode())
    return [*lines, f"{finished} of {total} trials; {folder / 'report.html'}"]


def _write(path: Path, content: bytes) -> None:
    with whole_file(path) as file:
        file.write(content)


def _render(**values: Any) -> str:
    from jinja2 import Environment, StrictUndefined

    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(PAGE)
    return template.render(**values)


def _pictures(
    groups: Sequence[Group], found: Sequence[Finding], task: str, config: StudyConfig
) -> dict[str, bytes]:
    """Return the pictures of a task, by file name without its ending."""
    if not groups:
        return {}
    name = task.replace(":", "-")  # in names of files
    drawn = {
        f"{name}-scores": figures.scores(groups, task),
        f"{name}-steps": figures.steps_to_target(groups, task, config.target(task)),
    }
    if config.command and not any(math.isfinite(s) for group in groups for s in group.steps):
        del drawn[f"{name}-steps"]  # the command says no steps to a target
    for arm in dict.fromkeys(finding.group.cell.arm.name for finding in found if finding.against):
        drawn[f"{name}-{arm}-controls"] = figures.forest(
            [finding for finding in found if finding.against], task, arm
        )
    weights = figures.weights(groups, task)
    return drawn if weights is None else drawn | {f"{name}-weights": weights}


_COLUMNS = (
    "arm", "batch", "K", "lr", "beta1", "warm-up", "rho", "L", "test score", "95 % interval",
    "median", "steps to target", "samples", "seconds", "diverged", "norm ratio",
    "edge of the space",
)  # fmt: skip
_PAIR_COLUMNS = (
    "arm", "batch", "against", "mean difference", "95 % interval", "interval of the verdict",
    "median", "better on", "worse on",
)  # fmt: skip


def _task(
    name: str,
    entry: StudyTask,
    groups: Sequence[Group],
    found: Sequence[Finding],
    pictures: dict[str, bytes],
) -> dict[str, Any]:
    return {
        "name": name,
        "text": entry.text,
        "score": entry.shown,
        "better": "higher" if entry.higher else "lower",
        "verdict": task_verdict(found),
        "pictures": [
            {"title": title, "data": base64.b64encode(content).decode()}
            for title, content in pictures.items()
        ],
        "columns": _COLUMNS,
        "rows": [_row(group) for group in groups],
        "pair_columns": _PAIR_COLUMNS,
        "pairs": [row for finding in found for row in _pair_rows(finding)],
    }


def _row(group: Group) -> list[str]:
    trial, choice = group.records[0].trial, group.choice
    law = trial.law if trial.law.kind != "none" else None
    low, high = interval(group.scores)
    ratios = [r.result["norm_ratio"] for r in group.records if r.result["norm_ratio"] is not None]
    steps = median_interval(group.steps)[0]
    seconds = median_interval(group.seconds)[0]
    return [
        group.label,
        str(trial.batch_size),
        "" if law is None else str(law.n_clusters or 1),
        f"{trial.lr:.4g}",
        f"{trial.beta1:g}",
        f"{trial.warmup:.3g}",
        f"{law.rho:.3g}" if law and law.weighted else "",
        "" if law is None else str(law.queue_length),
        f"{sum(group.scores) / len(group.scores):.4f}",
        f"{low:.4f} to {high:.4f}",
        f"{median(group.scores):.4f}",
        f"{steps:.0f}" if math.isfinite(steps) else "not reached",
        f"{steps * trial.batch_size:.0f}" if math.isfinite(steps) else "",
        clock(seconds) if seconds >= 10 and math.isfinite(seconds) else _seconds(seconds),
        f"{group.diverged} of {len(group.records)}" if group.diverged else "",
        f"{sum(ratios) / len(ratios):.3f}" if ratios else "",
        "" if group.control else ", ".join(choice.edges),
    ]


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if math.isfinite(seconds) else ""


def _pair_rows(finding: Finding) -> list[list[str]]:
    cell = finding.group.cell
    return [
        [
            cell.arm.name,
            str(cell.batch_size),
            name + (" (same runs)" if name in finding.pairs else ""),
            f"{c.mean:+.4f}",
            f"{c.low:+.4f} to {c.high:+.4f}",
            f"{c.sure_low:+.4f} to {c.sure_high:+.4f}",
            f"{c.median:+.4f}",
            f"{c.wins} of {c.n}",
            f"{c.losses} of {c.n}",
        ]
        for name, c in finding.against.items()
    ]


def _environment(groups: Sequence[Group]) -> dict[str, list[str]]:
    """Return all values that the records name for each fact about where they ran."""
    found: dict[str, dict[str, None]] = {}
    for group in groups:
        for record in group.records:
            for name, value in record.environment.items():
                found.setdefault(name, {})[str(value)] = None
    return {name: sorted(values) for name, values in found.items()}


def _dates(groups: Sequence[Group]) -> str:
    """Return a sentence that says when the page was written and when its trials finished."""
    times = [r.timing["finished"] for g in groups for r in g.records if "finished" in r.timing]
    shown = [f"{datetime.fromisoformat(time):%Y-%m-%d %H:%M}" for time in sorted(times)]
    ran = f"trials finished {shown[0]} to {shown[-1]}" if shown else "its trials carry no date"
    return f"Page written {datetime.now(timezone.utc):%Y-%m-%d %H:%M}, {ran} (UTC)."


def _version(environment: dict[str, list[str]]) -> str:
    """Return a sentence that says which version of this package the trials ran."""
    found = environment.get("gq_triton", [])
    return f"They ran gq_triton {', '.join(found)}." if found else ""


def _flat(groups: Sequence[Group]) -> list[str]:
    """Return a note for each batch size at which all runs of all arms have one score."""
    found: dict[tuple[str, int], set[float]] = {}
    for group in groups:
        cell = group.cell
        found.setdefault((cell.task, cell.batch_size), set()).update(group.scores)
    return [
        f"{task} at batch {size}: every run scored {scores.pop():.4g}, so this tells no arm from "
        "another; more steps or other learning rates may."
        for (task, size), scores in found.items()
        if len(scores) == 1
    ]


def _notes(
    config: StudyConfig, environment: dict[str, list[str]], damaged: int, finished: int, total: int
) -> list[str]:
    """Return what a reader must know before the verdicts."""
    notes = []
    if finished < total:
        notes.append("The study is not finished: only arms whose runs are all there are shown.")
    absent = lacking(config)
    if absent:
        notes.append(f"No verdicts: the study has {' and '.join(absent)} that a verdict needs.")
    if len(config.beta1) == 1:
        notes.append(
            "beta1 (with SGD the momentum) was not tuned, nor was the baselines': a gain may be no "
            "more than a smaller beta1 gives."
        )
    if config.tuning_seeds < 3:
        notes.append("Settings were chosen by one or two seeds: a lucky run may have decided.")
    mixed = [name for name, values in environment.items() if len(values) > 1]
    if mixed:
        notes.append(f"The records differ in {', '.join(mixed)}: they may not be comparable.")
    if damaged:
        notes.append(f"{damaged} files among the records could not be read.")
    return notes
