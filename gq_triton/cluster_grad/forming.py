"""Sums by cluster of shifts and scales: formed at once, or in one launch for many layers.

A launch costs the host more than the sums of a small layer cost the device. What a sum is formed
from is kept until then.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from gq_triton.engines import Engine, engine
from gq_triton.layer_sums import LayerSums

__all__ = ["Sums", "form_all"]


class Sums:
    """The sums by cluster of one layer's shift and, with inputs, of its scale.

    Args:
        backend: the engine that forms them.
        dy: gradients, ``(B, T, N)``, or ``(B, N, S)`` for images.
        order: the samples by cluster.
        offsets: the ends of the clusters.
        images: whether ``channel_sums`` forms the sums, not ``position_sums``.
        x: the layer's inputs, or None.
        mean: as those functions take it.
        rstd: likewise.

    Attributes:
        dtype: the type of the sums.
    """

    def __init__(
        self,
        backend: str,
        dy: Tensor,
        order: Tensor,
        offsets: Tensor,
        *,
        images: bool = False,
        x: Tensor | None = None,
        mean: Tensor | None = None,
        rstd: Tensor | None = None,
    ) -> None:
        self._ops: Engine = engine(dy.device, backend)
        self._dy, self._x, self._mean, self._rstd = dy, x, mean, rstd
        self.order, self.offsets, self._images = order, offsets, images
        wide = dy.dtype in (torch.float32, torch.float64)
        self.dtype = dy.dtype if wide else torch.promote_types(dy.dtype, torch.float32)
        if x is not None and x.dtype != dy.dtype:
            self.dtype = torch.promote_types(self.dtype, x.dtype)
        self._sums: tuple[Tensor, Tensor | None] | None = None
        # What waits to be formed, and how often its memory had been written to.
        self._due: LayerSums | None = None
        self._versions: list[int] = []

    def now(self) -> tuple[Tensor, Tensor | None]:
        """Return the sums of the shift and of the scale, ``(K, N)``."""
        if self._due is not None:
            form_all([self])
        if self._sums is None:
            function = self._ops.channel_sums if self._images else self._ops.position_sums
            self._sums = function(
                self._dy, self.order, self.offsets, x=self._x, mean=self._mean, rstd=self._rstd
            )
        return self._sums

    def blocks(self, scale: bool) -> Iterator[tuple[int, int, Tensor]]:
        """Yield the sums of the scale, or of the shift, as a sink takes them."""
        sums = self.now()[1 if scale else 0]
        assert sums is not None
        yield 0, sums.shape[1], sums

    def later(self) -> tuple[Tensor, Tensor | None]:
        """Return memory for the sums, which ``form_all`` fills."""
        if self._sums is None:
            dy = self._dy = self._dy.contiguous()
            x = self._x = None if self._x is None else self._x.contiguous()
            size = len(self.offsets) - 1, dy.shape[1 if self._images else 2]
            shifts = dy.new_empty(size, dtype=self.dtype)
            scales = None if x is None else torch.empty_like(shifts)
            self._sums = shifts, scales
            self._due = LayerSums(dy, x, self._mean, self._rstd, shifts, scales, self._images)
            self._versions = [part._version for part in (dy, x) if part is not None]
        return self._sums

    @property
    def waits(self) -> bool:
        """Whether the memory of the sums is yet to be filled."""
        return self._due is not None

    @property
    def nbytes(self) -> int:
        """Bytes of what the sums are formed from."""
        return self._dy.nbytes + (0 if self._x is None else self._x.nbytes)

    def taken(self) -> tuple[Engine, LayerSums]:
        """Return what is to be formed now, and the engine that forms it.

        Raises:
            RuntimeError: it was changed in place since it was given.
        """
        due, self._due = self._due, None
        assert due is not None
        parts = [part for part in (due.dy, due.x) if part is not None]
        if [part._version for part in parts] != self._versions:
            raise RuntimeError(
                "a layer's input or the gradient at its output was changed in place during the "
                "backward pass, before the gradients of the layer's parameters were formed: "
                "change a copy"
            )
        return self._ops, due


def form_all(waiting: Iterable[Sums]) -> None:
    """Form the sums that wait, in one launch where layouts, types and clusters agree."""
    batches: dict[tuple[int, int], list[Sums]] = {}
    for sums in waiting:
        if sums.waits:
            batches.setdefault((id(sums.order), id(sums.offsets)), []).append(sums)
    for batch in batches.values():
        taken = [sums.taken() for sums in batch]
        form: Callable[..., None] = taken[0][0].sums_all
        form([due for _, due in taken], batch[0].order, batch[0].offsets)
