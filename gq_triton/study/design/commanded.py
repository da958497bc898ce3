"""Studies whose trials are a command of the user's: what the command must hold, and its entry."""

import re
import shlex
from typing import TYPE_CHECKING

from gq_triton.commands.refusal import Refusal
from gq_triton.study.design.arms import ARMS
from gq_triton.study.design.law import NO_LAW, StudyLaw
from gq_triton.tasks import StudyTask

if TYPE_CHECKING:
    from gq_triton.study.design.config import StudyConfig

__all__ = ["COMMAND", "NAMES", "check_command", "command_entry"]

COMMAND = "command"  # the name of the task
NAMES = (
    "optimizer", "lr", "beta1", "warmup", "batch_size", "steps", "seed", "purpose", "target",
    "nproc", "law", "rho", "queue_length", "n_clusters",
)  # fmt: skip
"""The settings that a command may hold in braces."""


def check_command(config: "StudyConfig") -> None:
    """Refuse a command that cannot run the study's arms, and its options without a command.

    Raises:
        Refusal: what the command lacks, in a sentence.
    """
    if not config.command:
        if COMMAND in config.tasks or config.score != "score" or config.better != "higher":
            raise Refusal("--score and --better belong to --command, which is missing")
        return
    if config.tasks != (COMMAND,):
        raise Refusal("--command runs in place of a task: leave out --tasks")
    if config.better not in ("higher", "lower"):
        raise Refusal(f"--better must be higher or lower, got {config.better!r}")
    try:
        shlex.split(config.command)
    except ValueError as error:
        raise Refusal(f"--command is no line of words: {error}") from error
    held = set(re.findall(r"\{(\w+)\}", config.command))
    for name in held - set(NAMES):
        raise Refusal(f"--command holds {{{name}}}; there are {', '.join(NAMES)}")
    arms = [ARMS[name] for name in config.arms]
    for arm in arms:
        plain = arm.law in (NO_LAW, StudyLaw("queue")) and not arm.class_weighted
        if not plain:
            raise Refusal(f"arm {arm.name} cannot be told to a command: leave it out")
    queued = any(arm.law.queued for arm in arms)
    needs = {
        "lr": (True, ""),
        "seed": (True, ""),
        "rho": (queued, " for the Grad Queue arms"),
        "queue_length": (queued, " for the Grad Queue arms"),
        "n_clusters": (any(arm.clusters for arm in arms), " for the arms with clusters"),
        "optimizer": (len({arm.base for arm in arms}) > 1, " for arms of several optimizers"),
        "batch_size": (len(config.batch_sizes) > 1, " for several batch sizes"),
        "beta1": (len(config.beta1) > 1, ", or --beta1 one value, which is then not tuned"),
        "warmup": (len(config.warmup) > 1, ", or --warmup one value, which is then not tuned"),
    }
    for name, (needed, why) in needs.items():
        if needed and name not in held:
            raise Refusal(f"--command needs {{{name}}}{why}")


def command_entry(config: "StudyConfig") -> StudyTask:
    """Return the entry of the task that a command is."""

    def load(seed: int, data: object) -> None:
        raise AssertionError("a command loads its own data")

    return StudyTask(
        load=load,  # pyright: ignore[reportArgumentType]
        text=f"the command {config.command}",
        score=config.score,
        chance=0.0,  # a diverged run says its score itself
        target=0.0,
        higher=config.better == "higher",
        labels=False,
    )
