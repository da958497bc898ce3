"""The training run of a trial: it trains, looks at validation data, and scores at the end."""

import math
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gq_triton.study.design.trial import EVALUATE, SERIES, Record, Trial
from gq_triton.study.trials.backward import Backward, build_backward
from gq_triton.study.trials.environment import environment
from gq_triton.study.trials.optimizers import OPTIMIZERS
from gq_triton.tasks import ScoredTask, study_task

__all__ = ["TrainingRun", "learning_rate", "run_trial"]

_CHUNK = 1024  # samples per forward pass when a set of data is scored


def run_trial(trial: Trial, data: Path | None = None) -> Record:
    """Run a trial in this process and return its record.

    A run whose loss stops being finite diverged: it has the score of a model that learnt nothing.

    Args:
        trial: the trial.
        data: folder with the files of tasks that need some.
    """
    return TrainingRun(trial, study_task(trial.task).load(trial.seed, data)).record()


class TrainingRun:
    """The training run of a trial, in this process.

    Args:
        trial: the trial.
        task: its data and model.
    """

    def __init__(self, trial: Trial, task: ScoredTask) -> None:
        self.device = torch.device(trial.device)
        self.trial, self.task = trial, task.to(self.device)
        self.entry = study_task(trial.task)
        torch.manual_seed(trial.seed)
        self.model = task.model().to(self.device)  # drawn on the CPU: the same weights everywhere
        params = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = OPTIMIZERS[trial.base](params, trial.lr, trial.beta1)
        self.backward = self._build_backward()
        self.class_weights = _class_weights(self.task) if trial.class_weighted else None
        self.losses: list[float] = []
        self.series: dict[str, list[float]] = {}
        self.curve: list[dict[str, float]] = []
        self.diverged_at: int | None = None
        self.reached: dict[str, float] | None = None
        self.seconds = 0.0

    def _build_backward(self) -> Backward:
        trial, task = self.trial, self.task
        return build_backward(
            trial.law, self.model, self.optimizer, task.features, trial.seed, task.classes
        )

    def record(self) -> Record:
        """Train, score, and return the record."""
        self._train()
        return Record(self.trial, self._result(), self._timing(), environment(self.device))

    def _train(self) -> None:
        order = self.task.order(len(self.task.train[1]), self.trial.batch_size, self.trial.seed)
        # Dropout draws the same numbers, however many the initial weights took.
        torch.manual_seed(self.trial.seed)
        for step in range(1, self.trial.steps + 1):
            started = time.perf_counter()
            finite = self._step(step, next(order))
            look = step % self.trial.looks_every == 0 or step == self.trial.steps
            if look and self.device.type == "cuda":
                torch.cuda.synchronize()  # the time of the step counts, that of the look does not
            self.seconds += time.perf_counter() - started
            if not finite:
                self.diverged_at = step
                return
            if look:
                self._look(step)

    def _step(self, step: int, indices: Tensor) -> bool:
        """Take a step; return False if the loss or a measure is not finite.

        With a loss that is not finite the optimizer takes no step.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.trial, step)
        self.optimizer.zero_grad()
        loss = self._gradients(indices)
        if not math.isfinite(loss):
            return False
        self.optimizer.step()
        self.losses.append(_short(loss))
        for name, value in self.backward.metrics().items():
            if not math.isfinite(value):
                return False
            self.series.setdefault(name, []).append(_short(value))
        return True

    def _gradients(self, indices: Tensor) -> float:
        """Leave the gradients of a batch for the optimizer, and return the batch's loss.

        The loss is the one before any weighting by class. If it is not finite there are no
        gradients.
        """
        inputs, labels = self._samples(indices)
        outputs = self.model(inputs)
        losses = self.task.losses(outputs, labels)
        loss = losses.mean().item()
        if math.isfinite(loss):
            self.backward.backward(outputs, self._weighted(losses, labels), labels)
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
            return  # the next step finds the divergence
        self.curve.append({"step": step, "score": score, "loss": measures["loss"]})
        if self.entry.gain(score, self.trial.target) < 0:
            self.reached = None  # the score must stay at the target to the end
        elif self.reached is None:
            self.reached = {"step": step, "seconds": self.seconds}

    @torch.no_grad()
    def _measure(self, inputs: Tensor, labels: Tensor, groups: Tensor | None) -> dict[str, float]:
        self.model.eval()
        outputs = torch.cat([self.model(part) for part in inputs.split(_CHUNK)])
        self.model.train()
        return self.task.measure(outputs, labels, groups)

    def _result(self) -> dict[str, Any]:
        """Return the result that goes into the record."""
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
        """Score the test data; called once, after the last step."""
        groups = None if self.task.groups is None else self.task.groups[1]
        return self._measure(*self.task.test, groups)

    def _timing(self) -> dict[str, Any]:
        """Return the seconds of training, without looks and loading, and the time of day."""
        reached = self.reached if self.diverged_at is None else None
        return {
            "seconds": self.seconds,
            "seconds_to_target": reached["seconds"] if reached else None,
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }


def learning_rate(trial: Trial, step: int) -> float:
    """Return the learning rate of a step; steps count from 1.

    The learning rate rises linearly over the warm-up and is ``trial.lr`` in the step after it. From
    there the cosine falls to 0 over the steps that are left.
    """
    rising = round(trial.warmup * trial.steps)
    if step <= rising:
        return trial.lr * step / (rising + 1)
    if trial.schedule == "constant":
        return trial.lr
    share = (step - 1 - rising) / (trial.steps - rising)
    return trial.lr * (1 + math.cos(math.pi * share)) / 2


def _class_weights(task: ScoredTask) -> Tensor:
    """Return the inverse frequency of every class, 1 on average over the training samples."""
    assert task.classes is not None
    counts = torch.bincount(task.train[1], minlength=task.classes).clamp(min=1)
    return len(task.train[1]) / (task.classes * counts.float())


def _mean(values: list[float]) -> float | None:
    return _short(math.fsum(values) / len(values)) if values else None


def _short(value: float) -> float:
    """Return a value rounded to 6 digits, which keeps the series of steps small on disk."""
    return float(f"{value:.6g}")
