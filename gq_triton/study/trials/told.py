"""The record of a trial that ran elsewhere: in a user's command, or in a user's loop."""

import json
import math
import re
import shlex
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

import torch

from gq_triton.commands.refusal import Refusal
from gq_triton.study.design.trial import EVALUATE, SERIES, Record, Trial
from gq_triton.study.trials.environment import environment

__all__ = ["record_of", "scores_in", "words_of"]

_NUMBERS = "validation_loss", "steps_to_target", "train_loss", *SERIES


def record_of(trial: Trial, scores: Mapping[str, Any], seconds: float = 0.0) -> Record:
    """Return the record of a trial from its scores.

    Args:
        trial: the trial.
        scores: ``validation_score``; of a trial to evaluate also ``test_score``, from test data
            that is looked at once, at the end. May hold ``diverged`` (the scores are then those of
            a model that has learnt nothing), ``validation_loss``, ``train_loss``,
            ``steps_to_target``. With a law also ``norm_ratio`` and ``mean_weight``, the means over
            the steps of what ``GradQueue.metrics()`` says.
        seconds: that training took.

    Raises:
        Refusal: a score is missing or is no finite number.
    """
    needed = ["validation_score"] + ["test_score"] * (trial.purpose == EVALUATE)
    if trial.law.kind != "none":
        needed += ["norm_ratio", "mean_weight"]  # which the controls take their learning rates from
    for name in needed:
        if name not in scores:
            raise Refusal(f"the scores must hold {name}, got {', '.join(scores) or 'none'}")
    for name in (*needed, *_NUMBERS):
        value = scores.get(name)
        if value is None and name not in needed:
            continue
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise Refusal(f"{name} must be a finite number, got {value!r}; a diverged run has the "
                          "score of a model that has learnt nothing")  # fmt: skip
    test = float(scores["test_score"]) if trial.purpose == EVALUATE else None
    result = {
        "diverged_at": trial.steps if scores.get("diverged") else None,
        "validation_score": float(scores["validation_score"]),
        "validation_loss": scores.get("validation_loss"),
        "test": None,
        "score": test,
        **{name: scores.get(name) for name in ("steps_to_target", "train_loss", *SERIES)},
        "curve": [],
        "losses": [],
        "series": {},
    }
    timing = {
        "seconds": seconds,
        "seconds_to_target": None,
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    return Record(trial, result, timing, environment(torch.device("cpu")))


def words_of(trial: Trial) -> list[str]:
    """Return the words of a trial's command, its settings in place of the names in braces."""
    settings = settings_of(trial)
    return [
        re.sub(r"\{(\w+)\}", lambda found: str(settings[found[1]]), word)
        for word in shlex.split(trial.command)
    ]


def settings_of(trial: Trial) -> dict[str, Any]:
    """Return a trial's settings by the names that a command may hold.

    Without a law rho is 1 and there is one cluster, with which Grad Queue is the plain optimizer.
    """
    law = trial.law
    plain = law.kind == "none"
    return {
        "optimizer": trial.base, "lr": trial.lr, "beta1": trial.beta1, "warmup": trial.warmup,
        "batch_size": trial.batch_size, "steps": trial.steps, "seed": trial.seed,
        "purpose": trial.purpose, "target": trial.target, "nproc": trial.processes,
        "law": law.kind, "rho": 1.0 if plain else law.rho, "queue_length": law.queue_length,
        "n_clusters": 1 if plain else law.n_clusters or 1,
    }  # fmt: skip


def scores_in(output: str) -> dict[str, Any]:
    """Return the scores that a command has printed: its last line that is a JSON object.

    Raises:
        Refusal: there is no such line.
    """
    for line in reversed(output.splitlines()):
        if line.strip().startswith("{"):
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if isinstance(found, dict):
                return found
    raise Refusal(
        f"--command printed no JSON line of scores; its end was: {output[-500:] or 'nothing'}"
    )
