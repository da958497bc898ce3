"""The clusters that a loader brings with every batch, between the loop and the forward pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gq_triton.options import shown

__all__ = ["MISSING", "GivenLabels"]

MISSING = "labels=True needs set_labels(labels) before the forward pass of each backward pass"


class GivenLabels:
    """The cluster of every sample of the next batch. Each forward pass takes labels of its own."""

    def __init__(self) -> None:
        self._next: Tensor | None = None

    @property
    def waits(self) -> bool:
        """Whether labels wait for a forward pass."""
        return self._next is not None

    def set(self, labels: Tensor | Sequence[int], device: torch.device) -> None:
        """Keep the labels of the next batch.

        Args:
            labels: ``(B,)`` integers, at least 0.
            device: where the model is.

        Raises:
            ValueError: they are not.
        """
        try:
            found = torch.as_tensor(labels).detach()
        except (TypeError, ValueError, RuntimeError):
            found = torch.empty(0, 0)
        whole = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
        if found.dim() != 1 or not len(found) or not whole:
            got = found if isinstance(labels, Tensor) else labels
            raise ValueError(
                f"set_labels must give one integer to each of at least one sample, got {shown(got)}"
            )
        self._next = found.to(device, torch.int64)

    def check_number(self, sizes: Sequence[int]) -> None:
        """Raise a ValueError unless a forward pass may have as many samples as there are labels.

        Args:
            sizes: the sizes that the batch's dimension has in the model's inputs; empty where they
                are unknown.
        """
        if self._next is not None and sizes and len(self._next) not in sizes:
            raise ValueError(
                f"set_labels gave {len(self._next)} labels for a batch of {sizes[0]} samples: "
                "call it before each forward pass with that batch's labels"
            )

    def take(self) -> Tensor | None:
        """Return the labels of the forward pass that begins, ``(B,)`` int64, once.

        A forward pass without a backward pass needs none, so it is the latter that misses them.
        """
        labels, self._next = self._next, None
        return labels
