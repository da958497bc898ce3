"""Training sets with a flaw: samples that come many times, or wrong labels."""

from dataclasses import replace

import torch
from torch import Tensor

from gq_triton.tasks.scored import ScoredTask

__all__ = ["appended", "mislabelled", "repeated"]

Pair = tuple[Tensor, Tensor]
# Seed of the wrong labels in Faghri et al. (2020), which does not depend on the run's.
_WRONG = 2222


def repeated(task: ScoredTask, share: float, points: int = 5) -> ScoredTask:
    """Return the task with a share of its training samples replaced by copies of the first few.

    The last ``share * N`` samples are replaced, by the first ``points`` samples in turn.
    """
    inputs, labels = task.train
    samples = len(labels)
    chosen = torch.arange(samples)
    copies = min(round(share * samples), samples - points)
    if copies > 0:
        chosen[samples - copies :] = torch.arange(copies) % points
    return replace(task, train=(inputs[chosen], labels[chosen]))


def appended(task: ScoredTask, points: int, copies: int, seed: int) -> ScoredTask:
    """Return the task with some random training samples appended so many times each."""
    inputs, labels = task.train
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(labels), generator=generator)[:points].repeat_interleave(copies)
    both = torch.cat([torch.arange(len(labels)), chosen])
    return replace(task, train=(inputs[both], labels[both]))


def mislabelled(task: ScoredTask, share: float) -> ScoredTask:
    """Return the task with random labels for the first share of its training samples.

    A random label may be the right one.

    Raises:
        ValueError: samples of the task have no class.
    """
    if task.classes is None:
        raise ValueError("wrong labels need a task whose samples have classes, and it has none")
    inputs, labels = task.train
    count = round(share * len(labels))
    generator = torch.Generator().manual_seed(_WRONG)
    wrong = torch.randint(task.classes, (count,), generator=generator)
    return replace(task, train=(inputs, torch.cat([wrong.to(labels), labels[count:]])))
