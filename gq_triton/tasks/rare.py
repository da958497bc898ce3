"""Something rare in the training data of a task: rare classes, a rare way of drawing, bursts."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import count

import torch
from torch import Tensor

from gq_triton.tasks.scored import ScoredTask
from gq_triton.tasks.task import batch_stream

__all__ = ["BURST_EVERY", "bursts", "hidden", "longtail"]

Pair = tuple[Tensor, Tensor]

BURST_EVERY = 20  # batches from one burst to the next: more than any queue of the paper holds
_RARE_CLASSES = 3
_HIDDEN = 0.05  # share of every class that is drawn differently


def longtail(task: ScoredTask, seed: int, kept: int) -> ScoredTask:
    """Return the task with ``kept`` training samples left of each of 3 classes.

    The seed chooses the classes and the samples, so that an interval over seeds covers this choice.
    In validation and test data no class is rare.

    Args:
        task: a task of images with classes as labels, from 0.
        seed: seed of the choice.
        kept: samples left of each rare class; a class that has no more keeps all it has.
    """
    images, labels = task.train
    generator = torch.Generator().manual_seed(seed)
    rare = _rare_classes(labels, generator)
    keep = ~torch.isin(labels, rare)
    for value in rare.tolist():
        members = (labels == value).nonzero()[:, 0]
        chosen = torch.randperm(len(members), generator=generator)[:kept]
        keep[members[chosen]] = True
    return replace(task, train=(images[keep], labels[keep]))


def bursts(task: ScoredTask, seed: int) -> ScoredTask:
    """Return the task with 3 classes that come in every 20th batch only, as often as others there.

    Nothing is left out of the data; what the classes have to teach is sparse in time. The seed
    chooses the classes. In validation and test data no class is rare.

    Args:
        task: a task with classes as labels, from 0.
        seed: seed of the choice.
    """
    labels = task.train[1]
    rare = _rare_classes(labels, torch.Generator().manual_seed(seed))
    usual = (~torch.isin(labels, rare)).nonzero()[:, 0]

    def order(samples: int, batch_size: int, seed: int) -> Iterator[Tensor]:
        without = batch_stream(len(usual), batch_size, seed)
        every = batch_stream(samples, batch_size, seed)
        for step in count(1):
            yield next(every) if step % BURST_EVERY == 0 else usual[next(without)]

    return replace(task, order=order)


def hidden(task: ScoredTask, seed: int) -> ScoredTask:
    """Return the task with 5 % of the training images of every class mirrored and inverted.

    No label says which samples these are, so no class weight can help. Validation and test data
    hold every image as it is and altered; these are the two groups of the score.

    Args:
        task: a task of images ``(N, C, H, W)`` in [-1, 1].
        seed: seed of the choice.
    """
    images, labels = task.train
    generator = torch.Generator().manual_seed(seed)
    images = images.clone()
    for value in range(_classes(labels)):
        members = (labels == value).nonzero()[:, 0]
        count = max(1, round(_HIDDEN * len(members)))
        chosen = members[torch.randperm(len(members), generator=generator)[:count]]
        images[chosen] = _redraw(images[chosen])
    validation, validation_groups = _both_ways(*task.validation)
    test, test_groups = _both_ways(*task.test)
    return replace(
        task,
        train=(images, labels),
        validation=validation,
        test=test,
        groups=(validation_groups, test_groups),
    )


def _classes(labels: Tensor) -> int:
    return int(labels.max()) + 1


def _rare_classes(labels: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randperm(_classes(labels), generator=generator)[:_RARE_CLASSES]


def _redraw(images: Tensor) -> Tensor:
    """Return images ``(N, C, H, W)`` in [-1, 1] mirrored left to right, dark swapped with light."""
    return -images.flip(-1)


def _both_ways(images: Tensor, labels: Tensor) -> tuple[Pair, Tensor]:
    both = torch.cat([images, _redraw(images)]), torch.cat([labels, labels])
    return both, torch.arange(2).repeat_interleave(len(labels))
