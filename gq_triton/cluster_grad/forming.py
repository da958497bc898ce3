"""Sums by cluster of shifts and scales: formed at once, or in one launch for many layers.

A launch costs the host more than the sums of a small layer cost the device. What a sum is formed
from is kept until then.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from gq_triton.engines import Engine, engine
from gq_triton.layer_sums import LayerSums

__all__ = ["Sums", "engine_of", "form_all", "memory_for"]

# Elements to whose multiples tensors of one allocation are aligned, as wide accesses need it.
ALIGNED = 64


@cache
def engine_of(device: torch.device, backend: str) -> Engine:
    """Return ``engine(device, backend)``, for which layers ask in every step."""
    return engine(device, backend)


def memory_for(sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Return flat memory for tensors with some numbers of elements, of one allocation.

    An allocation of its own for each costs the host several times as much.
    """
    parts = [part for size in sizes for part in (size, -size % ALIGNED)]
    return list(torch.empty(sum(parts), dtype=dtype, device=device).split(parts)[::2])


class Sums:
    """The sums by cluster of one layer's shift and, with inputs, of its scale.

    Args:
        backend: the engine that forms them.
        dy: gradients, ``(B, T, N)``, or ``(B, N, *)`` for images.
        order: the samples by cluster.
        offsets: the ends of the clusters.
        images: whether ``channel_sums`` forms the sums, not ``position_sums``.
        x: the layer's inputs, or None.
        mean: as ``LayerSums`` has it.
        rstd: likewise.

    Attributes:
        dtype: the type of the sums.
        waits: whether the sums are yet to be formed, and ``form_all`` will do it.
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
        self._ops: Engine = engine_of(dy.device, backend)
        self._dy, self._x, self._mean, self._rstd = dy, x, mean, rstd
        self.order, self.offsets, self._images = order, offsets, images
        wide = dy.dtype in (torch.float32, torch.float64)
        self.dtype = dy.dtype if wide else torch.promote_types(dy.dtype, torch.float32)
        if x is not None and x.dtype != dy.dtype:
            self.dtype = torch.promote_types(self.dtype, x.dtype)
        self._sums: tuple[Tensor, Tensor | None] | None = None
        self.waits = False
        # How often the memory of what waits had been written to.
        self._versions: list[int] = []

    def now(self) -> tuple[Tensor, Tensor | None]:
        """Return the sums of the shift and of the scale, ``(K, N)``."""
        if self.waits:
            form_all([self])
        if self._sums is None:
            function = self._ops.channel_sums if self._images else self._ops.position_sums
            # The function allocates the sums: in their place stands a tensor that is not used.
            due = self._due(self._dy, None).as_declared(self.clusters)
            self._sums = function(
                due.dy, self.order, self.offsets, x=due.x, mean=due.mean, rstd=due.rstd
            )
        size = self.clusters, self.columns
        shifts, scales = self._sums
        return shifts.view(size), None if scales is None else scales.view(size)

    def formed(self, scale: bool) -> Tensor:
        """Return the sums of the scale, or of the shift, ``(K, N)`` or flat."""
        if self._sums is None:
            self.now()
        assert self._sums is not None
        sums = self._sums[1 if scale else 0]
        assert sums is not None
        return sums

    def _due(self, shifts: Tensor, scales: Tensor | None) -> LayerSums:
        return LayerSums(self._dy, self._x, self._mean, self._rstd, shifts, scales, self._images)

    def blocks(self, scale: bool) -> Iterator[tuple[int, int, Tensor]]:
        """Yield the sums of the scale, or of the shift, as a sink takes them."""
        sums = self.now()[1 if scale else 0]
        assert sums is not None
        yield 0, sums.shape[1], sums

    def wait(self) -> None:
        """Have the sums formed later, from gradients and inputs that are kept for it."""
        if self._sums is None and not self.waits:
            self._dy, self.waits = self._dy.contiguous(), True
            self._x = None if self._x is None else self._x.contiguous()
            self._versions = [part._version for part in self._parts()]

    def _parts(self) -> list[Tensor]:
        return [self._dy] if self._x is None else [self._dy, self._x]

    @property
    def device(self) -> torch.device:
        """The device of the sums."""
        return self._dy.device

    @property
    def clusters(self) -> int:
        """K."""
        return self.offsets.shape[0] - 1

    @property
    def columns(self) -> int:
        """N."""
        return self._dy.shape[1 if self._images else -1]

    @property
    def nbytes(self) -> int:
        """Bytes of what the sums are formed from."""
        return sum(part.nbytes for part in self._parts())

    @property
    def results(self) -> int:
        """The number of sums: those of the shift, and with inputs those of the scale."""
        return 1 if self._x is None else 2

    def taken(self, shifts: Tensor, scales: Tensor | None) -> tuple[Engine, LayerSums]:
        """Return what is to be formed now, and the engine that forms it.

        Args:
            shifts: memory for the sums of the shift, ``(K * N,)``.
            scales: memory for those of the scale; None without inputs.

        Raises:
            RuntimeError: it was changed in place since it was given.
        """
        if [part._version for part in self._parts()] != self._versions:
            raise RuntimeError(
                "a layer's input or the gradient at its output was changed in place during the "
                "backward pass, before the gradients of the layer's parameters were formed: "
                "change a copy"
            )
        self.waits, self._sums = False, (shifts, scales)
        return self._ops, self._due(shifts, scales)


def form_all(waiting: Iterable[Sums]) -> None:
    """Form the sums that wait, in one launch where layouts, types and clusters agree."""
    batches: dict[tuple[int, int], list[Sums]] = {}
    for sums in waiting:
        if sums.waits:
            batches.setdefault((id(sums.order), id(sums.offsets)), []).append(sums)
    for batch in batches.values():
        memory = _memory(batch)
        taken = [sums.taken(*room) for sums, room in zip(batch, memory, strict=True)]
        form: Callable[..., None] = taken[0][0].sums_all
        form([due for _, due in taken], batch[0].order, batch[0].offsets)


def _memory(batch: list[Sums]) -> list[tuple[Tensor, Tensor | None]]:
    """Return memory for the sums of each layer's shift and scale, of one allocation per type."""
    rooms: dict[torch.dtype, Iterator[Tensor]] = {}
    for dtype in {sums.dtype for sums in batch}:
        sizes = [
            sums.clusters * sums.columns
            for sums in batch
            if sums.dtype == dtype
            for _ in range(sums.results)
        ]
        rooms[dtype] = iter(memory_for(sizes, dtype, batch[0].device))
    found = []
    for sums in batch:
        room = rooms[sums.dtype]
        found.append((next(room), next(room) if sums.results == 2 else None))
    return found
