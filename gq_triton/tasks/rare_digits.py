"""The handwritten digits with something rare in them: rare classes, or a rare way of drawing."""

from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn

from gq_triton.tasks import digits
from gq_triton.tasks.scored import ScoredTask

__all__ = ["load_hidden", "load_longtail", "load_plain"]

Pair = tuple[Tensor, Tensor]

_RARE_CLASSES, _KEPT = 3, 6  # classes of the long tail, and how many samples each keeps
_HIDDEN = 0.05  # share of every class that is drawn differently


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
    """Return the digits with 6 samples left of each of 3 classes.

    The seed chooses the classes and the samples, so that an interval over seeds covers this choice.
    In validation and test data no class is rare.
    """
    (images, labels), validation, test = _split()
    generator = torch.Generator().manual_seed(seed)
    rare = torch.randperm(10, generator=generator)[:_RARE_CLASSES]
    keep = ~torch.isin(labels, rare)
    for value in rare.tolist():
        members = (labels == value).nonzero()[:, 0]
        chosen = torch.randperm(len(members), generator=generator)[:_KEPT]
        keep[members[chosen]] = True
    return ScoredTask(
        train=(images[keep], labels[keep]),
        validation=validation,
        test=test,
        model=_mlp,
        features="hidden",
        classes=10,
    )


def load_hidden(seed: int, data: Path | None = None) -> ScoredTask:
    """Return the digits with 5 % of every class mirrored and inverted.

    No label says which samples these are, so no class weight can help. Validation and test data
    hold every image as it is and altered; these are the two groups of the score.
    """
    (images, labels), *held_out = _split()
    generator = torch.Generator().manual_seed(seed)
    images = images.clone()
    for value in range(10):
        members = (labels == value).nonzero()[:, 0]
        count = max(1, round(_HIDDEN * len(members)))
        chosen = members[torch.randperm(len(members), generator=generator)[:count]]
        images[chosen] = _redraw(images[chosen])
    (validation, validation_groups), (test, test_groups) = (_both_ways(*pair) for pair in held_out)
    return ScoredTask(
        train=(images, labels),
        validation=validation,
        test=test,
        model=_mlp,
        features="hidden",
        classes=10,
        groups=(validation_groups, test_groups),
    )


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


def _redraw(images: Tensor) -> Tensor:
    """Return images ``(N, 1, 8, 8)`` in [-1, 1] mirrored left to right, dark swapped with light."""
    return -images.flip(-1)


def _both_ways(images: Tensor, labels: Tensor) -> tuple[Pair, Tensor]:
    both = torch.cat([images, _redraw(images)]), torch.cat([labels, labels])
    return both, torch.arange(2).repeat_interleave(len(labels))


def _mlp() -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            hidden=nn.Linear(64, 64),
            relu=nn.ReLU(),
            head=nn.Linear(64, 10),
        )
    )
