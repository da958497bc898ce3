"""The handwritten digits of a study: as they are, or with something rare."""

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from gq_triton.tasks import digits, rare
from gq_triton.tasks.scored import ScoredTask

__all__ = ["load_bursts", "load_hidden", "load_longtail", "load_plain"]

Pair = tuple[Tensor, Tensor]

_KEPT = 6  # samples left of each rare class


def load_plain(seed: int, data: Path | None = None) -> ScoredTask:
    """Return the digits as they are, with the small convolutional net of ``digits``."""
    train, validation, test = _split()
    task = digits.load_digits()
    return ScoredTask(
        train=train,
        validation=validation,
        test=test,
        model=task.model,
        features=task.features,
        classes=10,
    )


def load_longtail(seed: int, data: Path | None = None) -> ScoredTask:
    """Return the digits with 6 samples left of each of 3 classes, as ``rare.longtail`` says."""
    return rare.longtail(_with_mlp(seed), seed, _KEPT)


def load_bursts(seed: int, data: Path | None = None) -> ScoredTask:
    """Return the digits with 3 classes that come in bursts, as ``rare.bursts`` says."""
    return rare.bursts(_with_mlp(seed), seed)


def load_hidden(seed: int, data: Path | None = None) -> ScoredTask:
    """Return the digits with 5 % of every class redrawn, as ``rare.hidden`` says."""
    return rare.hidden(_with_mlp(seed), seed)


def _with_mlp(seed: int) -> ScoredTask:
    return replace(load_plain(seed), model=_mlp, features="hidden")


def _split() -> tuple[Pair, Pair, Pair]:
    """Return 1167 digits to learn from, 270 for validation and the 360 held out of ``digits``."""
    from sklearn.model_selection import train_test_split

    task = digits.load_digits()
    images, labels = task.train
    train, validation = train_test_split(
        torch.arange(len(labels)).numpy(), test_size=270, stratify=labels.numpy(), random_state=0
    )
    first, second = torch.as_tensor(train), torch.as_tensor(validation)
    return (images[first], labels[first]), (images[second], labels[second]), task.test


def _mlp() -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            hidden=nn.Linear(64, 64),
            relu=nn.ReLU(),
            head=nn.Linear(64, 10),
        )
    )
