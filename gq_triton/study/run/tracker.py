"""The results of a study's trials in TensorBoard or W&B, beside the records."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gq_triton.commands.refusal import Refusal
from gq_triton.study.design.trial import Record, Trial

__all__ = ["TRACKERS", "tracker"]


def _name(trial: Trial) -> str:
    law = "" if trial.law.kind == "none" else f"-{trial.law.kind}{trial.law.n_clusters or 1}"
    arm = f"{trial.task}/{trial.base}{law}"
    return f"{arm}-batch{trial.batch_size}-seed{trial.seed}-{trial.key[:8]}"


def _tensorboard(folder: Path) -> Callable[[Record], None]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise Refusal("--track tensorboard needs it: pip install tensorboard") from error

    def log(record: Record) -> None:
        writer = SummaryWriter(str(folder / "tensorboard" / _name(record.trial)))
        for name, value, step in _values(record):
            writer.add_scalar(name, value, step)
        writer.close()

    return log


def _wandb(folder: Path) -> Callable[[Record], None]:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise Refusal("--track wandb needs it: pip install wandb") from error

    def log(record: Record) -> None:
        trial = record.trial
        run = wandb.init(
            project=folder.resolve().name, id=trial.key, name=_name(trial), config=asdict(trial)
        )
        steps: dict[int, dict[str, float]] = {}
        for name, value, step in _values(record):
            steps.setdefault(step, {})[name] = value
        for step in sorted(steps):
            run.log(steps[step], step=step)
        run.finish()

    return log


def _values(record: Record) -> list[tuple[str, float, int]]:
    """Return names, values and steps of what a record knows."""
    result, last = record.result, record.trial.steps
    found: list[tuple[str, Any, int]] = [
        (name, value, step)
        for name, values in {"training loss": result["losses"], **result["series"]}.items()
        for step, value in enumerate(values, 1)
    ]
    for look in result["curve"]:
        found.append(("validation score", look["score"], look["step"]))
        found.append(("validation loss", look["loss"], look["step"]))
    found.append(("final validation score", result["validation_score"], last))
    if result["score"] is not None:
        found.append(("test score", result["score"], last))
    return found


TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb}


def tracker(name: str, folder: Path) -> Callable[[Record], None]:
    """Return a function that gives a record to a tracker.

    Args:
        name: a key of ``TRACKERS``.
        folder: folder of the study. TensorBoard's files go to its folder ``tensorboard``; the
            project at W&B has its name.

    Raises:
        Refusal: the tracker is not installed.
    """
    return TRACKERS[name](folder)
