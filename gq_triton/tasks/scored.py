"""The tasks of studies: three sets of data, losses per sample, and scores."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from gq_triton.tasks.task import Task, batch_stream

__all__ = ["Measures", "MissingData", "ScoredTask", "StudyTask", "measure", "sample_losses"]

Measures = dict[str, float]


class MissingData(Exception):
    """The error of a task without its files; the message is one line that says how to get them."""


def sample_losses(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of every sample, ``(B,)``.

    Args:
        outputs: ``(B, C)`` logits; ``(B, 1)`` one logit for two classes; ``(B, T, C)`` logits by
            position, averaged over positions.
        labels: ``(B,)``, or ``(B, T)``.
    """
    if outputs.dim() == 3:
        losses = F.cross_entropy(outputs.flatten(0, 1), labels.flatten(), reduction="none")
        return losses.view(labels.shape).mean(dim=1)
    if outputs.shape[1] == 1:
        targets = labels.to(outputs.dtype)
        return F.binary_cross_entropy_with_logits(outputs[:, 0], targets, reduction="none")
    return F.cross_entropy(outputs, labels, reduction="none")


def measure(outputs: Tensor, labels: Tensor, groups: Tensor | None = None) -> Measures:
    """Return the loss and the scores of a set of samples.

    Args:
        outputs: outputs of the model, as in ``sample_losses``.
        labels: labels of the samples, as in ``sample_losses``.
        groups: ``(B,)``, the group of every sample, or None.

    Returns:
        ``loss`` in nats; for classes ``accuracy``, ``balanced_accuracy`` (mean of the classes'
        recalls) and ``worst_class_recall``; with groups ``worst_group_accuracy``; for text
        ``bits_per_byte``.
    """
    loss = sample_losses(outputs, labels).double().mean().item()
    if outputs.dim() == 3:
        return {"loss": loss, "bits_per_byte": loss / 0.6931471805599453}
    two = outputs.shape[1] == 1
    right = ((outputs[:, 0] > 0).long() if two else outputs.argmax(dim=1)) == labels
    recalls = _shares(right, labels)
    measures = {
        "loss": loss,
        "accuracy": right.double().mean().item(),
        "balanced_accuracy": sum(recalls) / len(recalls),
        "worst_class_recall": min(recalls),
    }
    if groups is not None:
        measures["worst_group_accuracy"] = min(_shares(right, groups))
    return measures


def _shares(right: Tensor, of: Tensor) -> list[float]:
    """Return the share of right answers for each value of ``of``."""
    return [right[of == value].double().mean().item() for value in torch.unique(of).tolist()]


@dataclass(frozen=True)
class ScoredTask(Task):
    """A task of a study, whose settings are chosen on validation data; test data is used once.

    Args:
        validation: inputs and labels from which settings are chosen and curves drawn.
        classes: number of classes; None if samples have no class, as in text.
        groups: the group of every validation sample and of every test sample, for the score of the
            worst group; training does not use them.
        losses: function that returns the loss of every sample, from outputs and labels.
        measure: function that returns ``loss`` and the scores of a set of samples.
        order: function that yields the indices of every batch, from the number of samples, the
            batch size and the seed.
    """

    validation: tuple[Tensor, Tensor]
    classes: int | None
    groups: tuple[Tensor, Tensor] | None = None
    losses: Callable[[Tensor, Tensor], Tensor] = sample_losses
    measure: Callable[[Tensor, Tensor, Tensor | None], Measures] = measure
    order: Callable[[int, int, int], Iterator[Tensor]] = batch_stream

    def to(self, device: torch.device) -> "ScoredTask":
        """Return the task with its data on a device."""

        def moved(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return pair[0].to(device), pair[1].to(device)

        return replace(
            self,
            train=moved(self.train),
            validation=moved(self.validation),
            test=moved(self.test),
            groups=None if self.groups is None else moved(self.groups),
        )


@dataclass(frozen=True)
class StudyTask:
    """An entry of the list of tasks, known before any data is read.

    Args:
        load: function that returns the task, from a seed and the folder with the user's files.
        text: one line about the task.
        score: name of the measure that is compared, a key of what ``measure`` returns.
        chance: the score of a model that learnt nothing, which a diverged run gets.
        target: the validation score of "steps to target".
        higher: whether a higher score is better.
        labels: whether samples have classes, which a class-weighted loss needs.
        unit: of the score, if it has one.
    """

    load: Callable[[int, Path | None], ScoredTask]
    text: str
    score: str
    chance: float
    target: float
    higher: bool = True
    labels: bool = True
    unit: str = ""

    @property
    def shown(self) -> str:
        """The score's name in tables and pictures, with its unit."""
        name = self.score.replace("_", " ")
        return f"{name} in {self.unit}" if self.unit else name

    def gain(self, score: float, other: float) -> float:
        """Return how much better ``score`` is than ``other``: positive is better."""
        return score - other if self.higher else other - score
