"""One trial: train, look at the validation data now and then, score at the end."""

import math
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gq_triton
from gq_triton.study.laws import Backward, build_law
from gq_triton.study.optimizers import OPTIMIZERS
from gq_triton.study.records import EVALUATE, Record, Trial
from gq_triton.tasks import STUDY_TASKS, ScoredTask, batches, measure, sample_losses

__all__ = ["SERIES", "Run", "learning_rate", "run_trial"]

SERIES = "mean_weight", "norm_ratio", "saturated_high", "saturated_low", "effective_length"
_CHUNK = 1024  # samples per forward pass of a look


def run_trial(trial: Trial, data: Path | None = None) -> Record:
    """Run a trial in this process.

    A run whose loss stops being finite is a result: it counts as having learnt nothing.

    Args:
        trial: what to run.
        data: folder with the files of tasks that need some.
    """
    return Run(trial, STUDY_TASKS[trial.task].load(trial.seed, data)).record()


class Run:
    """A trial under way in this process.

    Args:
        trial: what to run.
        task: its data and model.
    """

    def __init__(self, trial: Trial, task: ScoredTask) -> None:
        self.device = torch.device(trial.device)
        self.trial, self.task = trial, task.to(self.device)
        self.entry = STUDY_TASKS[trial.task]
        torch.manual_seed(trial.seed)
        self.model = task.model().to(self.device)  # drawn on the CPU: the same weights everywhere
        params = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = OPTIMIZERS[trial.base](params, trial.lr, trial.beta1)
        self.law = self._build_law()
        self.class_weights = _class_weights(self.task) if trial.class_weighted else None
        self.losses: list[float] = []
        self.series: dict[str, list[float]] = {}
        self.curve: list[dict[str, float]] = []
        self.diverged_at: int | None = None
        self.reached: dict[str, float] | None = None
        self.seconds = 0.0

    def _build_law(self) -> Backward:
        trial, features = self.trial, self.task.features
        return build_law(trial.law, self.model, self.optimizer, features, trial.seed)

    def record(self) -> Record:
        """Train, score, and return all of it."""
        self._train()
        return Record(self.trial, self._result(), self._timing(), _environment(self.device))

    def _train(self) -> None:
        order = _stream(len(self.task.train[1]), self.trial.batch_size, self.trial.seed)
        # Dropout draws from here on; drawing the initial weights took as many numbers as it took.
        torch.manual_seed(self.trial.seed)
        for step in range(1, self.trial.steps + 1):
            started = time.perf_counter()
            finite = self._step(step, next(order))
            look = step % self.trial.looks_every == 0 or step == self.trial.steps
            if look and self.device.type == "cuda":
                torch.cuda.synchronize()  # the look's time is not counted, the step's is
            self.seconds += time.perf_counter() - started
            if not finite:
                self.diverged_at = step
                return
            if look:
                self._look(step)

    def _step(self, step: int, indices: Tensor) -> bool:
        """Take one step; return False, without taking it, if the loss is not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.trial, step)
        self.optimizer.zero_grad()
        loss = self._gradients(indices)
        if not math.isfinite(loss):
            return False
        self.optimizer.step()
        self.losses.append(_short(loss))
        for name, value in self.law.metrics().items():
            if not math.isfinite(value):
                return False
            self.series.setdefault(name, []).append(_short(value))
        return True

    def _gradients(self, indices: Tensor) -> float:
        """Leave the gradients of a batch for the optimizer, unless its loss is not finite.

        Returns:
            The loss, before any weighting by class.
        """
        inputs, labels = self._samples(indices)
        outputs = self.model(inputs)
        losses = sample_losses(outputs, labels)
        loss = losses.mean().item()
        if math.isfinite(loss):
            self.law.backward(outputs, self._weighted(losses, labels), labels)
        return loss

    def _samples(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        inputs, labels = self.task.train
        indices = indices.to(self.device)
        return inputs[indices], labels[indices]

    def _weighted(self, losses: Tensor, labels: Tensor) -> Tensor:
        return losses if self.class_weights is None else losses * self.class_weights[labels]

    def _look(self, step: int) -> None:
        """Score the validation data."""
        groups = None if self.task.groups is None else self.task.groups[0]
        measures = self._measure(*self.task.validation, groups)
        score = measures[self.entry.score]
        if not math.isfinite(measures["loss"]):
            return  # the next step finds out
        self.curve.append({"step": step, "score": score, "loss": measures["loss"]})
        if self.entry.gain(score, self.trial.target) < 0:
            self.reached = None  # a passing success, as of an untrained model, does not count
        elif self.reached is None:
            self.reached = {"step": step, "seconds": self.seconds}

    @torch.no_grad()
    def _measure(self, inputs: Tensor, labels: Tensor, groups: Tensor | None) -> dict[str, float]:
        self.model.eval()
        outputs = torch.cat([self.model(part) for part in inputs.split(_CHUNK)])
        self.model.train()
        return measure(outputs, labels, groups)

    def _result(self) -> dict[str, Any]:
        """Return what the run came to."""
        last = self.curve[-1] if self.curve else None
        finished = (
            self.diverged_at is None and last is not None and last["step"] == len(self.losses)
        )
        validation = last if finished else None
        test = self._test() if self.trial.purpose == EVALUATE and finished else None
        if test is not None and not math.isfinite(test["loss"]):
            test = validation = None
        return {
            "diverged_at": None if validation else self.diverged_at or self.trial.steps,
            "validation_score": validation["score"] if validation else self.entry.chance,
            "validation_loss": validation["loss"] if validation else None,
            "test": test,
            "score": test[self.entry.score] if test else None,
            "steps_to_target": int(self.reached["step"]) if self.reached and validation else None,
            "train_loss": _mean(self.losses[-max(1, len(self.losses) // 10) :]),
            **{name: _mean(self.series.get(name, [])) for name in SERIES},
            "curve": self.curve,
            "losses": self.losses,
            "series": self.series,
        }

    def _test(self) -> dict[str, float]:
        """Look at the test data: called once, when nothing can change any more."""
        groups = None if self.task.groups is None else self.task.groups[1]
        return self._measure(*self.task.test, groups)

    def _timing(self) -> dict[str, Any]:
        """Return seconds of training alone, looks and loading not counted, and the time of day."""
        reached = self.reached if self.diverged_at is None else None
        return {
            "seconds": self.seconds,
            "seconds_to_target": reached["seconds"] if reached else None,
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }


def learning_rate(trial: Trial, step: int) -> float:
    """Return the learning rate of a step, counted from 1.

    It rises linearly over the warm-up, and is ``trial.lr`` first in the step after; from there the
    cosine falls over the steps that are left.
    """
    rising = round(trial.warmup * trial.steps)
    if step <= rising:
        return trial.lr * step / (rising + 1)
    if trial.schedule == "constant":
        return trial.lr
    share = (step - 1 - rising) / (trial.steps - rising)
    return trial.lr * (1 + math.cos(math.pi * share)) / 2


def _stream(samples: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Yield batches of indices: shuffled passes over the data end to end, cut to equal length.

    A batch larger than the data holds some samples twice.
    """
    epoch, left = 0, torch.empty(0, dtype=torch.int64)
    while True:
        while len(left) < batch_size:
            left = torch.cat([left, batches(samples, samples, seed, epoch)[0]])
            epoch += 1
        yield left[:batch_size]
        left = left[batch_size:]


def _class_weights(task: ScoredTask) -> Tensor:
    """Return the inverse frequency of every class, 1 on average over the training samples."""
    assert task.classes is not None
    counts = torch.bincount(task.train[1], minlength=task.classes).clamp(min=1)
    return len(task.train[1]) / (task.classes * counts.float())


def _mean(values: list[float]) -> float | None:
    return _short(math.fsum(values) / len(values)) if values else None


def _short(value: float) -> float:
    """Round to 6 digits: the series would fill the disk."""
    return float(f"{value:.6g}")


@cache
def _environment(device: torch.device) -> dict[str, Any]:
    gpu = {"gpu": torch.cuda.get_device_name()} if device.type == "cuda" else {}
    return {
        **gpu,
        "gq_triton": gq_triton.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def _commit() -> str | None:
    """Return the commit that the code was run from, with a mark if files differ from it."""
    folder = Path(__file__).parent

    def git(*args: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *args],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
        return done.stdout.strip()

    try:
        if git("ls-files", "trial.py") == "":
            return None  # installed into a folder that belongs to some other repository
        return git("rev-parse", "HEAD") + (
            "-changed" if git("status", "--porcelain", "-uno") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return None
