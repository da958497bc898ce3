"""A task, which is data in memory and a model, and the order of its batches."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Task", "batch_stream", "batches"]


@dataclass(frozen=True)
class Task:
    """A classification task.

    Args:
        train: inputs and labels to learn from.
        test: inputs and labels held out; the split never depends on a run's seed.
        model: function that builds the model, with random numbers of torch's global generator.
        features: name of the submodule whose output describes a sample, for the clusters.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    model: Callable[[], nn.Module]
    features: str


def batches(samples: int, batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    """Return the indices of every global batch of an epoch; the last batch may be smaller.

    They depend on the arguments alone, so that all ranks and all resumed runs have the same.

    Args:
        samples: size of the training set.
        batch_size: samples per batch, over all ranks.
        seed: seed of the run, below 2**31.
        epoch: number of the epoch, from 0, below 2**32.
    """
    generator = torch.Generator().manual_seed((seed << 32) + epoch)
    return list(torch.randperm(samples, generator=generator).split(batch_size))


def batch_stream(samples: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Yield batches of indices, all of one size, cut from shuffled passes over the data.

    A batch that spans the end of a pass may hold a sample twice.
    """
    epoch, left = 0, torch.empty(0, dtype=torch.int64)
    while True:
        while len(left) < batch_size:
            left = torch.cat([left, batches(samples, samples, seed, epoch)[0]])
            epoch += 1
        yield left[:batch_size]
        left = left[batch_size:]
