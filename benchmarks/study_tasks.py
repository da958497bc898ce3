"""Tasks of the studies in docs/questions.md, for ``--task study_tasks:tiled`` in this folder."""

from functools import cache

import torch
from torch import Tensor, nn

from gq_triton.tasks import STUDY_TASKS, ScoredTask, measure, sample_losses

Pair = tuple[Tensor, Tensor]
_LEAST = 2**16  # samples of the tiled digits


@cache
def _longtail(seed: int) -> ScoredTask:
    return STUDY_TASKS["digits-longtail"].load(seed, None)


class Longtail:
    """The digits with 6 samples left of 3 classes, 64-64-10 net; clusters of a chosen layer."""

    score_name, classes, chance, target = "balanced_accuracy", 10, 0.1, 0.8

    def __init__(self, features: str) -> None:
        self.features = features

    def data(self, seed: int) -> tuple[Pair, Pair, Pair]:
        task = _longtail(seed)
        return task.train, task.validation, task.test

    def model(self) -> nn.Module:
        return _longtail(0).model()

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return sample_losses(outputs, labels)

    def score(self, outputs: Tensor, labels: Tensor) -> float:
        return measure(outputs, labels)["balanced_accuracy"]


class Tiled(Longtail):
    """The digits with 6 samples left of 3 classes, repeated to 65 536 samples; 64-64-10 net."""

    def data(self, seed: int) -> tuple[Pair, Pair, Pair]:
        (inputs, labels), validation, test = super().data(seed)
        places = torch.arange(_LEAST) % len(labels)
        return (inputs[places], labels[places]), validation, test


def pixels() -> Longtail:
    return Longtail("flatten")


def hidden() -> Longtail:
    return Longtail("hidden")


def logits() -> Longtail:
    return Longtail("head")


def tiled() -> Tiled:
    return Tiled("hidden")
