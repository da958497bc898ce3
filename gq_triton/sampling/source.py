"""Passes over a dataset in an order of one's choice, which know the place of every sample."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from gq_triton.sampling.checks import check_data
from gq_triton.sampling.ranks import check_samples, place

__all__ = ["Source", "source_of"]


class Source:
    """A dataset behind a ``DataLoader``, read in batches of the same size in any order.

    Under ``torch.distributed`` every rank reads a part, of ``own`` samples.

    Args:
        loader: the user's loader, from which dataset, batch size, ``collate_fn`` and workers come.

    Raises:
        TypeError: the dataset has no length.
        ValueError: the dataset is empty or has another length on another rank, or the batch size
            is not known.
    """

    def __init__(self, loader: DataLoader) -> None:
        check_data(loader.dataset)
        size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
        if not isinstance(size, int):
            raise ValueError("the loader must have a batch_size: give DataLoader one")
        self._loader, self._size = loader, size
        self._ranks, self._rank = place(None, None)
        dataset: Any = loader.dataset
        self.samples = len(dataset)
        if not self.samples:
            raise ValueError("the loader's dataset must have at least one sample, got none")
        if self._ranks > 1:
            check_samples(self.samples)
        self.own: int | None = len(range(self._rank, self.samples, self._ranks))

    def batches(self, order: Tensor | None) -> Iterator[tuple[Tensor | None, Any]]:
        """Yield the places ``(b,)`` and the batch of this rank's samples, in an order ``(N,)``."""
        order = torch.arange(self.samples) if order is None else order
        return self._read(order[self._rank :: self._ranks])

    def first(self, order: Tensor | None, count: int) -> Iterator[tuple[Tensor | None, Any]]:
        """Yield the first ``count`` samples of an order, the same on every rank."""
        order = torch.arange(self.samples) if order is None else order
        return self._read(order[:count])

    def _read(self, order: Tensor) -> Iterator[tuple[Tensor | None, Any]]:
        given = self._loader
        loader = DataLoader(
            given.dataset,
            batch_sampler=_Parts(order, self._size),
            collate_fn=given.collate_fn,
            num_workers=given.num_workers,
            worker_init_fn=given.worker_init_fn,
            generator=torch.Generator().manual_seed(0),  # the global one is left alone
        )
        yield from zip(_Parts(order, self._size).tensors(), loader, strict=True)

    def total(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over the ranks, on its device."""
        if self._ranks == 1:
            return tensor
        summed = self._sent(tensor)
        dist.all_reduce(summed)
        return summed.to(tensor.device)

    def of_first_rank(self, tensor: Tensor) -> Tensor:
        """Return the first rank's tensor, on the device of this rank's."""
        if self._ranks == 1:
            return tensor
        sent = self._sent(tensor)
        dist.broadcast(sent, src=0)
        return sent.to(tensor.device)

    def _sent(self, tensor: Tensor) -> Tensor:
        device = "cuda" if "nccl" in dist.get_backend() else "cpu"
        return tensor.to(device, copy=True).contiguous()


class _Parts:
    """A batch sampler that cuts an order into batches, and lists one of them at a time.

    A list of millions of numbers would take more memory than the labels.
    """

    def __init__(self, order: Tensor, size: int) -> None:
        self._order, self._size = order, size

    def __len__(self) -> int:
        return -(-len(self._order) // self._size)

    def __iter__(self) -> Iterator[list[int]]:
        return (part.tolist() for part in self.tensors())

    def tensors(self) -> Iterator[Tensor]:
        """Yield the parts."""
        starts = range(0, len(self._order), self._size)
        return (self._order[start : start + self._size] for start in starts)


class Batches:
    """Batches that come in the same order in every pass, such as a list of them.

    Args:
        batches: the batches, which can be read again and again.
    """

    samples: int | None = None
    own: int | None = None

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = batches

    def batches(self, order: Tensor | None) -> Iterator[tuple[Tensor | None, Any]]:
        """Yield every batch; its places follow from those before it."""
        for batch in self._batches:
            yield None, batch

    def first(self, order: Tensor | None, count: int) -> Iterator[tuple[Tensor | None, Any]]:
        """Yield every batch, from the first on."""
        return self.batches(order)

    def total(self, tensor: Tensor) -> Tensor:
        """Return the tensor: no rank reads a part."""
        return tensor

    def of_first_rank(self, tensor: Tensor) -> Tensor:
        """Return the tensor: no rank reads a part."""
        return tensor


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
