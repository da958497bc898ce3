"""The gate of importance sampling: what the model's scores say of when drawing by score pays.

Katharopoulos and Fleuret, "Not All Samples Are Created Equal" (2018), Algorithm 1.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gq_triton.options import shown
from gq_triton.sampling.gradients import gradient_norms
from gq_triton.sampling.presample import Smoothing
from gq_triton.sampling.scores import (
    Loss,
    check_scores,
    importance_score,
    sample_losses,
    variance_reduction,
)
from gq_triton.sampling.watch import Watch, device_of, evaluation_mode, scorer

__all__ = ["Gate", "Reading"]

# The share of the past in the moving averages of tau and of the mean score.
MEMORY = 0.9
# Scores by the model's answer; that of "norm", the true one, needs a backward pass.
_SCORES = {"gradient": importance_score, "loss": sample_losses}


class Reading(NamedTuple):
    """What the scores of one step say: its variance reduction, the mean score, the gate's value."""

    tau: float
    mean: float
    level: float


class _Trained(NamedTuple):
    """A uniform batch that was given, whose scores are still to come."""

    inputs: Any
    targets: Any
    samples: int


class Gate:
    """The moving averages of an ``ImportanceLoader``, and the scores that they are made of.

    Args:
        model: the model that scores.
        loss: the loss by which it scores.
        score: ``"gradient"``, ``"loss"`` or ``"norm"``.
        forward: ``(model, inputs) -> outputs``.
        smoothing: how scores are flattened.
        ranks: the number of processes that share the averages.
        count: called with the number of samples of every pass that only scores.
        gate: the value of scores ``(S,)`` whose average opens the gate; None takes ``tau``.

    Attributes:
        tau: the moving average of ``variance_reduction``.
        mean: that of the mean score.
        level: that of the gate's value.
        watch: the forward hook that takes the model's answer to a uniform batch.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        score: str,
        forward: Callable[[Any, Any], Any],
        smoothing: Smoothing,
        ranks: int,
        count: Callable[[int], None],
        gate: Callable[[Tensor], Any] | None = None,
    ) -> None:
        self._model, self._loss, self._score = model, loss, _SCORES.get(score)
        self._gate = gate
        self._forward, self._smoothing, self._ranks, self._count = forward, smoothing, ranks, count
        self.tau, self.mean, self.level = 0.0, 1.0, 0.0
        # The uniform batch that was given last, and the scores of the model's answer to it.
        self._trained: _Trained | None = None
        self._answer: Tensor | None = None
        self.watch = Watch(self._answered)

    @property
    def answered(self) -> Reading | None:
        """What the model says of the uniform batch that was given last; None where none was.

        Where no forward pass of training has answered, the batch is scored now, as `settle` would.
        """
        if self._answer is None and self._trained is not None:
            self._answer = self.run(*self._trained)
        return None if self._answer is None else self.read(self._answer)

    def smooth(self, scores: Tensor) -> Tensor:
        """Return flattened scores."""
        return self._smoothing(scores, self.mean)

    def wait(self, inputs: Any, targets: Any, samples: int) -> None:
        """Wait for the model's answer to a uniform batch that is given now."""
        self._trained = _Trained(inputs, targets, samples)
        # Of true norms an answer says nothing.
        self.watch.samples = 0 if self._score is None else samples

    def run(self, inputs: Any, targets: Any, samples: int) -> Tensor:
        """Run the model on a batch to score it; return ``(samples,)`` float64 on the CPU."""
        model = scorer(self._model)
        if self._score is None:
            scores = gradient_norms(model, self._loss, inputs, targets)
        else:
            with evaluation_mode(model), torch.no_grad():
                outputs = self._forward(model, inputs)
            scores = self._score(outputs, targets, self._loss)
        self._count(samples)
        scores = check_scores(scores, "the scores of a batch")
        if len(scores) != samples:
            raise ValueError(
                f"the loss must give one score to each of the {samples} samples of a batch, got "
                f"{len(scores)}: outputs and targets must begin with the samples"
            )
        return scores.to("cpu", torch.float64)

    def _answered(self, outputs: Any) -> None:
        """Score what the model answers to a uniform batch; the hook calls it."""
        if self._trained is not None and self._score is not None:
            scores = self._score(outputs, self._trained.targets, self._loss)
            self._answer = scores if len(scores) == self._trained.samples else None

    def read(self, scores: Tensor) -> Reading:
        """Return what scores say, ``(samples,)``."""
        scores = check_scores(scores, "the scores of a batch").to("cpu", torch.float64)
        tau = variance_reduction(self.smooth(scores))
        level = tau if self._gate is None else _finite(self._gate(scores))
        return Reading(tau, float(scores.mean()), level)

    def settle(self) -> None:
        """Take the scores of the batch that was given last into ``tau``, if it was uniform."""
        trained, answer = self._trained, self._answer
        self.forget()
        if trained is not None:
            self.learn(self.read(self.run(*trained) if answer is None else answer))

    def forget(self) -> None:
        """Wait for no answer."""
        self._trained, self._answer, self.watch.samples = None, None, 0

    def learn(self, reading: Reading) -> None:
        """Take a step's reading, the mean over all ranks, into the moving averages."""
        if self._ranks > 1 and dist.is_initialized():
            device = device_of(self._model) if "nccl" in dist.get_backend() else "cpu"
            sums = torch.tensor(reading, dtype=torch.float64, device=device)
            dist.all_reduce(sums)
            reading = Reading(*(sums / dist.get_world_size()).tolist())
        self.tau = MEMORY * self.tau + (1 - MEMORY) * reading.tau
        self.mean = MEMORY * self.mean + (1 - MEMORY) * reading.mean
        self.level = MEMORY * self.level + (1 - MEMORY) * reading.level


def _finite(value: Any) -> float:
    """Return what a gate has returned, or raise a ValueError."""
    try:
        level = float(value)
    except (TypeError, ValueError, RuntimeError):
        level = math.nan
    if not math.isfinite(level):
        raise ValueError(
            f"gate must return a finite number for a step's scores, got {shown(value)}"
        )
    return level
