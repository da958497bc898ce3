"""Passes over a dataset in an order of one's choice, which know the place of every sample."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from gq_triton.sampling.checks import check_data

__all__ = ["Source", "source_of"]


class Source:
    """A dataset behind a ``DataLoader``, read in batches of the same size in any order.

    Args:
        loader: the user's loader, from which dataset, batch size, ``collate_fn`` and workers come.

    Raises:
        TypeError: the dataset has no length.
        ValueError: the dataset is empty, or the batch size is not known.
    """

    def __init__(self, loader: DataLoader) -> None:
        check_data(loader.dataset)
        size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
        if not isinstance(size, int):
            raise ValueError("the loader must have a batch_size: give DataLoader one")
        self._loader, self._size = loader, size
        dataset: Any = loader.dataset
        self.samples = len(dataset)
        if not self.samples:
            raise ValueError("the loader's dataset must have at least one sample, got none")

    def batches(self, order: Tensor | None) -> Iterator[tuple[Tensor | None, Any]]:
        """Yield the places ``(b,)`` and the batch of samples in an order ``(N,)``."""
        given = self._loader
        order = torch.arange(self.samples) if order is None else order
        loader = DataLoader(
            given.dataset,
            batch_size=self._size,
            sampler=order.tolist(),
            collate_fn=given.collate_fn,
            num_workers=given.num_workers,
            worker_init_fn=given.worker_init_fn,
            generator=torch.Generator().manual_seed(0),  # the global one is left alone
        )
        yield from zip(order.split(self._size), loader, strict=True)


class Batches:
    """Batches that come in the same order in every pass, such as a list of them.

    Args:
        batches: the batches, which can be read again and again.
    """

    samples: int | None = None

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = batches

    def batches(self, order: Tensor | None) -> Iterator[tuple[Tensor | None, Any]]:
        """Yield every batch; its places follow from those before it."""
        for batch in self._batches:
            yield None, batch


def source_of(loader: Any) -> Source | Batches:
    """Return the source of what ``fit`` was given.

    Raises:
        TypeError: it cannot be read more than once.
    """
    if isinstance(loader, DataLoader):
        return Source(loader)
    if not isinstance(loader, Iterable) or iter(loader) is loader:
        raise TypeError(
            "fit needs a DataLoader, or batches that can be read several times in one order, got "
            f"{type(loader).__name__}"
        )
    return Batches(loader)
